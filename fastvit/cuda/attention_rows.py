"""Rows and mean distances of attention weights on the CUDA kernels (``csrc/attention_rows.cu``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.cuda import extension
from fastvit.cuda.elementwise import sum_partials
from fastvit.cuda.extension import aligned


def attention_rows(
    q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, scale: float, *, bias: Tensor | None = None
) -> Tensor:
    """Return (B, H, R, Tk) as :func:`fastvit.triton.attention_rows.attention_rows`; d % 8 == 0, from 32 to 128."""
    shape = (q.shape[0], q.shape[2], rows.shape[0], k.shape[1])
    out = torch.empty(shape, dtype=torch.float32, device=q.device)
    extension.library.attention_rows(q, aligned(q), aligned(k), lse, rows, bias, float(scale), out)
    return out


def attention_distance(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, grid: Sequence[int], patch_size: Sequence[float]
) -> Tensor:
    """Return (B, H) as :func:`fastvit.triton.attention_rows.attention_distance`."""
    blocks = extension.library.attention_distance_blocks(q, grid[0] * grid[1])
    partials = torch.empty((blocks, q.shape[0], q.shape[2]), dtype=torch.float32, device=q.device)
    extension.library.attention_distance(q, aligned(q), aligned(k), lse, float(scale), *grid, *patch_size, partials)
    return sum_partials(partials)
