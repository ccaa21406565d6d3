"""Attention, forward: softmax(q k^T * scale) v for every head, with no T x T matrix in memory.

One program owns a block of query rows of one head. It takes the keys that do not fill a block first, as
pieces that fit them (``Tk`` = 197: 128 + 64 + 16), with all their scores in registers: one maximum, one
exp2, one sum. Then come the full blocks of keys, if there are any, each rescaling what was summed before
it (Milakov and Gimelshein 2018; Dao 2023, algorithm 1). Where registers allow, the table asks for no blocks:
every key is in the first pieces and nothing is ever rescaled.

What changes the scores (a bias, absent keys, sequences packed in one row...) is in ``attention_scores.py``.

A head dim is cut into power-of-two pieces too (72 = 64 + 8 of 16), so it is never padded to the next power of two.
q, k and v are read through their own strides: views of a packed (B, T, 3, H, d) tensor need no copy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.attention_options import UNMODIFIED, Modifiers
from fastvit.triton import tiles
from fastvit.triton.attention_scores import (
    LOG2_E,
    ModifierPointers,
    distance_keys,
    dropout_factor,
    modified,
    modifier_pointers,
    sequence,
    softmax_shift,
)
from fastvit.triton.attention_tiles import (
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
from fastvit.triton.launch import architecture, before, launch, pieces, precision


@triton.jit
def _attend(
    state,  # (highest score (ROWS,), sum (ROWS,), accumulators (ROWS, piece)) of the keys before
    q,
    k,
    v,
    start,
    keys,
    scale_log2,
    modifiers,
    site,  # (image, head, H, its first query, its queries (ROWS,), Tq)
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,  # pieces of the keys to add, which begin at ``start``
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    EDGE: tl.constexpr,  # the last of these keys is the last key; no keys came before
    MODIFIED: tl.constexpr,  # scores are scaled at once, to be modified; else their maximum is that of q k^T
    PRECISION: tl.constexpr,
):
    """One step of the online softmax."""
    image, head, heads, first, queries, count = site
    highest, total, acc = state
    top = highest
    scores, values = (), ()
    for j in tl.static_range(len(KEYS)):
        at = start + before(KEYS, j)
        s = products(q, load_rows(k, at, keys, KEYS[j], DIM, PIECES, EDGE and last(KEYS, j)), ROWS, KEYS[j], PRECISION)
        columns = at + tl.arange(0, KEYS[j])
        if modifiers.distances_ptr is not None:
            s += diagonals(
                q, distance_keys(modifiers, head, DIM), first - at + count - KEYS[j], 2 * count - 1,
                ROWS, KEYS[j], DIM, PIECES, False, PRECISION,
            )  # fmt: skip
        if MODIFIED:
            s = modified(s * scale_log2, modifiers, image, head, heads, queries[:, None], columns[None, :], count, keys)
        if EDGE and last(KEYS, j):
            s = tl.where((columns < keys)[None, :], s, float("-inf"))
        values += (load_rows(v, at, keys, KEYS[j], DIM, PIECES, EDGE and last(KEYS, j)),)
        top = tl.maximum(top, tl.max(s, 1))
        scores += (s,)
    if not EDGE:
        shrink = tl.math.exp2(highest - softmax_shift(top) if MODIFIED else (highest - top) * scale_log2)
        total *= shrink
        acc = scaled(acc, shrink[:, None])
    for j in tl.static_range(len(KEYS)):
        if MODIFIED:
            p = tl.math.exp2(scores[j] - softmax_shift(top)[:, None])
        else:
            p = tl.math.exp2(scores[j] * scale_log2 - (top * scale_log2)[:, None])
        total += tl.sum(p, 1)
        if modifiers.seed_ptr is not None:
            columns = start + before(KEYS, j) + tl.arange(0, KEYS[j])
            p *= dropout_factor(modifiers, image * heads + head, queries[:, None], columns[None, :])
        acc = add_products(acc, p, values[j], PRECISION)
    return top, total, acc


@triton.jit(do_not_specialize=["heads", "queries", "keys", "longest"])
def attention_forward_kernel(
    q_ptr,  # (B, Tq, H, d)
    k_ptr,  # (B, Tk, H, d)
    v_ptr,  # (B, Tk, H, d)
    out_ptr,  # (B, Tq, H, d)
    lse_ptr,  # (B, H, Tq) float32
    q_strides,  # (image, token, head) / UNIT, as all the strides
    k_strides,
    v_strides,
    out_strides,
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
    q = head_rows(q_ptr, q_strides, holder, head, UNIT, q_start)
    k = head_rows(k_ptr, k_strides, holder, head, UNIT, k_start)
    v = head_rows(v_ptr, v_strides, holder, head, UNIT, k_start)
    out = head_rows(out_ptr, out_strides, holder, head, UNIT, q_start)
    rows = first + tl.arange(0, ROWS)
    site = image, head, heads, first, rows, q_length

    q = load_rows(q, first, q_length, ROWS, DIM, PIECES, True)
    scale_log2 = scale * LOG2_E
    if not MODIFIED:
        # The highest score must also be the highest scaled score: q takes the scale's sign, which is exact.
        q = scaled(q, tl.where(scale < 0, -1.0, 1.0))
        scale_log2 = tl.maximum(tl.abs(scale) * LOG2_E, 1e-37)  # not 0: -inf, the score of an absent key, stays -inf

    state = tl.full((ROWS,), float("-inf"), tl.float32), tl.full((ROWS,), 0.0, tl.float32), zero_rows(ROWS, PIECES)
    full = full_blocks(k_length, BLOCK)
    state = _attend(
        state, q, k, v, full, k_length, scale_log2, modifiers, site, ROWS, REST, DIM, PIECES, True, MODIFIED, PRECISION
    )
    if BLOCK:
        for start in range(0, full, BLOCK):
            state = _attend(
                state, q, k, v, start, k_length, scale_log2, modifiers, site,
                ROWS, (BLOCK,), DIM, PIECES, False, MODIFIED, PRECISION,
            )  # fmt: skip
    highest, total, acc = state

    lse = tl.math.log2(total)
    if MODIFIED:  # a row without a key: zeros, -inf
        lse += highest
        total = tl.where(total == 0, 1.0, total)
    else:
        lse += highest * scale_log2
    store_rows(out, first, q_length, scaled(acc, 1 / total[:, None]), ROWS, DIM, PIECES)
    at = (holder * heads + head).to(tl.int64) * queries + q_start
    tl.store(lse_ptr + at + rows, lse / LOG2_E, mask=rows < q_length)


def choose(kernel: str, tensor: Tensor, owned: int, length: int, given: str = "") -> dict[str, Any]:
    """The table's tile for ``kernel`` on ``tensor`` (B, T, H, d) with ``owned`` rows to own, ``length`` to go through.

    Of the derived ones it is the first that takes them. ``given``: "distances" with keys of distances, "modified" with
    other modifiers, "" without any. Those need registers of their own, and for them only derived tiles exist.
    """
    batch, _, heads, head_dim = tensor.shape
    limits = {"max_head_dim": head_dim, "max_owned": owned, "max_length": length}
    kernel = f"{given}_{kernel}" if given else kernel

    def derived() -> dict[str, Any]:
        for row in tiles.rows("attention", architecture(tensor), tensor.dtype):
            if row["kernel"] == kernel and all(size <= row.get(limit, size) for limit, size in limits.items()):
                return row
        raise ValueError(f"attention kernels take a head dim of 1 to 128, got {head_dim}")

    if given:
        return derived()
    return tiles.choose(
        "attention", tensor, tensor.dtype, batch, derived,
        kernel=kernel, heads=heads, head_dim=head_dim, owned=owned, length=length,
    )  # fmt: skip


def fit(size: int, most: int) -> int:
    """The rows of a tile for ``size`` of them: a power of two, from 16 to ``most``."""
    return min(most, max(triton.next_power_of_2(size), 16))


def cut(row: dict[str, Any], head_dim: int, owned: int, length: int) -> dict[str, Any]:
    """Constants of a kernel whose programs own a block of ``owned`` rows each and go through ``length`` others."""
    block = row["block"]
    return {
        "DIM": head_dim,
        "PIECES": pieces(head_dim, 16, row["head_piece"]),
        "ROWS": fit(owned, row["rows"]),
        "REST": pieces(length - (length - 1) // block * block if block else length, 16, row["piece"]),
        "BLOCK": block,
    }


def in_units(*, packed: bool = False, **tensors: Tensor) -> dict[str, Any]:
    """Strides of (image, token, head) for every (B, T, H, d) tensor, divided by their common UNIT of at most 8.

    Multiplied by a constant again in the kernel, they tell the compiler that rows are 16-byte aligned, which
    Triton finds out by itself only for strides of 16 elements: those of d = 72 or 88 are not. Sequences packed in one
    row have an image stride of 0, as theirs would differ with every mix.
    """
    given = {name: (0 if packed else x.stride(0), *x.stride()[1:3]) for name, x in tensors.items()}
    unit = math.gcd(8, *(s for strides in given.values() for s in strides))
    strides = {f"{name}_strides": tuple(s // unit for s in strides) for name, strides in given.items()}
    return {**{f"{name}_ptr": x for name, x in tensors.items()}, **strides, "UNIT": unit}


def images(tensor: Tensor, cu: Tensor | None) -> int:
    """How many images ``tensor`` (B, T, H, d) holds, or sequences if it is packed."""
    return tensor.shape[0] if cu is None else cu.shape[0] - 1


def work(
    kernel: str, tensor: Tensor, owned: int, length: int, given: ModifierPointers, tile: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the tile, the constants) of ``kernel`` whose programs own rows of ``tensor`` (B, T, H, d).

    Packed sequences have lengths that only the device knows: one block for all of them, nothing that fits one.
    """
    packed = given.cu_q_ptr is not None
    modifiers = "modified" if any(member is not None for member in given) else ""
    if given.distances_ptr is not None:
        modifiers = "distances"
    if packed:
        owned = length = 2**31
    tile = tile or choose(kernel, tensor, owned, length, modifiers)
    constants = cut(tile, tensor.shape[3], owned, length)
    if packed:
        constants["REST"] = (tile["block"],)
    return tile, {
        "modifiers": given,
        **constants,
        "PRECISION": precision(tensor.dtype),
    }


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    modifiers: Modifiers = UNMODIFIED,
    *,
    tile: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + bias) v and the logarithm of the softmax's denominator.

    Args:
        q: (B, Tq, H, d) float16, bfloat16 or float32, d from 1 to 128.
        k, v: (B, Tk, H, d) in q's dtype. The last dimension of all three is contiguous, other strides are free.
        scale: factor of the scores, of any sign.
        modifiers: what else changes the scores; a bias has their shape (B, H, Tq, Tk), with strides of 0.
        tile: in place of the table's: rows, block, piece, head_piece, warps, stages.

    Returns:
        out (B, Tq, H, d) contiguous, in q's dtype, and lse (B, H, Tq) float32, the natural logarithm of
        sum(exp(q k^T * scale + bias)). A row without a key has 0 and -inf.

    Raises:
        ValueError: the head dim is above 128.

    Source: FlashAttention-2 (Dao 2023, algorithm 1); scores in units of log2, so that exp is one instruction.
    """
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    out = torch.empty((batch, queries, heads, head_dim), device=q.device, dtype=q.dtype)
    lse = torch.empty((batch, heads, queries), device=q.device, dtype=torch.float32)
    if keys == 0:
        return out.zero_(), lse.fill_(-math.inf)
    given = modifier_pointers(modifiers)
    tile, constants = work("forward", q, queries, keys, given, tile)
    longest = queries if modifiers.cu_q is None else modifiers.max_q
    args = {
        **in_units(packed=modifiers.cu_q is not None, q=q, k=k, v=v, out=out),
        "lse_ptr": lse,
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "longest": longest,
        "scale": float(scale),
        **constants,
    }
    grid = (triton.cdiv(longest, constants["ROWS"]) * images(q, modifiers.cu_q) * heads,)
    hot = q.dtype != torch.float32
    launch(attention_forward_kernel, grid, args, num_warps=tile["warps"], num_stages=tile["stages"], hot=hot)
    return out, lse
