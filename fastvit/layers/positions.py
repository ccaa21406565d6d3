"""Where tokens are, for attention that asks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Positions(NamedTuple):
    """What every block of a model is told of its tokens' places."""

    rope: tuple[Tensor, Tensor] | None = None  # (cos, sin) of the patches, as ops.rotate takes them
    window: tuple[int, int] | None = None  # (h, w): the grid of the patches, where biases go by relative position
    table: Tensor | None = None  # a table of such biases for that window which all blocks share, as ops.attention's
    added: tuple[Tensor, ...] = ()  # (T, D) that each block adds to its tokens first; one where they share it

    def before(self, x: Tensor, depth: int) -> Tensor:
        """Tokens x (B, T, D) as the block number ``depth`` starts with them."""
        return x + self.added[depth % len(self.added)]
