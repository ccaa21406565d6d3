"""What changes the scores of attention: bias, table or keys of distances, absent keys, packed sequences, dropout.

The kernels take one argument for all of it, :class:`ModifierPointers`, and ask the functions here. Which of its members
are None is known to the compiler: code for what is not used does not exist.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastvit.attention_options import Modifiers

LOG2_E = tl.constexpr(math.log2(math.e))


class ModifierPointers(NamedTuple):
    """:class:`fastvit.attention_options.Modifiers` as the kernels see them; None where there is none."""

    bias_ptr: Any = None  # (B, H, Tq, Tk) floating
    bias_strides: Any = None  # (image, head, query, key), 0 where it is broadcast
    table_ptr: Any = None  # (R, H) floating, contiguous; R = (2h-1)(2w-1), + 3 with a class token
    window: Any = None  # (h, w, 1 with a class token else 0)
    distances_ptr: Any = None  # (2T-1, d), or (H, 2T-1, d) one after the other; floating, contiguous
    distances_apart: Any = None  # rows from one head's to the next's: 2T-1, or 0 where the heads share them
    mask_ptr: Any = None  # (B, Tk) uint8, not 0 where a key is kept
    mask_strides: Any = None  # (image, key)
    cu_q_ptr: Any = None  # (n + 1,) int32, where each sequence's queries start
    cu_k_ptr: Any = None  # (n + 1,) int32
    changed: Any = None  # 1 where one of those is given: scores are not scale * q k^T alone, a row may have no key
    seed_ptr: Any = None  # (1,) int64
    threshold: Any = None  # a weight is dropped where its 32 random bits are below this
    gain: Any = None  # 1 / (1 - p): what the other weights are multiplied by


NONE = ModifierPointers()


def modifier_pointers(modifiers: Modifiers) -> ModifierPointers:
    """The kernels' argument; the bias has the shape of the scores, keys of distances are there for every head."""
    given: dict[str, Any] = {}
    bias, table, window = modifiers.bias, modifiers.rel_pos_table, modifiers.window
    if bias is not None:
        given |= {"bias_ptr": bias, "bias_strides": bias.stride()}
    if table is not None and window is not None:
        h, w = window
        prefix = int(table.shape[0] > (2 * h - 1) * (2 * w - 1))
        given |= {"table_ptr": table.contiguous(), "window": (h, w, prefix)}
    distances = modifiers.rel_pos_keys
    if distances is not None:
        shared = distances.stride(0) == 0
        distances = (distances[0] if shared else distances).contiguous()
        given |= {"distances_ptr": distances, "distances_apart": 0 if shared else distances.shape[1]}
    if modifiers.key_mask is not None:
        given |= {"mask_ptr": modifiers.key_mask.view(torch.uint8), "mask_strides": modifiers.key_mask.stride()}
    if modifiers.cu_q is not None and modifiers.cu_k is not None:
        given |= {"cu_q_ptr": modifiers.cu_q.contiguous(), "cu_k_ptr": modifiers.cu_k.contiguous()}
    if given:
        given["changed"] = 1
    if modifiers.seed is not None:
        rate = modifiers.dropout_p
        given |= {"seed_ptr": modifiers.seed, "threshold": math.floor(rate * 2**32), "gain": 1 / (1 - rate)}
    return ModifierPointers(**given)


@triton.jit
def sequence(cu_ptr, image, tokens):
    """(where an image's tokens start, how many they are, which image of the tensors they are in) of ``tokens`` there.

    What ``cu_ptr`` says is cut to the tokens that exist.
    """
    start, length, holder = 0, tokens, image
    if cu_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + image), 0), tokens)
        length = tl.minimum(tl.maximum(tl.load(cu_ptr + image + 1), start), tokens) - start
        holder = 0
    return start, length, holder


@triton.jit
def modified(s, modifiers, image, head, heads, i, j, queries, keys):
    """s + bias for queries i and keys j of one head, in units of log2; -inf where a key is absent.

    i and j broadcast to the shape of s, so a tile may have its queries along either axis. What lies beyond the last
    query or key is not loaded, and only its being finite is of any use.
    """
    inside = (i < queries) & (j < keys)
    if modifiers.bias_ptr is not None:
        strides = modifiers.bias_strides
        start = modifiers.bias_ptr + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
        bias = tl.load(start + i.to(tl.int64) * strides[2] + j.to(tl.int64) * strides[3], mask=inside, other=0.0)
        s += bias.to(tl.float32) * LOG2_E
    if modifiers.table_ptr is not None:
        h, w, prefix = modifiers.window[0], modifiers.window[1], modifiers.window[2]
        across, last = 2 * w - 1, (2 * h - 1) * (2 * w - 1) + 2
        patch_i, patch_j = i - prefix, j - prefix
        # (yi - yj + h - 1) (2w - 1) + xi - xj + w - 1: what i gives less what j takes
        row = (patch_i // w + h - 1) * across + patch_i % w + w - 1 - (patch_j // w * across + patch_j % w)
        row = tl.where(j < prefix, last - 1, row)
        row = tl.where(i < prefix, tl.where(j < prefix, last, last - 2), row)
        bias = tl.load(modifiers.table_ptr + row * heads + head, mask=inside, other=0.0)
        s += bias.to(tl.float32) * LOG2_E
    if modifiers.mask_ptr is not None:
        strides = modifiers.mask_strides
        start = modifiers.mask_ptr + image.to(tl.int64) * strides[0]
        kept = tl.load(start + j.to(tl.int64) * strides[1], mask=j < keys, other=0)
        s = tl.where(kept != 0, s, float("-inf"))
    return s


@triton.jit
def distance_keys(modifiers, head, DIM: tl.constexpr):
    """(the first of one head's keys of distances, the step to the next)."""
    return modifiers.distances_ptr + head.to(tl.int64) * modifiers.distances_apart * DIM, DIM


@triton.jit
def dropout_factor(modifiers, row, i, j):
    """What each weight of queries i and keys j is multiplied by: 0 or gain. ``row`` is image * H + head.

    Word 0 of Philox4x32-10 (Salmon et al., 2011) with counter (j, i, row, 0), the seed for a key.
    """
    bits, _, _, _ = tl.philox(tl.load(modifiers.seed_ptr), j, i, row, 0)
    dropped = bits < tl.full((), modifiers.threshold, tl.uint32)
    return tl.where(dropped, 0.0, modifiers.gain)


@triton.jit
def softmax_shift(top):
    """What a row's scores are lowered by: their highest, or 0 for a row without a key, whose weights are then all 0."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def backward_lse(lse):
    """The log-sum-exp as backward subtracts it: for a row without a key it is +inf, so that its weights are 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse)
