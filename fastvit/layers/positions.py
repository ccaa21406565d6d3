"""Where tokens are, for attention that asks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Some of the images that are packed in a row, all of one size."""

    images: int
    tokens: int  # of each
    positions: Positions


class Batches(NamedTuple):
    """Packed images of several sizes as a batch of each."""

    order: Tensor | None  # (total,) int64: the tokens batch by batch; None where they lie so
    back: Tensor | None  # (total,) int64: and back to where they were
    each: tuple[Batch, ...]


class Positions(NamedTuple):
    """What every block of a model is told of its tokens' places."""

    rope: tuple[Tensor, Tensor] | None = None  # (cos, sin) of the patches, as ops.rotate takes them
    window: tuple[int, int] | None = None  # (h, w): the grid of the patches, where biases go by relative position
    table: Tensor | None = None  # a table of such biases for that window which all blocks share, as ops.attention's
    batches: Batches | None = None  # of packed images, which have no window in common
    added: tuple[Tensor, ...] = ()  # (T, D) that each block adds to its tokens first; one where they share it

    def before(self, x: Tensor, depth: int) -> Tensor:
        """Tokens x (B, T, D) as the block number ``depth`` starts with them."""
        return x + self.added[depth % len(self.added)]
