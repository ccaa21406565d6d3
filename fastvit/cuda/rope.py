"""Rotary embeddings on the CUDA kernel (``csrc/rope.cu``), float32 too."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.cuda import extension
from fastvit.cuda.extension import aligned


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Return (q', k') as :func:`fastvit.triton.rope.apply_rotary`; d is a multiple of 8."""
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    extension.library.apply_rotary(q, aligned(q), aligned(k), aligned(cos), aligned(sin), int(inverse), q_out, k_out)
    return q_out, k_out
