"""The second half of every deterministic reduction: partial results, summed in a fixed order."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.triton.launch import launch


@triton.jit(do_not_specialize=["S"])
def sum_partials_kernel(
    partials_ptr,  # (S, len(out_ptrs), N), any float dtype
    out_ptrs,  # tuple of (N,) float32
    S,
    N,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for start in range(0, S, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)
        mask = (rows < S)[:, None] & (columns < N)[None, :]
        at = (rows.to(tl.int64) * len(out_ptrs) + tl.program_id(1))[:, None] * N + columns[None, :]
        acc += tl.load(partials_ptr + at, mask, other=0.0).to(tl.float32)
    total = tl.sum(acc, 0)
    for i in tl.static_range(len(out_ptrs)):
        if tl.program_id(1) == i:
            tl.store(out_ptrs[i] + columns, total, columns < N)


def _reduce(partials: Tensor, groups: int, shape: torch.Size) -> tuple[Tensor, ...]:
    partials = partials.contiguous()
    count, size = partials.shape[0], math.prod(shape)
    outs = tuple(torch.empty(shape, dtype=torch.float32, device=partials.device) for _ in range(groups))
    block_s = 32 if count > 8 else 8  # two kernels, whatever the count
    block_n = 2048 // block_s  # 16 values a lane; at least 64 neighbours, so that a row of the tile is whole sectors
    args = {"partials_ptr": partials, "out_ptrs": outs, "S": count, "N": size, "BLOCK_S": block_s, "BLOCK_N": block_n}
    launch(sum_partials_kernel, (triton.cdiv(size, block_n), groups), args)
    return outs


def sum_partials(partials: Tensor) -> Tensor:
    """Sum ``partials`` (S, ...) of any float dtype over the first dimension, in float32: (...).

    Two calls give the same bits. S = 0 gives zeros.
    """
    return _reduce(partials, 1, partials.shape[1:])[0]


def sum_groups(partials: Tensor) -> tuple[Tensor, ...]:
    """Sum ``partials`` (S, G, ...) in one launch into G tensors, none a view: an op may not return those."""
    return _reduce(partials, partials.shape[1], partials.shape[2:])
