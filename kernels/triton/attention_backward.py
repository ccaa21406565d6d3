"""Attention, backward: two kernels, no atomics, so the same inputs give the same bits.

With p = exp(q k^T * scale - lse), recomputed from the saved log-sum-exp, and delta = rowsum(dout * out) - dlse
(FlashAttention-2, Dao 2023, algorithm 2):

    ds = p * (dout v^T - delta) * scale        dq = ds k        dk = ds^T q        dv = p^T dout

The first kernel owns a block of queries, goes through the keys and leaves delta behind; the second owns a
block of keys and goes through the queries with the scores transposed, so that p^T and ds^T are already the
left operands of their products. Both go through full blocks and then through pieces that fit the rest.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.triton.attention import (
    LOG2_E,
    add_products,
    choose,
    cut,
    head_rows,
    in_units,
    last,
    load_rows,
    products,
    scaled,
    store_rows,
    zero_rows,
)
from fastvit.triton.launch import before, launch, precision


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
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    EDGE: tl.constexpr,  # the last key is among these
    PRECISION: tl.constexpr,
):
    """dq / scale with keys start .. start + KEYS added."""
    k_tiles = load_rows(k, start, keys, KEYS, DIM, PIECES, EDGE)
    v_tiles = load_rows(v, start, keys, KEYS, DIM, PIECES, EDGE)
    p = tl.math.exp2(products(q, k_tiles, ROWS, KEYS, PRECISION) * scale_log2 - lse[:, None])
    if EDGE:
        p = tl.where((start + tl.arange(0, KEYS) < keys)[None, :], p, 0.0)
    ds = p * (products(dout, v_tiles, ROWS, KEYS, PRECISION) - delta[:, None])
    return add_products(dq, ds, k_tiles, PRECISION)


@triton.jit(do_not_specialize=["heads", "queries", "keys"])
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
    scale,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,  # d
    PIECES: tl.constexpr,  # d cut into powers of two
    ROWS: tl.constexpr,  # query rows of a program
    REST: tl.constexpr,  # pieces of the keys that do not fill a block
    BLOCK: tl.constexpr,  # keys in a full block; 0: they are all in REST
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(queries, ROWS)
    row = tl.program_id(0) // blocks  # image * H + head
    first = tl.program_id(0) % blocks * ROWS
    image, head = row // heads, row % heads
    k = head_rows(k_ptr, k_strides, image, head, UNIT)
    v = head_rows(v_ptr, v_strides, image, head, UNIT)
    q = load_rows(head_rows(q_ptr, q_strides, image, head, UNIT), first, queries, ROWS, DIM, PIECES, True)
    out = load_rows(head_rows(out_ptr, out_strides, image, head, UNIT), first, queries, ROWS, DIM, PIECES, True)
    dout = load_rows(head_rows(dout_ptr, dout_strides, image, head, UNIT), first, queries, ROWS, DIM, PIECES, True)

    rows = first + tl.arange(0, ROWS)
    at = row.to(tl.int64) * queries + rows
    lse = tl.load(lse_ptr + at, mask=rows < queries, other=0.0) * LOG2_E
    delta = tl.full((ROWS,), 0.0, tl.float32)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=rows < queries, other=0.0)
    for i in tl.static_range(len(PIECES)):
        delta += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, mask=rows < queries)

    c = scale * LOG2_E
    dq = zero_rows(ROWS, PIECES)
    full = (keys - 1) // BLOCK * BLOCK if BLOCK else 0
    if BLOCK:
        for start in range(0, full, BLOCK):
            dq = _through_keys(
                dq, q, dout, k, v, lse, delta, start, keys, c, ROWS, BLOCK, DIM, PIECES, False, PRECISION
            )
    for j in tl.static_range(len(REST)):
        start = full + before(REST, j)
        dq = _through_keys(
            dq, q, dout, k, v, lse, delta, start, keys, c, ROWS, REST[j], DIM, PIECES, last(REST, j), PRECISION
        )
    store_rows(head_rows(dq_ptr, dq_strides, image, head, UNIT), first, queries, scaled(dq, scale), ROWS, DIM, PIECES)


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
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    EDGE: tl.constexpr,  # the last query is among these
    PRECISION: tl.constexpr,
):
    """dk / scale and dv with queries start .. start + QUERIES added."""
    dk, dv = grads
    q_tiles = load_rows(q, start, queries, QUERIES, DIM, PIECES, EDGE)
    dout_tiles = load_rows(dout, start, queries, QUERIES, DIM, PIECES, EDGE)
    rows = start + tl.arange(0, QUERIES)
    # A row that is not there has an infinite log-sum-exp: its probabilities are exactly 0.
    lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf")) * LOG2_E
    delta = tl.load(delta_ptr + rows, mask=rows < queries, other=0.0)
    p = tl.math.exp2(products(k, q_tiles, ROWS, QUERIES, PRECISION) * scale_log2 - lse[None, :])
    ds = p * (products(v, dout_tiles, ROWS, QUERIES, PRECISION) - delta[None, :])
    return add_products(dk, ds, q_tiles, PRECISION), add_products(dv, p, dout_tiles, PRECISION)


@triton.jit(do_not_specialize=["heads", "queries", "keys"])
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
    scale,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,  # d
    PIECES: tl.constexpr,  # d cut into powers of two
    ROWS: tl.constexpr,  # keys of a program
    REST: tl.constexpr,  # pieces of the queries that do not fill a block
    BLOCK: tl.constexpr,  # queries in a full block; 0: they are all in REST
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(keys, ROWS)
    row = tl.program_id(0) // blocks  # image * H + head
    first = tl.program_id(0) % blocks * ROWS
    image, head = row // heads, row % heads
    q = head_rows(q_ptr, q_strides, image, head, UNIT)
    dout = head_rows(dout_ptr, dout_strides, image, head, UNIT)
    k = load_rows(head_rows(k_ptr, k_strides, image, head, UNIT), first, keys, ROWS, DIM, PIECES, True)
    v = load_rows(head_rows(v_ptr, v_strides, image, head, UNIT), first, keys, ROWS, DIM, PIECES, True)
    lse_ptr += row.to(tl.int64) * queries
    delta_ptr += row.to(tl.int64) * queries

    c = scale * LOG2_E
    grads = zero_rows(ROWS, PIECES), zero_rows(ROWS, PIECES)
    full = (queries - 1) // BLOCK * BLOCK if BLOCK else 0
    if BLOCK:
        for start in range(0, full, BLOCK):
            grads = _through_queries(
                grads, k, v, q, dout, lse_ptr, delta_ptr, start, queries, c, ROWS, BLOCK, DIM, PIECES, False, PRECISION
            )
    for j in tl.static_range(len(REST)):
        start = full + before(REST, j)
        grads = _through_queries(
            grads,
            k,
            v,
            q,
            dout,
            lse_ptr,
            delta_ptr,
            start,
            queries,
            c,
            ROWS,
            REST[j],
            DIM,
            PIECES,
            last(REST, j),
            PRECISION,
        )
    dk, dv = grads
    dk_rows = head_rows(dk_ptr, dk_strides, image, head, UNIT)
    store_rows(dk_rows, first, keys, scaled(dk, scale), ROWS, DIM, PIECES)
    store_rows(head_rows(dv_ptr, dv_strides, image, head, UNIT), first, keys, dv, ROWS, DIM, PIECES)


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
) -> None:
    """Write the gradients of :func:`fastvit.triton.attention.attention_forward` into dq, dk and dv.

    Args:
        dout: (B, Tq, H, d), gradient of out, in its dtype; the last dimension is contiguous, other strides are free.
        dlse: (B, H, Tq) float32, gradient of lse, or None.
        q, k, v, scale: as given to the forward; out, lse: what it returned.
        dq (B, Tq, H, d), dk and dv (B, Tk, H, d): written in full; the last dimension is contiguous, other
            strides are free, so they may be the three views of one packed (B, T, 3, H, d) gradient.

    Raises:
        ValueError: the head dim is above 128.

    Source: FlashAttention-2 (Dao 2023, algorithm 2), here with one kernel for dq and one for dk and dv.
    """
    if 0 in (q.shape[1], k.shape[1]):
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    delta = attention_query_gradient(dout, dlse, q, k, v, out, lse, scale, dq)
    attention_key_value_gradient(dout, q, k, v, lse, delta, scale, dk, dv)


def _sizes(q: Tensor, k: Tensor, scale: float) -> dict[str, Any]:
    sizes = {"heads": q.shape[2], "queries": q.shape[1], "keys": k.shape[1]}
    return {**sizes, "scale": float(scale), "PRECISION": precision(q.dtype)}


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
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """Write dq and return delta (B, H, Tq) float32. Arguments as above; ``tile`` as for ``attention_forward``."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    delta = torch.empty_like(lse)
    tile = tile or choose("query_gradient", q, queries, keys)
    args = {
        **in_units(q=q, k=k, v=v, out=out, dout=dout, dq=dq),
        "lse_ptr": lse,
        "dlse_ptr": None if dlse is None else dlse.contiguous(),
        "delta_ptr": delta,
        **_sizes(q, k, scale),
        **cut(tile, head_dim, queries, keys),
    }
    grid = (triton.cdiv(queries, args["ROWS"]) * batch * heads,)
    hot = q.dtype != torch.float32
    launch(attention_query_gradient_kernel, grid, args, num_warps=tile["warps"], num_stages=tile["stages"], hot=hot)
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
    tile: dict[str, Any] | None = None,
) -> None:
    """Write dk and dv. Arguments as above, with the delta that ``attention_query_gradient`` returned."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    tile = tile or choose("key_value_gradient", q, keys, queries)
    args = {
        **in_units(q=q, k=k, v=v, dout=dout, dk=dk, dv=dv),
        "lse_ptr": lse,
        "delta_ptr": delta,
        **_sizes(q, k, scale),
        **cut(tile, head_dim, keys, queries),
    }
    grid = (triton.cdiv(keys, args["ROWS"]) * batch * heads,)
    hot = q.dtype != torch.float32
    launch(attention_key_value_gradient_kernel, grid, args, num_warps=tile["warps"], num_stages=tile["stages"], hot=hot)
