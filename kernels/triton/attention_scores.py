"""The score mod of attention: bias, table or relative position keys, absent keys, packed sequences, dropout.

The kernels take one argument for all of it, ``option_ptrs``, an :class:`OptionPointers` (Triton keeps the name
``options``), and call the functions here. The compiler knows which of its members are None: it makes no code for
options that are not used.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastvit.attention_options import AttentionOptions

LOG2_E = tl.constexpr(math.log2(math.e))


class OptionPointers(NamedTuple):
    """:class:`fastvit.attention_options.AttentionOptions` as the kernels read them; None where there is none."""

    bias_ptr: Any = None  # (B, H, Tq, Tk) floating
    bias_strides: Any = None  # (image, head, query, key), 0 where it is broadcast
    table_ptr: Any = None  # (R, H) floating, contiguous; R = (2h-1)(2w-1), + 3 with a class token
    window: Any = None  # (h, w, 1 with a class token else 0)
    rel_pos_keys_ptr: Any = None  # (2T-1, d), or (H, 2T-1, d) one after the other; floating, contiguous
    rel_pos_keys_stride: Any = None  # rows from one head's to the next's: 2T-1, or 0 where the heads share them
    mask_ptr: Any = None  # (B, Tk) uint8, not 0 where a key is kept
    mask_strides: Any = None  # (image, key)
    cu_q_ptr: Any = None  # (n + 1,) int32, where each sequence's queries start
    cu_k_ptr: Any = None  # (n + 1,) int32
    changed: Any = None  # 1 where one of those is present: scores are not scale * q k^T alone, a row may have no key
    seed_ptr: Any = None  # (1,) int64
    threshold: Any = None  # a weight is dropped where its 32 random bits are below this
    gain: Any = None  # 1 / (1 - p), the factor of the other weights


NONE = OptionPointers()


def option_pointers(options: AttentionOptions) -> OptionPointers:
    """Return the kernels' argument for options that were :meth:`expanded`: a bias has the shape of the scores."""
    fields: dict[str, Any] = {}
    bias, table, window = options.bias, options.rel_pos_table, options.window
    if bias is not None:
        fields |= {"bias_ptr": bias, "bias_strides": bias.stride()}
    if table is not None and window is not None:
        h, w = window
        prefix = int(table.shape[0] > (2 * h - 1) * (2 * w - 1))
        fields |= {"table_ptr": table.contiguous(), "window": (h, w, prefix)}
    keys = options.rel_pos_keys
    if keys is not None:
        shared = keys.stride(0) == 0
        keys = (keys[0] if shared else keys).contiguous()
        fields |= {"rel_pos_keys_ptr": keys, "rel_pos_keys_stride": 0 if shared else keys.shape[1]}
    if options.key_mask is not None:
        fields |= {"mask_ptr": options.key_mask.view(torch.uint8), "mask_strides": options.key_mask.stride()}
    if options.cu_q is not None and options.cu_k is not None:
        fields |= {"cu_q_ptr": options.cu_q.contiguous(), "cu_k_ptr": options.cu_k.contiguous()}
    if fields:
        fields["changed"] = 1
    if options.seed is not None:
        rate = options.dropout_p
        fields |= {"seed_ptr": options.seed, "threshold": math.floor(rate * 2**32), "gain": 1 / (1 - rate)}
    return OptionPointers(**fields)


@triton.jit
def sequence(cu_ptr, image, tokens):
    """Return (start, length, image of the tensors) of an image's or a sequence's tokens, of ``tokens`` in a tensor.

    Starts are clamped to the tokens that exist.
    """
    start, length, holder = 0, tokens, image
    if cu_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + image), 0), tokens)
        length = tl.minimum(tl.maximum(tl.load(cu_ptr + image + 1), start), tokens) - start
        holder = 0
    return start, length, holder


@triton.jit
def score_mod(s, option_ptrs, image, head, heads, i, j, queries, keys):
    """Return s + bias for queries i and keys j of one head, in units of log2; -inf where a key is absent.

    i and j broadcast to the shape of s, so a tile may have its queries along either axis. What lies beyond the last
    query or key is not loaded, and only its being finite is of any use.
    """
    inside = (i < queries) & (j < keys)
    if option_ptrs.bias_ptr is not None:
        strides = option_ptrs.bias_strides
        start = option_ptrs.bias_ptr + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
        bias = tl.load(start + i.to(tl.int64) * strides[2] + j.to(tl.int64) * strides[3], mask=inside, other=0.0)
        s += bias.to(tl.float32) * LOG2_E
    if option_ptrs.table_ptr is not None:
        h, w, prefix = option_ptrs.window[0], option_ptrs.window[1], option_ptrs.window[2]
        across, last = 2 * w - 1, (2 * h - 1) * (2 * w - 1) + 2
        patch_i, patch_j = i - prefix, j - prefix
        # (yi - yj + h - 1) (2w - 1) + xi - xj + w - 1: what i gives less what j takes
        row = (patch_i // w + h - 1) * across + patch_i % w + w - 1 - (patch_j // w * across + patch_j % w)
        row = tl.where(j < prefix, last - 1, row)
        row = tl.where(i < prefix, tl.where(j < prefix, last, last - 2), row)
        bias = tl.load(option_ptrs.table_ptr + row * heads + head, mask=inside, other=0.0)
        s += bias.to(tl.float32) * LOG2_E
    if option_ptrs.mask_ptr is not None:
        strides = option_ptrs.mask_strides
        start = option_ptrs.mask_ptr + image.to(tl.int64) * strides[0]
        kept = tl.load(start + j.to(tl.int64) * strides[1], mask=j < keys, other=0)
        s = tl.where(kept != 0, s, float("-inf"))
    return s


@triton.jit
def rel_pos_keys_rows(option_ptrs, head, DIM: tl.constexpr):
    """Return (the first of one head's relative position keys, the step to the next)."""
    return option_ptrs.rel_pos_keys_ptr + head.to(tl.int64) * option_ptrs.rel_pos_keys_stride * DIM, DIM


@triton.jit
def dropout_factor(option_ptrs, row, i, j):
    """Return the factor of each weight of queries i and keys j: 0 or gain. ``row`` is image * H + head.

    Word 0 of Philox4x32-10 (Salmon et al., 2011) with counter (j, i, row, 0), the seed for a key.
    """
    bits, _, _, _ = tl.philox(tl.load(option_ptrs.seed_ptr), j, i, row, 0)
    dropped = bits < tl.full((), option_ptrs.threshold, tl.uint32)
    return tl.where(dropped, 0.0, option_ptrs.gain)


@triton.jit
def softmax_shift(m_i):
    """Return what softmax subtracts from a row: its maximum m_i, or 0 without a key, for weights that are all 0."""
    return tl.where(m_i == float("-inf"), 0.0, m_i)


@triton.jit
def backward_lse(lse):
    """Return the log-sum-exp as backward subtracts it: +inf for a row without a key, so that its weights are 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse)
