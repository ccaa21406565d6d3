"""The gradient of attention's relative position keys R, whose row i - j + T - 1 query i has beside key j.

    dR[r] = scale * sum of ds[i, j] q[i] over all pairs with i - j + T - 1 = r, in all images (and heads that share R)

A program owns a block of rows of R and goes through the queries that have them. For a tile of queries the keys that
belong to those rows are neighbours, so the tile's scores and dout v^T are diagonals of products with them, which
:func:`fastvit.triton.attention_tiles.diagonals` puts in the order of R's rows: ds is then an operand as it stands, and
its product with q adds up in registers. No T x T tensor, no atomics, one launch, the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.triton.attention import choose, fit
from fastvit.triton.attention_bias_gradient import gradient_args
from fastvit.triton.attention_scores import (
    LOG2_E,
    OptionPointers,
    backward_lse,
    dropout_factor,
    rel_pos_keys_rows,
    score_mod,
)
from fastvit.triton.attention_tiles import (
    add_products,
    diagonals,
    head_rows,
    load_rows,
    neighbours,
    products,
    scaled,
    store_rows,
    zero_rows,
)
from fastvit.triton.launch import launch


@triton.jit(do_not_specialize=["images", "heads", "tokens", "shared_heads"])
def attention_rel_pos_keys_gradient_kernel(
    q_ptr,  # (B, T, H, d)
    k_ptr,  # (B, T, H, d)
    v_ptr,  # (B, T, H, d)
    dout_ptr,  # (B, T, H, d)
    lse_ptr,  # (B, H, T) float32
    delta_ptr,  # (B, H, T) float32
    drel_pos_keys_ptr,  # (2T-1, d) or (H, 2T-1, d) float32
    q_strides,  # (image, token, head) / UNIT, as all the strides
    k_strides,
    v_strides,
    dout_strides,
    images,  # B
    heads,  # H
    tokens,  # T
    shared_heads,  # H where the heads share the relative position keys, else 1
    scale,
    option_ptrs,  # see attention_scores.py
    UNIT: tl.constexpr,
    DIM: tl.constexpr,  # d
    PIECES: tl.constexpr,  # d cut into powers of two
    ROWS: tl.constexpr,  # relative position keys of a program
    BLOCK_M: tl.constexpr,  # queries of a tile
    PRECISION: tl.constexpr,
):
    count = 2 * tokens - 1
    blocks = tl.cdiv(count, ROWS)
    own_head, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    r = first + tl.arange(0, ROWS)
    own = neighbours(
        rel_pos_keys_rows(option_ptrs, own_head, DIM), first, count, ROWS, DIM, PIECES, q_ptr.dtype.element_ty
    )

    # Row r has the pairs (i, i - r + T - 1): the queries from r - T + 1 to r, as far as there are any.
    lowest = tl.maximum(first - tokens + 1, 0)
    steps = tl.cdiv(tl.minimum(first + ROWS, tokens) - lowest, BLOCK_M)
    grad = zero_rows(ROWS, PIECES)
    for n in range(images * shared_heads * steps):
        start = lowest + n % steps * BLOCK_M
        head, image = own_head + n // steps % shared_heads, n // steps // shared_heads
        q = load_rows(head_rows(q_ptr, q_strides, image, head, UNIT), start, tokens, BLOCK_M, DIM, PIECES, True)
        dout = load_rows(
            head_rows(dout_ptr, dout_strides, image, head, UNIT), start, tokens, BLOCK_M, DIM, PIECES, True
        )
        i = start + tl.arange(0, BLOCK_M)
        at = (image * heads + head).to(tl.int64) * tokens + i
        lse = backward_lse(tl.load(lse_ptr + at, mask=i < tokens, other=float("inf")) * LOG2_E)
        delta = tl.load(delta_ptr + at, mask=i < tokens, other=0.0)

        nearest = start - first + tokens - ROWS  # the first key of the tile's pairs
        k = head_rows(k_ptr, k_strides, image, head, UNIT)
        v = head_rows(v_ptr, v_strides, image, head, UNIT)
        s = diagonals(q, k, nearest, tokens, BLOCK_M, ROWS, DIM, PIECES, True, PRECISION)
        s = (s + products(own, q, ROWS, BLOCK_M, PRECISION)) * (scale * LOG2_E)
        i, j = i[None, :], i[None, :] - r[:, None] + tokens - 1
        exists = (j >= 0) & (j < tokens)
        s = score_mod(s, option_ptrs, image, head, heads, i, tl.maximum(j, 0), tokens, tokens)
        p = tl.where(exists, tl.math.exp2(s - lse[None, :]), 0.0)
        dp = diagonals(dout, v, nearest, tokens, BLOCK_M, ROWS, DIM, PIECES, True, PRECISION)
        if option_ptrs.seed_ptr is not None:
            dp *= dropout_factor(option_ptrs, image * heads + head, i, j)
        grad = add_products(grad, p * (dp - delta[None, :]), q, PRECISION)

    drel_pos_keys = drel_pos_keys_ptr + own_head.to(tl.int64) * count * DIM, DIM
    store_rows(drel_pos_keys, first, count, scaled(grad, scale), ROWS, DIM, PIECES)


def attention_rel_pos_keys_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    drel_pos_keys: Tensor,
    *,
    pointers: OptionPointers,
    tile: dict[str, Any] | None = None,
) -> None:
    """Write drel_pos_keys, contiguous float32 (2T-1, d), or (H, 2T-1, d) where each head has its own keys.

    Other arguments are those of ``attention_key_value_gradient``; ``tile``: rows, block, head_piece, warps, stages.
    """
    batch, tokens, heads, _ = q.shape
    count, own_heads = 2 * tokens - 1, drel_pos_keys.shape[0] if drel_pos_keys.ndim == 3 else 1
    tile = tile or choose("gradient", q, count, tokens, "rel_pos_keys")
    args = {
        **gradient_args(q, k, v, dout, lse, delta, scale, tile),
        "drel_pos_keys_ptr": drel_pos_keys,
        "images": batch,
        "tokens": tokens,
        "shared_heads": heads // own_heads,
        "option_ptrs": pointers,
        "ROWS": fit(count, tile["rows"]),
        "BLOCK_M": fit(tokens, tile["block"]),
    }
    grid = (triton.cdiv(count, args["ROWS"]) * own_heads,)
    launch(attention_rel_pos_keys_gradient_kernel, grid, args, tile=tile, hot=q.dtype != torch.float32)
