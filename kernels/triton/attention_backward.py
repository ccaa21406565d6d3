"""Attention, backward: two kernels, no atomics, so the same inputs give the same bits.

With p = exp(q k^T * scale - lse), recomputed from the saved log-sum-exp, and delta = rowsum(dout * out) - dlse
(FlashAttention-2, Dao 2023, algorithm 2):

    ds = p * (dout v^T - delta) * scale        dq = ds k        dk = ds^T q        dv = p^T dout

The first kernel owns a block of queries, goes through the keys and leaves delta behind; the second owns a
block of keys and goes through the queries with the scores transposed, so that p^T and ds^T are already the
left operands of their products. Both go through full blocks and then through pieces that fit the rest.

With a bias b, p = exp(q k^T * scale + b - lse), and db is ds without the scale: see ``attention_bias_gradient.py``.
With keys R of the distances, k_j + R[i - j + T - 1] takes the place of k_j in p and in dq; dR is in
``attention_distance_keys.py``.
With dropout, whose factors f of 0 or 1 / (1 - rate) are drawn again, f * (dout v^T) takes the place of dout v^T, and
f * p that of p in dv; delta is the same sum.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.attention_options import UNMODIFIED, Modifiers
from fastvit.triton.attention import images, in_units, work
from fastvit.triton.attention_bias_gradient import attention_bias_gradient, attention_table_gradient
from fastvit.triton.attention_distance_keys import attention_distance_keys_gradient
from fastvit.triton.attention_scores import (
    LOG2_E,
    NONE,
    ModifierPointers,
    backward_lse,
    distance_keys,
    dropout_factor,
    modified,
    modifier_pointers,
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
    dq,  # accumulators (ROWS, piece)
    q,
    dout,
    k,
    v,
    lse,  # (ROWS,), in units of log2
    delta,  # (ROWS,)
    start,
    keys,
    scale_log2,
    modifiers,
    site,  # (image, head, H, its first query, its queries (ROWS,), Tq)
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    EDGE: tl.constexpr,  # the last key is among these
    MODIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq / scale with keys start .. start + KEYS added."""
    image, head, heads, first, queries, count = site
    columns = start + tl.arange(0, KEYS)
    k_tiles = load_rows(k, start, keys, KEYS, DIM, PIECES, EDGE)
    v_tiles = load_rows(v, start, keys, KEYS, DIM, PIECES, EDGE)
    s = products(q, k_tiles, ROWS, KEYS, PRECISION)
    lowest = first - start + count - KEYS  # of the keys of distances that are needed
    if modifiers.distances_ptr is not None:
        distances = distance_keys(modifiers, head, DIM)
        s += diagonals(q, distances, lowest, 2 * count - 1, ROWS, KEYS, DIM, PIECES, False, PRECISION)
    s *= scale_log2
    if MODIFIED:
        s = modified(s, modifiers, image, head, heads, queries[:, None], columns[None, :], count, keys)
    p = tl.math.exp2(s - lse[:, None])
    if EDGE:
        p = tl.where((columns < keys)[None, :], p, 0.0)
    dp = products(dout, v_tiles, ROWS, KEYS, PRECISION)
    if modifiers.seed_ptr is not None:
        dp *= dropout_factor(modifiers, image * heads + head, queries[:, None], columns[None, :])
    ds = p * (dp - delta[:, None])
    dq = add_products(dq, ds, k_tiles, PRECISION)
    if modifiers.distances_ptr is not None:
        dq = add_diagonals(
            dq, ds, distances, lowest, 2 * count - 1, ROWS, KEYS, DIM, PIECES, k_tiles[0].dtype, PRECISION
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
    modifiers,  # see attention_scores.py
    UNIT: tl.constexpr,
    DIM: tl.constexpr,  # d
    PIECES: tl.constexpr,  # d cut into powers of two
    ROWS: tl.constexpr,  # query rows of a program
    REST: tl.constexpr,  # pieces of the keys that do not fill a block
    BLOCK: tl.constexpr,  # keys in a full block; 0: they are all in REST
    PRECISION: tl.constexpr,
):
    MODIFIED: tl.constexpr = modifiers.changed is not None
    blocks = tl.cdiv(longest, ROWS)
    row = tl.program_id(0) // blocks  # image * H + head
    first = tl.program_id(0) % blocks * ROWS
    image, head = row // heads, row % heads
    q_start, q_length, holder = sequence(modifiers.cu_q_ptr, image, queries)
    k_start, k_length, _ = sequence(modifiers.cu_k_ptr, image, keys)
    if modifiers.cu_q_ptr is not None and first >= q_length:
        return
    k = head_rows(k_ptr, k_strides, holder, head, UNIT, k_start)
    v = head_rows(v_ptr, v_strides, holder, head, UNIT, k_start)
    q_rows = head_rows(q_ptr, q_strides, holder, head, UNIT, q_start)
    out_rows = head_rows(out_ptr, out_strides, holder, head, UNIT, q_start)
    dout_rows = head_rows(dout_ptr, dout_strides, holder, head, UNIT, q_start)
    q = load_rows(q_rows, first, q_length, ROWS, DIM, PIECES, True)
    out = load_rows(out_rows, first, q_length, ROWS, DIM, PIECES, True)
    dout = load_rows(dout_rows, first, q_length, ROWS, DIM, PIECES, True)

    rows = first + tl.arange(0, ROWS)
    at = (holder * heads + head).to(tl.int64) * queries + q_start + rows
    lse = tl.load(lse_ptr + at, mask=rows < q_length, other=0.0) * LOG2_E
    if MODIFIED:
        lse = backward_lse(lse)
    delta = tl.full((ROWS,), 0.0, tl.float32)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=rows < q_length, other=0.0)
    for i in tl.static_range(len(PIECES)):
        delta += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, mask=rows < q_length)

    c = scale * LOG2_E
    site = image, head, heads, first, rows, q_length
    dq = zero_rows(ROWS, PIECES)
    full = full_blocks(k_length, BLOCK)
    if BLOCK:
        for start in range(0, full, BLOCK):
            dq = _through_keys(
                dq, q, dout, k, v, lse, delta, start, k_length, c, modifiers, site,
                ROWS, BLOCK, DIM, PIECES, False, MODIFIED, PRECISION,
            )  # fmt: skip
    for j in tl.static_range(len(REST)):
        start = full + before(REST, j)
        dq = _through_keys(
            dq, q, dout, k, v, lse, delta, start, k_length, c, modifiers, site,
            ROWS, REST[j], DIM, PIECES, last(REST, j), MODIFIED, PRECISION,
        )  # fmt: skip
    dq_rows = head_rows(dq_ptr, dq_strides, holder, head, UNIT, q_start)
    store_rows(dq_rows, first, q_length, scaled(dq, scale), ROWS, DIM, PIECES)


@triton.jit
def _through_queries(
    grads,  # (dk, dv): accumulators (ROWS, piece)
    k,
    v,
    q,
    dout,
    lse_ptr,  # (Tq,) of this head
    delta_ptr,
    start,
    queries,
    scale_log2,
    modifiers,
    site,  # (image, head, H, its first key, its keys (ROWS,), Tk)
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    EDGE: tl.constexpr,  # the last query is among these
    MODIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk / scale and dv with queries start .. start + QUERIES added."""
    image, head, heads, first, keys, count = site
    dk, dv = grads
    q_tiles = load_rows(q, start, queries, QUERIES, DIM, PIECES, EDGE)
    dout_tiles = load_rows(dout, start, queries, QUERIES, DIM, PIECES, EDGE)
    rows = start + tl.arange(0, QUERIES)
    # A row that is not there has an infinite log-sum-exp: its probabilities are exactly 0.
    lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf")) * LOG2_E
    delta = tl.load(delta_ptr + rows, mask=rows < queries, other=0.0)
    s = products(k, q_tiles, ROWS, QUERIES, PRECISION)
    if modifiers.distances_ptr is not None:
        s += diagonals(
            q_tiles, distance_keys(modifiers, head, DIM), start - first + count - ROWS, 2 * count - 1,
            QUERIES, ROWS, DIM, PIECES, True, PRECISION,
        )  # fmt: skip
    s *= scale_log2
    if MODIFIED:
        lse = backward_lse(lse)
        s = modified(s, modifiers, image, head, heads, rows[None, :], keys[:, None], queries, count)
    p = tl.math.exp2(s - lse[None, :])
    dp = products(v, dout_tiles, ROWS, QUERIES, PRECISION)
    kept = p
    if modifiers.seed_ptr is not None:
        factor = dropout_factor(modifiers, image * heads + head, rows[None, :], keys[:, None])
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
    modifiers,  # see attention_scores.py
    UNIT: tl.constexpr,
    DIM: tl.constexpr,  # d
    PIECES: tl.constexpr,  # d cut into powers of two
    ROWS: tl.constexpr,  # keys of a program
    REST: tl.constexpr,  # pieces of the queries that do not fill a block
    BLOCK: tl.constexpr,  # queries in a full block; 0: they are all in REST
    PRECISION: tl.constexpr,
):
    MODIFIED: tl.constexpr = modifiers.changed is not None
    blocks = tl.cdiv(longest, ROWS)
    row = tl.program_id(0) // blocks  # image * H + head
    first = tl.program_id(0) % blocks * ROWS
    image, head = row // heads, row % heads
    q_start, q_length, holder = sequence(modifiers.cu_q_ptr, image, queries)
    k_start, k_length, _ = sequence(modifiers.cu_k_ptr, image, keys)
    if modifiers.cu_q_ptr is not None and first >= k_length:
        return
    q = head_rows(q_ptr, q_strides, holder, head, UNIT, q_start)
    dout = head_rows(dout_ptr, dout_strides, holder, head, UNIT, q_start)
    k_rows = head_rows(k_ptr, k_strides, holder, head, UNIT, k_start)
    v_rows = head_rows(v_ptr, v_strides, holder, head, UNIT, k_start)
    k = load_rows(k_rows, first, k_length, ROWS, DIM, PIECES, True)
    v = load_rows(v_rows, first, k_length, ROWS, DIM, PIECES, True)
    at = (holder * heads + head).to(tl.int64) * queries + q_start
    lse_ptr += at
    delta_ptr += at

    c = scale * LOG2_E
    site = image, head, heads, first, first + tl.arange(0, ROWS), k_length
    grads = zero_rows(ROWS, PIECES), zero_rows(ROWS, PIECES)
    full = full_blocks(q_length, BLOCK)
    if BLOCK:
        for start in range(0, full, BLOCK):
            grads = _through_queries(
                grads, k, v, q, dout, lse_ptr, delta_ptr, start, q_length, c, modifiers, site,
                ROWS, BLOCK, DIM, PIECES, False, MODIFIED, PRECISION,
            )  # fmt: skip
    for j in tl.static_range(len(REST)):
        start = full + before(REST, j)
        grads = _through_queries(
            grads, k, v, q, dout, lse_ptr, delta_ptr, start, q_length, c, modifiers, site,
            ROWS, REST[j], DIM, PIECES, last(REST, j), MODIFIED, PRECISION,
        )  # fmt: skip
    dk, dv = grads
    dk_rows = head_rows(dk_ptr, dk_strides, holder, head, UNIT, k_start)
    dv_rows = head_rows(dv_ptr, dv_strides, holder, head, UNIT, k_start)
    store_rows(dk_rows, first, k_length, scaled(dk, scale), ROWS, DIM, PIECES)
    store_rows(dv_rows, first, k_length, dv, ROWS, DIM, PIECES)


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
    modifiers: Modifiers = UNMODIFIED,
    dlearned: Tensor | None = None,
) -> None:
    """Write the gradients of :func:`fastvit.triton.attention.attention_forward` into dq, dk and dv.

    Args:
        dout: (B, Tq, H, d), gradient of out, in its dtype; the last dimension is contiguous, other strides are free.
        dlse: (B, H, Tq) float32, gradient of lse, or None.
        q, k, v, scale and modifiers: as given to the forward; out, lse: what it returned.
        dq (B, Tq, H, d), dk and dv (B, Tk, H, d): written in full; the last dimension is contiguous, other
            strides are free, so they may be the three views of one packed (B, T, 3, H, d) gradient.
        dlearned: the gradient of the modifiers' bias, table or keys of distances, contiguous float32, or None: in the
            shape of what was learned, so with size 1 where a bias is broadcast. Written in full, by a launch of its
            own.

    Raises:
        ValueError: the head dim is above 128.

    Source: FlashAttention-2 (Dao 2023, algorithm 2), here with one kernel for dq and one for dk and dv.
    """
    if 0 in (q.shape[1], k.shape[1]):
        for gradient in (dq, dk, dv, dlearned):
            if gradient is not None:
                gradient.zero_()
        return
    given = modifier_pointers(modifiers)
    delta = attention_query_gradient(dout, dlse, q, k, v, out, lse, scale, dq, given=given, longest=modifiers.max_q)
    attention_key_value_gradient(dout, q, k, v, lse, delta, scale, dk, dv, given=given, longest=modifiers.max_k)
    if dlearned is not None:
        if modifiers.bias is not None:
            gradient_of = attention_bias_gradient
        elif modifiers.rel_pos_table is not None:
            gradient_of = attention_table_gradient
        else:
            gradient_of = attention_distance_keys_gradient
        gradient_of(dout, q, k, v, lse, delta, scale, dlearned, given=given)


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
    given: ModifierPointers = NONE,
    longest: int = 0,
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """Write dq and return delta (B, H, Tq) float32. Arguments as above; ``tile`` as for ``attention_forward``.

    ``longest``: at least as many queries as any sequence has, where they are packed.
    """
    delta = torch.empty_like(lse)
    packed = given.cu_q_ptr is not None
    tile, constants = work("query_gradient", q, q.shape[1], k.shape[1], given, tile)
    args = {
        **in_units(packed=packed, q=q, k=k, v=v, out=out, dout=dout, dq=dq),
        "lse_ptr": lse,
        "dlse_ptr": None if dlse is None else dlse.contiguous(),
        "delta_ptr": delta,
        **_sizes(q, k, scale, longest if packed else q.shape[1]),
        **constants,
    }
    _launch(attention_query_gradient_kernel, args, q, given, tile)
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
    given: ModifierPointers = NONE,
    longest: int = 0,
    tile: dict[str, Any] | None = None,
) -> None:
    """Write dk and dv. Arguments as above, with the delta that ``attention_query_gradient`` returned.

    ``longest``: at least as many keys as any sequence has, where they are packed.
    """
    packed = given.cu_q_ptr is not None
    tile, constants = work("key_value_gradient", k, k.shape[1], q.shape[1], given, tile)
    args = {
        **in_units(packed=packed, q=q, k=k, v=v, dout=dout, dk=dk, dv=dv),
        "lse_ptr": lse,
        "delta_ptr": delta,
        **_sizes(q, k, scale, longest if packed else k.shape[1]),
        **constants,
    }
    _launch(attention_key_value_gradient_kernel, args, q, given, tile)


def _sizes(q: Tensor, k: Tensor, scale: float, longest: int) -> dict[str, Any]:
    sizes = {"heads": q.shape[2], "queries": q.shape[1], "keys": k.shape[1], "longest": longest}
    return {**sizes, "scale": float(scale)}


def _launch(kernel: Any, args: dict[str, Any], q: Tensor, given: ModifierPointers, tile: dict[str, Any]) -> None:
    grid = (triton.cdiv(args["longest"], args["ROWS"]) * images(q, given.cu_q_ptr) * q.shape[2],)
    hot = q.dtype != torch.float32
    launch(kernel, grid, args, num_warps=tile["warps"], num_stages=tile["stages"], hot=hot)
