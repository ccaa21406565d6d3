"""Attention, backward: two kernels, no atomics, so the same inputs give the same bits.

With p = exp(q k^T * scale - lse), recomputed from the saved log-sum-exp, and delta = rowsum(dout * out) - dlse
(FlashAttention-2, Dao 2023, algorithm 2):

    ds = p * (dout v^T - delta) * scale        dq = ds k        dk = ds^T q        dv = p^T dout

The first kernel owns a block of queries, goes through the keys and leaves delta behind; the second owns a
block of keys and goes through the queries with the scores transposed, so that p^T and ds^T are already the
left operands of their products. Both go through full blocks and then through the tail, in pieces that fit it.

With a bias b, p = exp(q k^T * scale + b - lse), and db is ds without the scale: see ``attention_bias_gradient.py``.
With relative position keys R, k_j + R[i - j + T - 1] takes the place of k_j in p and in dq; dR is in
``attention_rel_pos_keys.py``.
With dropout, whose factors f of 0 or 1 / (1 - rate) are drawn again, f * (dout v^T) takes the place of dout v^T, and
f * p that of p in dv; delta is the same sum.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.attention_options import NO_OPTIONS, AttentionOptions
from fastvit.triton.attention import images, in_units, work
from fastvit.triton.attention_bias_gradient import attention_bias_gradient, attention_table_gradient
from fastvit.triton.attention_rel_pos_keys import attention_rel_pos_keys_gradient
from fastvit.triton.attention_scores import (
    LOG2_E,
    NONE,
    OptionPointers,
    backward_lse,
    dropout_factor,
    option_pointers,
    rel_pos_keys_rows,
    score_mod,
    sequence,
)
from fastvit.triton.attention_tiles import (
    add_diagonals,
    add_products,
    diagonals,
    full_blocks,
    head_rows,
    last,
    load_rows,
    products,
    scaled,
    store_rows,
    zero_rows,
)
from fastvit.triton.launch import before, launch


@triton.jit
def _through_keys(
    dq,  # accumulators (BLOCK_M, piece)
    q,
    dout,
    k,
    v,
    lse,  # (BLOCK_M,), in units of log2
    delta,  # (BLOCK_M,)
    start,
    keys,
    scale_log2,
    option_ptrs,
    site,  # (image, head, H, its first query, its queries (BLOCK_M,), Tq)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    EDGE: tl.constexpr,  # the last key is among these
    SCORE_MOD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return dq / scale with keys start .. start + BLOCK_N added."""
    image, head, heads, first, queries, count = site
    columns = start + tl.arange(0, BLOCK_N)
    k_tiles = load_rows(k, start, keys, BLOCK_N, DIM, PIECES, EDGE)
    v_tiles = load_rows(v, start, keys, BLOCK_N, DIM, PIECES, EDGE)
    s = products(q, k_tiles, BLOCK_M, BLOCK_N, PRECISION)
    lowest = first - start + count - BLOCK_N  # of the relative position keys that are needed
    if option_ptrs.rel_pos_keys_ptr is not None:
        rel_pos_keys = rel_pos_keys_rows(option_ptrs, head, DIM)
        s += diagonals(q, rel_pos_keys, lowest, 2 * count - 1, BLOCK_M, BLOCK_N, DIM, PIECES, False, PRECISION)
    s *= scale_log2
    if SCORE_MOD:
        s = score_mod(s, option_ptrs, image, head, heads, queries[:, None], columns[None, :], count, keys)
    p = tl.math.exp2(s - lse[:, None])
    if EDGE:
        p = tl.where((columns < keys)[None, :], p, 0.0)
    dp = products(dout, v_tiles, BLOCK_M, BLOCK_N, PRECISION)
    if option_ptrs.seed_ptr is not None:
        dp *= dropout_factor(option_ptrs, image * heads + head, queries[:, None], columns[None, :])
    ds = p * (dp - delta[:, None])
    dq = add_products(dq, ds, k_tiles, PRECISION)
    if option_ptrs.rel_pos_keys_ptr is not None:
        dq = add_diagonals(
            dq, ds, rel_pos_keys, lowest, 2 * count - 1, BLOCK_M, BLOCK_N, DIM, PIECES, k_tiles[0].dtype, PRECISION
        )
    return dq


@triton.jit(do_not_specialize=["heads", "queries", "keys", "longest"])
def attention_query_gradient_kernel(
    q_ptr,  # (B, Tq, H, d)
    k_ptr,  # (B, Tk, H, d)
    v_ptr,  # (B, Tk, H, d)
    out_ptr,  # (B, Tq, H, d)
    dout_ptr,  # (B, Tq, H, d)
    dq_ptr,  # (B, Tq, H, d)
    lse_ptr,  # (B, H, Tq) float32
    dlse_ptr,  # (B, H, Tq) float32 or None
    delta_ptr,  # (B, H, Tq) float32, written
    q_strides,  # (image, token, head) / UNIT, as all the strides
    k_strides,
    v_strides,
    out_strides,
    dout_strides,
    dq_strides,
    heads,  # H
    queries,  # Tq
    keys,  # Tk
    longest,  # Tq, or at least as many queries as any packed sequence has
    scale,
    option_ptrs,  # see attention_scores.py
    UNIT: tl.constexpr,
    DIM: tl.constexpr,  # d
    PIECES: tl.constexpr,  # d cut into powers of two
    BLOCK_M: tl.constexpr,  # queries of a program
    BLOCK_N: tl.constexpr,  # keys in a full block; 0: they are all in TAIL
    TAIL: tl.constexpr,  # pieces of the keys that do not fill a block
    PRECISION: tl.constexpr,
):
    SCORE_MOD: tl.constexpr = option_ptrs.changed is not None
    blocks = tl.cdiv(longest, BLOCK_M)
    row = tl.program_id(0) // blocks  # image * H + head
    first = tl.program_id(0) % blocks * BLOCK_M
    image, head = row // heads, row % heads
    q_start, q_length, holder = sequence(option_ptrs.cu_q_ptr, image, queries)
    k_start, k_length, _ = sequence(option_ptrs.cu_k_ptr, image, keys)
    if option_ptrs.cu_q_ptr is not None and first >= q_length:
        return
    k = head_rows(k_ptr, k_strides, holder, head, UNIT, k_start)
    v = head_rows(v_ptr, v_strides, holder, head, UNIT, k_start)
    q_rows = head_rows(q_ptr, q_strides, holder, head, UNIT, q_start)
    out_rows = head_rows(out_ptr, out_strides, holder, head, UNIT, q_start)
    dout_rows = head_rows(dout_ptr, dout_strides, holder, head, UNIT, q_start)
    q = load_rows(q_rows, first, q_length, BLOCK_M, DIM, PIECES, True)
    out = load_rows(out_rows, first, q_length, BLOCK_M, DIM, PIECES, True)
    dout = load_rows(dout_rows, first, q_length, BLOCK_M, DIM, PIECES, True)

    rows = first + tl.arange(0, BLOCK_M)
    at = (holder * heads + head).to(tl.int64) * queries + q_start + rows
    lse = tl.load(lse_ptr + at, mask=rows < q_length, other=0.0) * LOG2_E
    if SCORE_MOD:
        lse = backward_lse(lse)
    delta = tl.full((BLOCK_M,), 0.0, tl.float32)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=rows < q_length, other=0.0)
    for i in tl.static_range(len(PIECES)):
        delta += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, mask=rows < q_length)

    c = scale * LOG2_E
    site = image, head, heads, first, rows, q_length
    dq = zero_rows(BLOCK_M, PIECES)
    full = full_blocks(k_length, BLOCK_N)
    if BLOCK_N:
        for start in range(0, full, BLOCK_N):
            dq = _through_keys(
                dq, q, dout, k, v, lse, delta, start, k_length, c, option_ptrs, site,
                BLOCK_M, BLOCK_N, DIM, PIECES, False, SCORE_MOD, PRECISION,
            )  # fmt: skip
    for j in tl.static_range(len(TAIL)):
        start = full + before(TAIL, j)
        dq = _through_keys(
            dq, q, dout, k, v, lse, delta, start, k_length, c, option_ptrs, site,
            BLOCK_M, TAIL[j], DIM, PIECES, last(TAIL, j), SCORE_MOD, PRECISION,
        )  # fmt: skip
    dq_rows = head_rows(dq_ptr, dq_strides, holder, head, UNIT, q_start)
    store_rows(dq_rows, first, q_length, scaled(dq, scale), BLOCK_M, DIM, PIECES)


@triton.jit
def _through_queries(
    grads,  # (dk, dv): accumulators (BLOCK_N, piece)
    k,
    v,
    q,
    dout,
    lse_ptr,  # (Tq,) of this head
    delta_ptr,
    start,
    queries,
    scale_log2,
    option_ptrs,
    site,  # (image, head, H, its first key, its keys (BLOCK_N,), Tk)
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    EDGE: tl.constexpr,  # the last query is among these
    SCORE_MOD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return dk / scale and dv with queries start .. start + BLOCK_M added."""
    image, head, heads, first, keys, count = site
    dk, dv = grads
    q_tiles = load_rows(q, start, queries, BLOCK_M, DIM, PIECES, EDGE)
    dout_tiles = load_rows(dout, start, queries, BLOCK_M, DIM, PIECES, EDGE)
    rows = start + tl.arange(0, BLOCK_M)
    # A row that is not there has an infinite log-sum-exp: its probabilities are exactly 0.
    lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf")) * LOG2_E
    delta = tl.load(delta_ptr + rows, mask=rows < queries, other=0.0)
    s = products(k, q_tiles, BLOCK_N, BLOCK_M, PRECISION)
    if option_ptrs.rel_pos_keys_ptr is not None:
        s += diagonals(
            q_tiles, rel_pos_keys_rows(option_ptrs, head, DIM), start - first + count - BLOCK_N, 2 * count - 1,
            BLOCK_M, BLOCK_N, DIM, PIECES, True, PRECISION,
        )  # fmt: skip
    s *= scale_log2
    if SCORE_MOD:
        lse = backward_lse(lse)
        s = score_mod(s, option_ptrs, image, head, heads, rows[None, :], keys[:, None], queries, count)
    p = tl.math.exp2(s - lse[None, :])
    dp = products(v, dout_tiles, BLOCK_N, BLOCK_M, PRECISION)
    kept = p
    if option_ptrs.seed_ptr is not None:
        factor = dropout_factor(option_ptrs, image * heads + head, rows[None, :], keys[:, None])
        dp *= factor
        kept *= factor
    ds = p * (dp - delta[None, :])
    return add_products(dk, ds, q_tiles, PRECISION), add_products(dv, kept, dout_tiles, PRECISION)


@triton.jit(do_not_specialize=["heads", "queries", "keys", "longest"])
def attention_key_value_gradient_kernel(
    q_ptr,  # (B, Tq, H, d)
    k_ptr,  # (B, Tk, H, d)
    v_ptr,  # (B, Tk, H, d)
    dout_ptr,  # (B, Tq, H, d)
    dk_ptr,  # (B, Tk, H, d)
    dv_ptr,  # (B, Tk, H, d)
    lse_ptr,  # (B, H, Tq) float32
    delta_ptr,  # (B, H, Tq) float32
    q_strides,  # (image, token, head) / UNIT, as all the strides
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    heads,  # H
    queries,  # Tq
    keys,  # Tk
    longest,  # Tk, or at least as many keys as any packed sequence has
    scale,
    option_ptrs,  # see attention_scores.py
    UNIT: tl.constexpr,
    DIM: tl.constexpr,  # d
    PIECES: tl.constexpr,  # d cut into powers of two
    BLOCK_M: tl.constexpr,  # queries in a full block; 0: they are all in TAIL
    BLOCK_N: tl.constexpr,  # keys of a program
    TAIL: tl.constexpr,  # pieces of the queries that do not fill a block
    PRECISION: tl.constexpr,
):
    SCORE_MOD: tl.constexpr = option_ptrs.changed is not None
    blocks = tl.cdiv(longest, BLOCK_N)
    row = tl.program_id(0) // blocks  # image * H + head
    first = tl.program_id(0) % blocks * BLOCK_N
    image, head = row // heads, row % heads
    q_start, q_length, holder = sequence(option_ptrs.cu_q_ptr, image, queries)
    k_start, k_length, _ = sequence(option_ptrs.cu_k_ptr, image, keys)
    if option_ptrs.cu_q_ptr is not None and first >= k_length:
        return
    q = head_rows(q_ptr, q_strides, holder, head, UNIT, q_start)
    dout = head_rows(dout_ptr, dout_strides, holder, head, UNIT, q_start)
    k_rows = head_rows(k_ptr, k_strides, holder, head, UNIT, k_start)
    v_rows = head_rows(v_ptr, v_strides, holder, head, UNIT, k_start)
    k = load_rows(k_rows, first, k_length, BLOCK_N, DIM, PIECES, True)
    v = load_rows(v_rows, first, k_length, BLOCK_N, DIM, PIECES, True)
    at = (holder * heads + head).to(tl.int64) * queries + q_start
    lse_ptr += at
    delta_ptr += at

    c = scale * LOG2_E
    site = image, head, heads, first, first + tl.arange(0, BLOCK_N), k_length
    grads = zero_rows(BLOCK_N, PIECES), zero_rows(BLOCK_N, PIECES)
    full = full_blocks(q_length, BLOCK_M)
    if BLOCK_M:
        for start in range(0, full, BLOCK_M):
            grads = _through_queries(
                grads, k, v, q, dout, lse_ptr, delta_ptr, start, q_length, c, option_ptrs, site,
                BLOCK_N, BLOCK_M, DIM, PIECES, False, SCORE_MOD, PRECISION,
            )  # fmt: skip
    for j in tl.static_range(len(TAIL)):
        start = full + before(TAIL, j)
        grads = _through_queries(
            grads, k, v, q, dout, lse_ptr, delta_ptr, start, q_length, c, option_ptrs, site,
            BLOCK_N, TAIL[j], DIM, PIECES, last(TAIL, j), SCORE_MOD, PRECISION,
        )  # fmt: skip
    dk, dv = grads
    dk_rows = head_rows(dk_ptr, dk_strides, holder, head, UNIT, k_start)
    dv_rows = head_rows(dv_ptr, dv_strides, holder, head, UNIT, k_start)
    store_rows(dk_rows, first, k_length, scaled(dk, scale), BLOCK_N, DIM, PIECES)
    store_rows(dv_rows, first, k_length, dv, BLOCK_N, DIM, PIECES)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    options: AttentionOptions = NO_OPTIONS,
    dlearned: Tensor | None = None,
) -> None:
    """Write the gradients of :func:`fastvit.triton.attention.attention_forward` into dq, dk and dv.

    Args:
        dout: (B, Tq, H, d), gradient of out, in its dtype; the last dimension is contiguous, other strides are free.
        dlse: (B, H, Tq) float32, gradient of lse, or None.
        q, k, v, scale and options: those of the forward; out, lse: its results.
        dq (B, Tq, H, d), dk and dv (B, Tk, H, d): written in full; the last dimension is contiguous, other
            strides are free, so they may be the three views of one packed (B, T, 3, H, d) gradient.
        dlearned: the gradient of the bias, table or relative position keys in ``options``, contiguous float32 in the
            shape of that option, so with size 1 where a bias is broadcast; or None. Written in full, by a launch of
            its own.

    Raises:
        ValueError: the head dim is above 128.

    Source: FlashAttention-2 (Dao 2023, algorithm 2), here with one kernel for dq and one for dk and dv.
    """
    if 0 in (q.shape[1], k.shape[1]):
        for gradient in (dq, dk, dv, dlearned):
            if gradient is not None:
                gradient.zero_()
        return
    pointers = option_pointers(options)
    delta = attention_query_gradient(dout, dlse, q, k, v, out, lse, scale, dq, pointers=pointers, longest=options.max_q)
    attention_key_value_gradient(dout, q, k, v, lse, delta, scale, dk, dv, pointers=pointers, longest=options.max_k)
    if dlearned is not None:
        if options.bias is not None:
            gradient_of = attention_bias_gradient
        elif options.rel_pos_table is not None:
            gradient_of = attention_table_gradient
        else:
            gradient_of = attention_rel_pos_keys_gradient
        gradient_of(dout, q, k, v, lse, delta, scale, dlearned, pointers=pointers)


def attention_query_gradient(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    *,
    pointers: OptionPointers = NONE,
    longest: int = 0,
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """Write dq and return delta (B, H, Tq) float32. Arguments as above; ``tile`` as for ``attention_forward``.

    ``longest``: at least as many queries as any sequence has, where they are packed.
    """
    delta = torch.empty_like(lse)
    packed = pointers.cu_q_ptr is not None
    tile, constants = work("query_gradient", q, q.shape[1], k.shape[1], pointers, tile)
    args = {
        **in_units(packed=packed, q=q, k=k, v=v, out=out, dout=dout, dq=dq),
        "lse_ptr": lse,
        "dlse_ptr": None if dlse is None else dlse.contiguous(),
        "delta_ptr": delta,
        "longest": longest if packed else q.shape[1],
        "scale": float(scale),
        **constants,
    }
    _launch(attention_query_gradient_kernel, args, constants["BLOCK_M"], pointers, tile)
    return delta


def attention_key_value_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    dk: Tensor,
    dv: Tensor,
    *,
    pointers: OptionPointers = NONE,
    longest: int = 0,
    tile: dict[str, Any] | None = None,
) -> None:
    """Write dk and dv. Arguments as above, with the delta that ``attention_query_gradient`` returned.

    ``longest``: at least as many keys as any sequence has, where they are packed.
    """
    packed = pointers.cu_q_ptr is not None
    tile, constants = work("key_value_gradient", k, k.shape[1], q.shape[1], pointers, tile, own_keys=True)
    args = {
        **in_units(packed=packed, q=q, k=k, v=v, dout=dout, dk=dk, dv=dv),
        "lse_ptr": lse,
        "delta_ptr": delta,
        "longest": longest if packed else k.shape[1],
        "scale": float(scale),
        **constants,
    }
    _launch(attention_key_value_gradient_kernel, args, constants["BLOCK_N"], pointers, tile)


def _launch(kernel: Any, args: dict[str, Any], block: int, pointers: OptionPointers, tile: dict[str, Any]) -> None:
    q = args["q_ptr"]
    args |= {"heads": q.shape[2], "queries": q.shape[1], "keys": args["k_ptr"].shape[1]}
    grid = (triton.cdiv(args["longest"], block) * images(q, pointers.cu_q_ptr) * q.shape[2],)
    launch(kernel, grid, args, tile=tile, hot=q.dtype != torch.float32)
