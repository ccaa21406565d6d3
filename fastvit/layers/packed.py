"""Operations on the tokens of each image, packed or not: select some of them, or reduce them.

Where ``sequences`` is None, x (B, T, D) holds images of equal length; else x (1, total, D) is a packed row of n images.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastvit.packing import Sequences


def leading(x: Tensor, tokens: int | None, sequences: Sequences | None = None) -> Tensor:
    """Return the first ``tokens`` (None: all) of each image: (B, tokens, ...), or packed (1, n * tokens, ...)."""
    if tokens is None:
        return x
    return x[:, :tokens] if sequences is None else x.index_select(1, sequences.leading_tokens(tokens))


def split(x: Tensor, prefix: int, sequences: Sequences | None = None) -> tuple[Tensor, Tensor]:
    """Return each image's first ``prefix`` tokens, (B or n, prefix, D), and the others, (B, N, D) or (1, N, D)."""
    if sequences is None:
        return x[:, :prefix], x[:, prefix:]
    first = leading(x, prefix, sequences)[0].unflatten(0, (sequences.images, prefix))
    return first, x.index_select(1, sequences.without(prefix)[1])


def reduce_tokens(x: Tensor, how: Literal["mean", "max"], sequences: Sequences | None = None, skip: int = 0) -> Tensor:
    """Return the mean or maximum over each image's tokens but the first ``skip``: (B or n, D).

    Packed images take one pass without atomics, deterministic forward and backward, summed in float32 at least.
    """
    if sequences is None:
        rest = x[:, skip:]
        return rest.mean(dim=1) if how == "mean" else rest.amax(dim=1)
    offsets = sequences.cu_seqlens.long()
    if skip:  # each image's first tokens are a segment too, which is then left out
        offsets = torch.cat([torch.stack([offsets[:-1], offsets[:-1] + skip], 1).flatten(), offsets[-1:]])
    rows = x[0].to(torch.promote_types(x.dtype, torch.float32))
    reduced = torch.segment_reduce(rows, how, offsets=offsets, axis=0, unsafe=True)
    return (reduced[1::2] if skip else reduced).to(x.dtype)
