"""Attention, forward: softmax(q k^T * scale) v for every head, with no T x T matrix in memory.

One program owns a query block of one head. It takes the keys that do not fill a block first, as
pieces that fit them (``Tk`` = 197: 128 + 64 + 16), with all their scores in registers: one maximum, one
exp2, one sum. Then come the full blocks of keys, if there are any, each rescaling what was summed before
it (Milakov and Gimelshein 2018; Dao 2023, algorithm 1). Where registers allow, the table asks for no blocks:
every key is in the first pieces and nothing is ever rescaled.

The score mod (a bias, absent keys, sequences packed in one row...) is in ``attention_scores.py``.

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

from fastvit.attention_options import NO_OPTIONS, AttentionOptions
from fastvit.triton import tiles
from fastvit.triton.attention_scores import (
    LOG2_E,
    OptionPointers,
    dropout_factor,
    option_pointers,
    rel_pos_keys_rows,
    score_mod,
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
    state,  # (m_i (BLOCK_M,), l_i (BLOCK_M,), acc (BLOCK_M, piece)): maximum, sum and accumulators of the keys before
    q,
    k,
    v,
    start,
    keys,
    scale_log2,
    option_ptrs,
    site,  # (image, head, H, its first query, its queries (BLOCK_M,), Tq)
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,  # pieces of the keys to add, which begin at ``start``
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    EDGE: tl.constexpr,  # the last of these keys is the last key; no keys came before
    SCORE_MOD: tl.constexpr,  # options change the scores: they are scaled at once; else their maximum is that of q k^T
    PRECISION: tl.constexpr,
):
    """Take one step of the online softmax."""
    image, head, heads, first, queries, count = site
    m_i, l_i, acc = state
    m_new = m_i
    scores, values = (), ()
    for j in tl.static_range(len(KEYS)):
        at = start + before(KEYS, j)
        s = products(
            q, load_rows(k, at, keys, KEYS[j], DIM, PIECES, EDGE and last(KEYS, j)), BLOCK_M, KEYS[j], PRECISION
        )
        columns = at + tl.arange(0, KEYS[j])
        if option_ptrs.rel_pos_keys_ptr is not None:
            s += diagonals(
                q, rel_pos_keys_rows(option_ptrs, head, DIM), first - at + count - KEYS[j], 2 * count - 1,
                BLOCK_M, KEYS[j], DIM, PIECES, False, PRECISION,
            )  # fmt: skip
        if SCORE_MOD:
            s = score_mod(
                s * scale_log2, option_ptrs, image, head, heads, queries[:, None], columns[None, :], count, keys
            )
        if EDGE and last(KEYS, j):
            s = tl.where((columns < keys)[None, :], s, float("-inf"))
        values += (load_rows(v, at, keys, KEYS[j], DIM, PIECES, EDGE and last(KEYS, j)),)
        m_new = tl.maximum(m_new, tl.max(s, 1))
        scores += (s,)
    if not EDGE:
        alpha = tl.math.exp2(m_i - softmax_shift(m_new) if SCORE_MOD else (m_i - m_new) * scale_log2)
        l_i *= alpha
        acc = scaled(acc, alpha[:, None])
    for j in tl.static_range(len(KEYS)):
        if SCORE_MOD:
            p = tl.math.exp2(scores[j] - softmax_shift(m_new)[:, None])
        else:
            p = tl.math.exp2(scores[j] * scale_log2 - (m_new * scale_log2)[:, None])
        l_i += tl.sum(p, 1)
        if option_ptrs.seed_ptr is not None:
            columns = start + before(KEYS, j) + tl.arange(0, KEYS[j])
            p *= dropout_factor(option_ptrs, image * heads + head, queries[:, None], columns[None, :])
        acc = add_products(acc, p, values[j], PRECISION)
    return m_new, l_i, acc


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
    q = head_rows(q_ptr, q_strides, holder, head, UNIT, q_start)
    k = head_rows(k_ptr, k_strides, holder, head, UNIT, k_start)
    v = head_rows(v_ptr, v_strides, holder, head, UNIT, k_start)
    out = head_rows(out_ptr, out_strides, holder, head, UNIT, q_start)
    rows = first + tl.arange(0, BLOCK_M)
    site = image, head, heads, first, rows, q_length

    q = load_rows(q, first, q_length, BLOCK_M, DIM, PIECES, True)
    scale_log2 = scale * LOG2_E
    if not SCORE_MOD:
        # The highest score must also be the highest scaled score: q takes the scale's sign, which is exact.
        q = scaled(q, tl.where(scale < 0, -1.0, 1.0))
        scale_log2 = tl.maximum(tl.abs(scale) * LOG2_E, 1e-37)  # not 0: -inf, the score of an absent key, stays -inf

    state = (
        tl.full((BLOCK_M,), float("-inf"), tl.float32),
        tl.full((BLOCK_M,), 0.0, tl.float32),
        zero_rows(BLOCK_M, PIECES),
    )
    full = full_blocks(k_length, BLOCK_N)
    state = _attend(
        state,
        q,
        k,
        v,
        full,
        k_length,
        scale_log2,
        option_ptrs,
        site,
        BLOCK_M,
        TAIL,
        DIM,
        PIECES,
        True,
        SCORE_MOD,
        PRECISION,
    )
    if BLOCK_N:
        for start in range(0, full, BLOCK_N):
            state = _attend(
                state, q, k, v, start, k_length, scale_log2, option_ptrs, site,
                BLOCK_M, (BLOCK_N,), DIM, PIECES, False, SCORE_MOD, PRECISION,
            )  # fmt: skip
    m_i, l_i, acc = state

    lse = tl.math.log2(l_i)
    if SCORE_MOD:  # a row without a key: zeros, -inf
        lse += m_i
        l_i = tl.where(l_i == 0, 1.0, l_i)
    else:
        lse += m_i * scale_log2
    store_rows(out, first, q_length, scaled(acc, 1 / l_i[:, None]), BLOCK_M, DIM, PIECES)
    at = (holder * heads + head).to(tl.int64) * queries + q_start
    tl.store(lse_ptr + at + rows, lse / LOG2_E, mask=rows < q_length)


def choose(kernel: str, tensor: Tensor, owned: int, length: int, variant: str = "") -> dict[str, Any]:
    """Return the tile for ``kernel`` on ``tensor`` (B, T, H, d) with ``owned`` rows to own, ``length`` to go through.

    Of the derived tiles it is the first that takes these sizes. ``variant``: "rel_pos_keys" with relative position
    keys, "score_mod" with other options, "" without any. Options need registers of their own, and for them only
    derived tiles exist.
    """
    batch, _, heads, head_dim = tensor.shape
    limits = {"max_head_dim": head_dim, "max_owned": owned, "max_length": length}
    kernel = f"{variant}_{kernel}" if variant else kernel

    def derived() -> dict[str, Any]:
        for row in tiles.rows("attention", architecture(tensor), tensor.dtype):
            if row["kernel"] == kernel and all(size <= row.get(limit, size) for limit, size in limits.items()):
                return row
        raise ValueError(f"attention kernels take a head dim of 1 to 128, got {head_dim}")

    if variant:
        return derived()
    return tiles.choose(
        "attention", tensor, tensor.dtype, batch, derived,
        kernel=kernel, heads=heads, head_dim=head_dim, owned=owned, length=length,
    )  # fmt: skip


def fit(size: int, most: int) -> int:
    """Return the rows of a tile for ``size`` of them: a power of two, from 16 to ``most``."""
    return min(most, max(triton.next_power_of_2(size), 16))


def cut(row: dict[str, Any], head_dim: int, owned: int, length: int, own_keys: bool) -> dict[str, Any]:
    """Return the constants of a kernel whose programs own blocks of ``owned`` rows and go through ``length`` others.

    The rows are queries and the others keys, or, with ``own_keys``, the other way round.
    """
    block = row["block"]
    return {
        "DIM": head_dim,
        "PIECES": pieces(head_dim, 16, row["head_piece"]),
        "BLOCK_N" if own_keys else "BLOCK_M": fit(owned, row["rows"]),
        "BLOCK_M" if own_keys else "BLOCK_N": block,
        "TAIL": pieces(length - (length - 1) // block * block if block else length, 16, row["piece"]),
    }


def in_units(*, packed: bool = False, **tensors: Tensor) -> dict[str, Any]:
    """Return strides (image, token, head) of every (B, T, H, d) tensor, divided by their common UNIT of at most 8.

    Multiplied by a constant again in the kernel, they tell the compiler that rows are 16-byte aligned, which
    Triton finds out by itself only for strides of 16 elements: those of d = 72 or 88 are not. Sequences packed in one
    row have an image stride of 0, as theirs would differ with every mix.
    """
    by_name = {name: (0 if packed else x.stride(0), *x.stride()[1:3]) for name, x in tensors.items()}
    unit = math.gcd(8, *(s for strides in by_name.values() for s in strides))
    strides = {f"{name}_strides": tuple(s // unit for s in strides) for name, strides in by_name.items()}
    return {**{f"{name}_ptr": x for name, x in tensors.items()}, **strides, "UNIT": unit}


def images(tensor: Tensor, cu: Tensor | None) -> int:
    """Return the number of images in ``tensor`` (B, T, H, d), or of sequences if it is packed."""
    return tensor.shape[0] if cu is None else cu.shape[0] - 1


def work(
    kernel: str,
    tensor: Tensor,
    owned: int,
    length: int,
    pointers: OptionPointers,
    tile: dict[str, Any] | None,
    own_keys: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (tile, constants) of ``kernel``, whose programs own queries (or keys) of ``tensor`` (B, T, H, d).

    Packed sequences have lengths that only the device knows: one block for all of them, nothing that fits one.
    """
    packed = pointers.cu_q_ptr is not None
    variant = "score_mod" if any(member is not None for member in pointers) else ""
    if pointers.rel_pos_keys_ptr is not None:
        variant = "rel_pos_keys"
    if packed:
        owned = length = 2**31
    tile = tile or choose(kernel, tensor, owned, length, variant)
    constants = cut(tile, tensor.shape[3], owned, length, own_keys)
    if packed:
        constants["TAIL"] = (tile["block"],)
    return tile, {
        "option_ptrs": pointers,
        **constants,
        "PRECISION": precision(tensor.dtype),
    }


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    options: AttentionOptions = NO_OPTIONS,
    *,
    tile: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return softmax(q k^T * scale + bias) v and the logarithm of the softmax's denominator.

    Args:
        q: (B, Tq, H, d) float16, bfloat16 or float32, d from 1 to 128.
        k, v: (B, Tk, H, d) in q's dtype. The last dimension of all three is contiguous, other strides are free.
        scale: factor of the scores, of any sign.
        options: a bias has the shape of the scores (B, H, Tq, Tk), with strides of 0.
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
    pointers = option_pointers(options)
    tile, constants = work("forward", q, queries, keys, pointers, tile)
    longest = queries if options.cu_q is None else options.max_q
    args = {
        **in_units(packed=options.cu_q is not None, q=q, k=k, v=v, out=out),
        "lse_ptr": lse,
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "longest": longest,
        "scale": float(scale),
        **constants,
    }
    grid = (triton.cdiv(longest, constants["BLOCK_M"]) * images(q, options.cu_q) * heads,)
    launch(attention_forward_kernel, grid, args, tile=tile, hot=q.dtype != torch.float32)
    return out, lse
