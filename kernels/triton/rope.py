"""Rotary position embeddings: rotate q and k by their positions, in one pass over both.

A program owns a block of tokens of one image and keeps their cosines and sines in registers, for q and k and for all
its heads: they are read once, and everything else is read once and written once. Both halves of a head are in the
same program, so a result may lie over its input.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.triton.launch import launch, multiprocessors, store

TOKENS = 16  # of a program: 16 x 32 pairs of two elements, 4 a thread, times cos, sin and both halves


@triton.jit
def _rotate_pairs(
    x_ptr,  # (..., d): where one head of one image starts
    x_step,  # from token to token
    y_ptr,
    y_step,
    tokens,  # (TOKENS, 1) positions
    columns,  # (1, PAIRS)
    inside,  # (TOKENS, PAIRS)
    cos,  # (of the first half, of the second), float32
    sin,  # (what the second half adds to the first, and the first to the second), float32
    HALF: tl.constexpr,
):
    """Store the rotated pairs (i, i + d/2) of x in y."""
    source = x_ptr + tokens * x_step + columns
    target = y_ptr + tokens * y_step + columns
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    store(target, first * cos[0] + second * sin[0], inside)
    store(target + HALF, second * cos[1] + first * sin[1], inside)


@triton.jit(do_not_specialize=["tokens", "heads", "heads_per_program", "prefix"])
def apply_rotary_kernel(
    q_ptr,  # (B, T, H, d)
    k_ptr,  # (B, T, H, d)
    cos_ptr,  # (T', d) or (B, T', d)
    sin_ptr,  # like cos
    q_out_ptr,  # (B, T, H, d)
    k_out_ptr,  # (B, T, H, d)
    q_strides,  # (image, token, head), as all the strides
    k_strides,
    q_out_strides,
    k_out_strides,
    cos_strides,  # (image, token); image 0: the same for all
    tokens,  # T
    heads,  # H
    heads_per_program,
    prefix,  # T - T': tokens that stay as they are
    HALF: tl.constexpr,  # d / 2
    PAIRS: tl.constexpr,  # the same, up to a power of two
    TOKENS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    blocks = tl.cdiv(tokens, TOKENS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS))[:, None]
    columns = tl.arange(0, PAIRS)[None, :]
    inside = (token < tokens) & (columns < HALF)
    token = token.to(tl.int64)

    # Tokens of the prefix stay as they are: cos 1, sin 0.
    rotated = inside & (token >= prefix)
    angle = image * cos_strides[0] + (token - prefix) * cos_strides[1] + columns
    cos = (
        tl.load(cos_ptr + angle, mask=rotated, other=1.0).to(tl.float32),
        tl.load(cos_ptr + angle + HALF, mask=rotated, other=1.0).to(tl.float32),
    )
    sin_first = tl.load(sin_ptr + angle, mask=rotated, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + angle + HALF, mask=rotated, other=0.0).to(tl.float32)
    # The transpose, which is the inverse where both halves have the same angles.
    sin = (sin_second, -sin_first) if INVERSE else (-sin_first, sin_second)

    start = tl.program_id(1) * heads_per_program
    for head in range(start, tl.minimum(start + heads_per_program, heads)):
        _rotate_pairs(
            q_ptr + image * q_strides[0] + head * q_strides[2], q_strides[1],
            q_out_ptr + image * q_out_strides[0] + head * q_out_strides[2], q_out_strides[1],
            token, columns, inside, cos, sin, HALF,
        )  # fmt: skip
        _rotate_pairs(
            k_ptr + image * k_strides[0] + head * k_strides[2], k_strides[1],
            k_out_ptr + image * k_out_strides[0] + head * k_out_strides[2], k_out_strides[1],
            token, columns, inside, cos, sin, HALF,
        )  # fmt: skip


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Return x cos + half(x) sin for x in (q, k), half(x) = (-x[d/2:], x[:d/2]); ``inverse``: the transpose of that.

    Args:
        q, k: (B, T, H, d) float16, bfloat16 or float32, d even. The last dimension is contiguous, other strides free.
        cos, sin: (T', d) or (B, T', d) of any of these dtypes, contiguous, T' <= T: of the last T' tokens; the others
            are copied.
        inverse: rotate back, as the gradients of q' and k' need.

    Returns:
        q' and k' (B, T, H, d), contiguous, in the dtypes of q and k.

    Source: Su et al. 2021, equation 34, with the halves of a head as its pairs.
    """
    batch, tokens, heads, head_dim = q.shape
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    blocks = batch * triton.cdiv(tokens, TOKENS)
    per_program = heads if blocks >= 4 * multiprocessors(q) else 1  # few blocks are shared out by heads
    tensors = {"q": q, "k": k, "q_out": q_out, "k_out": k_out}
    args: dict[str, Any] = {
        **{f"{name}_ptr": x for name, x in tensors.items()},
        **{f"{name}_strides": x.stride()[:3] for name, x in tensors.items()},
        "cos_ptr": cos,
        "sin_ptr": sin,
        "cos_strides": (cos.stride(0) if cos.ndim == 3 else 0, head_dim),
        "tokens": tokens,
        "heads": heads,
        "heads_per_program": per_program,
        "prefix": tokens - cos.shape[-2],
        "HALF": head_dim // 2,
        "PAIRS": triton.next_power_of_2(head_dim // 2),
        "TOKENS": TOKENS,
        "INVERSE": inverse,
    }
    launch(apply_rotary_kernel, (blocks, triton.cdiv(heads, per_program)), args)
    return q_out, k_out
