"""FLOP formulas of the kernel ops, for ``torch.utils.flop_counter``: those of the ATen ops that they replace."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from fastvit.attention_options import AttentionOptions

Shape = tuple[int, ...]


def _product(x: Shape, weight: Shape) -> int:
    """Count x (..., K) times weight (N, K) transposed."""
    return 2 * prod(x[:-1]) * prod(weight)


@register_flop_formula(torch.ops.fastvit.linear)
def linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Count one product."""
    return _product(x, weight)


@register_flop_formula(torch.ops.fastvit.linear_backward)
def linear_backward(dout: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """Count one product for each gradient: input, weight."""
    return _product(x, weight) * sum(rest[-2])


@register_flop_formula(torch.ops.fastvit.mlp)
def mlp(x: Shape, fc1: Shape, fc1_bias: Shape | None, fc2: Shape, *_: Any, **__: Any) -> int:
    """Count two products."""
    return _product(x, fc1) + _product(x, fc2)


@register_flop_formula(torch.ops.fastvit.mlp_backward)
def mlp_backward(dout: Shape, x: Shape, fc1: Shape, fc1_bias: Shape | None, fc2: Shape, *rest: Any, **_: Any) -> int:
    """Count the hidden gradient always, the others where the step needs them."""
    needs_x, needs_fc1, needs_fc2 = rest[-2]
    return _product(x, fc1) * (needs_x + needs_fc1) + _product(x, fc2) * (1 + needs_fc2)


def _pairs(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> int:
    """Return the number of scores of a head, over all images: queries times keys, of each sequence where packed.

    Lengths that can't be read, as in a trace or on meta tensors, count as equal.
    """
    if cu_q is None or cu_k is None:
        return q.shape[0] * q.shape[1] * k.shape[1]
    if cu_q.is_meta or isinstance(cu_q, FakeTensor):
        return q.shape[1] * k.shape[1] // (cu_q.shape[0] - 1)
    return int((cu_q.diff().long() * cu_k.diff().long()).sum())


def _products(q: Tensor, pairs: int) -> int:
    """Count one product of every head with ``pairs`` scores in all."""
    return 2 * pairs * q.shape[2] * q.shape[3]


@register_flop_formula(torch.ops.fastvit.attention, get_raw=True)
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, *values: Any, **_: Any) -> int:
    """Count q k^T and p v of the scores that exist, as F.scaled_dot_product_attention; q R^T with rel_pos_keys R."""
    options = AttentionOptions(*values)
    return (2 + (options.rel_pos_keys is not None)) * _products(q, _pairs(q, k, options.cu_q, options.cu_k))


@register_flop_formula(torch.ops.fastvit.attention_backward, get_raw=True)
def attention_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    """Count as F.scaled_dot_product_attention's backward: the scores once more, and one product for each gradient.

    rel_pos_keys R have a share in the scores and in q's gradient, and their own gradient.
    """
    *values, needs_learned = rest[-len(AttentionOptions._fields) - 1 :]
    options = AttentionOptions(*values)
    rel_pos_keys = 0 if options.rel_pos_keys is None else 2 + needs_learned
    return (5 + rel_pos_keys) * _products(q, _pairs(q, k, options.cu_q, options.cu_k))


@register_flop_formula(torch.ops.fastvit.attention_qkvpacked, get_raw=True)
def attention_qkvpacked(qkv: Tensor, *rest: Any, **_: Any) -> int:
    """Count as :func:`attention` of its thirds."""
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, *rest)


@register_flop_formula(torch.ops.fastvit.attention_qkvpacked_backward, get_raw=True)
def attention_qkvpacked_backward(dout: Tensor, dlse: Tensor | None, qkv: Tensor, *rest: Any, **_: Any) -> int:
    """Count as :func:`attention_backward` of its thirds."""
    q, k, v = qkv.unbind(2)
    return attention_backward(dout, dlse, q, k, v, *rest)


@register_flop_formula(torch.ops.fastvit.attention_rows)
def attention_rows(q: Shape, k: Shape, lse: Shape, rows: Shape, *_: Any, **__: Any) -> int:
    """Count the scores of the rows."""
    return 2 * prod(k) * rows[0]


@register_flop_formula(torch.ops.fastvit.attention_distance)
def attention_distance(q: Shape, k: Shape, lse: Shape, scale: float, grid: Any, *_: Any, **__: Any) -> int:
    """Count the scores of all patches."""
    return 2 * prod(k) // k[1] * prod(grid) ** 2


@register_flop_formula(torch.ops.fastvit.patch_embed)
def patch_embed(images: Shape, layout: Any, weight: Shape, *_: Any, **__: Any) -> int:
    """Count as the strided convolution: every pixel meets every output channel once."""
    return 2 * prod(images) * weight[0]


@register_flop_formula(torch.ops.fastvit.patch_embed_backward)
def patch_embed_backward(
    dout: Shape, images: Shape | None, image_shape: Shape, dtype: Any, layout: Any, weight: Shape, *rest: Any, **_: Any
) -> int:
    """Count as the convolution's backward: one product for the images' gradient, one for the weight's."""
    needs_images, needs_weight, _needs_rows = rest[-2]
    return 2 * prod(image_shape) * weight[0] * (needs_images + needs_weight)
