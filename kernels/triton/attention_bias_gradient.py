"""Gradients of the attention bias, and of BEiT's relative position table.

Both are sums of ds = p * (f * (dout v^T) - delta), the gradient of the scores (see ``attention_backward.py``), over
everything that shares an entry. A program owns entries, computes ds tile by tile for all that share them and adds the
tiles up in its registers: no T x T tensor, no atomics, one launch, the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.triton.attention import choose, fit, in_units
from fastvit.triton.attention_scores import LOG2_E, OptionPointers, backward_lse, dropout_factor, score_mod
from fastvit.triton.attention_tiles import head_rows, pick_rows, products
from fastvit.triton.launch import launch, pieces, precision


@triton.jit
def _score_gradient(
    pointers,  # of q, k, v, dout, lse, delta
    strides,  # of q, k, v, dout
    sizes,  # (H, Tq, Tk)
    image,
    head,
    i,  # (BLOCK_M,) queries
    j,  # (BLOCK_N,) keys
    i_inside,  # which of them count
    j_inside,
    fixed,  # an addend of the scores, in units of log2
    scale_log2,
    option_ptrs,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return ds (BLOCK_M, BLOCK_N) float32 of one head, 0 where a query or key does not count."""
    heads, queries, keys = sizes
    q = pick_rows(head_rows(pointers[0], strides[0], image, head, UNIT), i, i_inside, DIM, PIECES)
    k = pick_rows(head_rows(pointers[1], strides[1], image, head, UNIT), j, j_inside, DIM, PIECES)
    v = pick_rows(head_rows(pointers[2], strides[2], image, head, UNIT), j, j_inside, DIM, PIECES)
    dout = pick_rows(head_rows(pointers[3], strides[3], image, head, UNIT), i, i_inside, DIM, PIECES)
    row = image * heads + head
    at = row.to(tl.int64) * queries + i
    # A query that does not count has an infinite log-sum-exp: its probabilities are exactly 0.
    lse = backward_lse(tl.load(pointers[4] + at, mask=i_inside, other=float("inf")) * LOG2_E)
    delta = tl.load(pointers[5] + at, mask=i_inside, other=0.0)
    s = products(q, k, BLOCK_M, BLOCK_N, PRECISION) * scale_log2 + fixed
    s = score_mod(s, option_ptrs, image, head, heads, i[:, None], j[None, :], queries, keys)
    p = tl.where(j_inside[None, :], tl.math.exp2(s - lse[:, None]), 0.0)
    dp = products(dout, v, BLOCK_M, BLOCK_N, PRECISION)
    if option_ptrs.seed_ptr is not None:
        dp *= dropout_factor(option_ptrs, row, i[:, None], j[None, :])
    return p * (dp - delta[:, None])


@triton.jit(do_not_specialize=["heads", "queries", "keys", "shared_images", "shared_heads", "own_heads"])
def attention_bias_gradient_kernel(
    q_ptr,  # (B, Tq, H, d)
    k_ptr,  # (B, Tk, H, d)
    v_ptr,  # (B, Tk, H, d)
    dout_ptr,  # (B, Tq, H, d)
    lse_ptr,  # (B, H, Tq) float32
    delta_ptr,  # (B, H, Tq) float32
    dbias_ptr,  # (B or 1, H or 1, Tq or 1, Tk or 1) float32
    q_strides,  # (image, token, head) / UNIT, as all the strides
    k_strides,
    v_strides,
    dout_strides,
    heads,  # H
    queries,  # Tq
    keys,  # Tk
    shared_images,  # B where the bias is the same for all images, else 1
    shared_heads,  # H where it is the same for all heads, else 1
    own_heads,  # heads of dbias: 1 or H
    scale,
    option_ptrs,  # see attention_scores.py
    UNIT: tl.constexpr,
    DIM: tl.constexpr,  # d
    PIECES: tl.constexpr,  # d cut into powers of two
    BLOCK_M: tl.constexpr,  # queries of a tile
    BLOCK_N: tl.constexpr,  # keys of a tile
    SUM_QUERIES: tl.constexpr,  # the bias is the same for all queries
    SUM_KEYS: tl.constexpr,  # it is the same for all keys
    PRECISION: tl.constexpr,
):
    """Compute dbias: a program owns a tile of it."""
    q_blocks, k_blocks = tl.cdiv(queries, BLOCK_M), tl.cdiv(keys, BLOCK_N)
    # Blocks that a program goes through, and blocks that are owned by different programs.
    q_through, q_owners = 1, q_blocks
    k_through, k_owners = 1, k_blocks
    if SUM_QUERIES:
        q_through, q_owners = q_blocks, 1
    if SUM_KEYS:
        k_through, k_owners = k_blocks, 1
    pid = tl.program_id(0)
    own_k, own_q, own = pid % k_owners, pid // k_owners % q_owners, pid // k_owners // q_owners
    own_head, own_image = own % own_heads, own // own_heads

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for n in range(shared_images * shared_heads * q_through * k_through):
        i = (own_q + n // k_through % q_through) * BLOCK_M + tl.arange(0, BLOCK_M)
        j = (own_k + n % k_through) * BLOCK_N + tl.arange(0, BLOCK_N)
        head = own_head + n // k_through // q_through % shared_heads
        image = own_image + n // k_through // q_through // shared_heads
        acc += _score_gradient(
            (q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr), (q_strides, k_strides, v_strides, dout_strides),
            (heads, queries, keys), image, head, i, j, i < queries, j < keys, 0.0, scale * LOG2_E, option_ptrs,
            UNIT, DIM, PIECES, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip

    own_rows, own_columns = own_q * BLOCK_M + tl.arange(0, BLOCK_M), own_k * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = queries, keys  # of dbias
    if SUM_QUERIES:
        acc = tl.sum(acc, 0, keep_dims=True)
        own_rows, rows = tl.arange(0, 1), 1
    if SUM_KEYS:
        acc = tl.sum(acc, 1, keep_dims=True)
        own_columns, columns = tl.arange(0, 1), 1
    at = (own.to(tl.int64) * rows + own_rows[:, None]) * columns + own_columns[None, :]
    tl.store(dbias_ptr + at, acc, mask=(own_rows < rows)[:, None] & (own_columns < columns)[None, :])


@triton.jit(do_not_specialize=["images", "heads", "tokens", "h", "w", "prefix"])
def attention_table_gradient_kernel(
    q_ptr,  # (B, T, H, d)
    k_ptr,  # (B, T, H, d)
    v_ptr,  # (B, T, H, d)
    dout_ptr,  # (B, T, H, d)
    lse_ptr,  # (B, H, T) float32
    delta_ptr,  # (B, H, T) float32
    table_ptr,  # (R, H) floating
    dtable_ptr,  # (R, H) float32
    q_strides,  # (image, token, head) / UNIT, as all the strides
    k_strides,
    v_strides,
    dout_strides,
    images,  # B
    heads,  # H
    tokens,  # T = h w + prefix
    h,  # of the window, in patches
    w,
    prefix,  # 1 with a class token: R = (2h-1)(2w-1) + 3, else 0 and no 3
    scale,
    option_ptrs,  # those besides the table; see attention_scores.py
    UNIT: tl.constexpr,
    DIM: tl.constexpr,  # d
    PIECES: tl.constexpr,  # d cut into powers of two
    BLOCK_M: tl.constexpr,  # queries of a tile: a row of the window, or a part of one
    BLOCK_N: tl.constexpr,  # keys of a tile: rows of the window that are neighbours, or a part of one
    SPLIT: tl.constexpr,  # rows of the window are wider than BLOCK_M and taken in parts
    PRECISION: tl.constexpr,
):
    """Compute dtable: a program owns a block of dy = yi - yj with all dx = xi - xj, if SPLIT one dy and a block of dx.

    Whatever row (or part) of queries a tile begins at, its element (r, c) has the same offset, so tiles add up.
    Three more programs for each head own the class token's entries, in the same way: one row of the scores without
    its first element, one column, and the element in which they meet.
    """
    across = 2 * w - 1
    along_y, along_x = BLOCK_N // w, across  # offsets that a program owns
    if SPLIT:
        along_y, along_x = 1, BLOCK_N - BLOCK_M + 1
    blocks_x = tl.cdiv(across, along_x)
    blocks = tl.cdiv(2 * h - 1, along_y) * blocks_x
    head, block = tl.program_id(0) % heads, tl.program_id(0) // heads
    patches = block < blocks
    of_class = (2 * h - 1) * across + block - blocks  # the entry, where it is the class token's
    class_row, class_column = block == blocks, block == blocks + 1

    # The tile's first offset is its highest. Entries below the lowest offset, in the last block, don't exist.
    dy_top, dx_top = h - 1 - block // blocks_x * along_y, w - 1
    if SPLIT:
        dx_top -= block % blocks_x * along_x
    r, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if SPLIT:
        dy, dx = dy_top, dx_top + r[:, None] - c[None, :]
        entry = (dy + h - 1) * across + dx + w - 1
        first = (dy_top + h - 1) * across + tl.maximum(dx_top - along_x + w, 0)
        shift = dx_top
    else:
        entry = (dy_top - c // w + h - 1)[None, :] * across + r[:, None] - (c % w)[None, :] + w - 1
        first = tl.maximum(dy_top - along_y + h, 0) * across
        shift = 0
    end = (dy_top + h - 1) * across + dx_top + w
    entry = tl.where(patches, entry, of_class)
    first, end = tl.where(patches, first, of_class), tl.where(patches, end, of_class + 1)
    exists = (entry >= first) & (entry < end)
    fixed = tl.load(table_ptr + entry * heads + head, mask=exists, other=0.0).to(tl.float32) * LOG2_E

    # Step (y, x) has queries i_first + y i_step + x + r with x + r < i_count, and keys j_first + y j_step + x + c with
    # 0 <= x + c - shift < j_count, both of them tokens.
    i_first = tl.where(patches, prefix, tl.where(class_column, 1, 0))
    i_step = tl.where(patches, w, tl.where(class_column, BLOCK_M, 0))
    i_count = tl.where(patches, w, tl.where(class_column, BLOCK_M, 1))
    j_first = tl.where(patches, prefix - dy_top * w - shift, tl.where(class_row, 1, 0))
    j_step = tl.where(patches, w, tl.where(class_row, BLOCK_N, 0))
    j_count = tl.where(patches, w if SPLIT else along_y * w, tl.where(class_row, BLOCK_N, 1))
    shift = tl.where(patches, shift, 0)
    parts = tl.where(patches, tl.cdiv(w, BLOCK_M), 1)
    along = tl.where(class_column, BLOCK_M, BLOCK_N)
    steps = tl.where(patches, h * parts, tl.where(class_row | class_column, tl.cdiv(tokens - 1, along), 1))
    first_key = tl.where(patches, prefix, 0)

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for n in range(images * steps):
        y, x = n % steps // parts, n % steps % parts * BLOCK_M
        i, j = i_first + y * i_step + x + r, j_first + y * j_step + x + c
        i_inside = (x + r < i_count) & (i < tokens)
        j_inside = (x + c >= shift) & (x + c - shift < j_count) & (j >= first_key) & (j < tokens)
        acc += _score_gradient(
            (q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr), (q_strides, k_strides, v_strides, dout_strides),
            (heads, tokens, tokens), n // steps, head, i, j, i_inside, j_inside, fixed, scale * LOG2_E, option_ptrs,
            UNIT, DIM, PIECES, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip

    for one in range(first, end):
        tl.store(dtable_ptr + one * heads + head, tl.sum(tl.where(entry == one, acc, 0.0)))


def gradient_args(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, scale: float, tile: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments that the gradients of options have in common."""
    return {
        **in_units(q=q, k=k, v=v, dout=dout),
        "lse_ptr": lse,
        "delta_ptr": delta,
        "heads": q.shape[2],
        "scale": float(scale),
        "DIM": q.shape[3],
        "PIECES": pieces(q.shape[3], 16, tile["head_piece"]),
        "PRECISION": precision(q.dtype),
    }


def attention_bias_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    dbias: Tensor,
    *,
    pointers: OptionPointers,
    tile: dict[str, Any] | None = None,
) -> None:
    """Write dbias, contiguous float32 of 4 dimensions: (B or 1, H or 1, Tq or 1, Tk or 1).

    Other arguments are those of ``attention_key_value_gradient``; ``tile``: rows, block, head_piece, warps, stages.
    """
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    own_images, own_heads, own_queries, own_keys = dbias.shape
    tile = tile or choose("bias_gradient", q, queries, keys, "score_mod")
    args = {
        **gradient_args(q, k, v, dout, lse, delta, scale, tile),
        "dbias_ptr": dbias,
        "queries": queries,
        "keys": keys,
        "shared_images": batch // own_images if own_images else 0,
        "shared_heads": heads // own_heads,
        "own_heads": own_heads,
        "option_ptrs": pointers,
        "BLOCK_M": fit(queries, tile["rows"]),
        "BLOCK_N": fit(keys, tile["block"]),
        "SUM_QUERIES": own_queries == 1,
        "SUM_KEYS": own_keys == 1,
    }
    blocks = 1 if own_queries == 1 else triton.cdiv(queries, args["BLOCK_M"])
    blocks *= 1 if own_keys == 1 else triton.cdiv(keys, args["BLOCK_N"])
    grid = (own_images * own_heads * blocks,)
    launch(attention_bias_gradient_kernel, grid, args, tile=tile, hot=q.dtype != torch.float32)


def attention_table_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    dtable: Tensor,
    *,
    pointers: OptionPointers,
    tile: dict[str, Any] | None = None,
) -> None:
    """Write dtable ((2h-1)(2w-1) [+3], H), contiguous float32, for the table in ``pointers``.

    Other arguments are those of ``attention_key_value_gradient``; ``tile``: rows, block (at least twice the rows),
    head_piece, warps, stages.
    """
    batch, tokens, heads, _ = q.shape
    h, w, prefix = pointers.window
    tile = tile or choose("table_gradient", q, tokens, tokens, "score_mod")
    rows = fit(w, tile["rows"])
    args = {
        **gradient_args(q, k, v, dout, lse, delta, scale, tile),
        "table_ptr": pointers.table_ptr,
        "dtable_ptr": dtable,
        "images": batch,
        "tokens": tokens,
        "h": h,
        "w": w,
        "prefix": prefix,
        "option_ptrs": pointers._replace(table_ptr=None, window=None),
        "BLOCK_M": rows,
        "BLOCK_N": tile["block"],
        "SPLIT": w > rows,
    }
    if args["SPLIT"]:
        blocks = (2 * h - 1) * triton.cdiv(2 * w - 1, tile["block"] - rows + 1)
    else:
        blocks = triton.cdiv(2 * h - 1, tile["block"] // w)
    grid = (heads * (blocks + 3 * prefix),)
    launch(attention_table_gradient_kernel, grid, args, tile=tile, hot=q.dtype != torch.float32)
