"""Rounding to a narrower type, the same in the interpreter as on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvit.triton.launch import INTERPRETING

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x in ``dtype``, rounded to nearest even. The interpreter cuts bf16 off: it is given rounded bits."""
    if _INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # NaN stays as it is
    return x.to(dtype)
