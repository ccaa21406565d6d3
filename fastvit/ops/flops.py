"""FLOP formulas of the kernel ops, for ``torch.utils.flop_counter``: those of the ATen ops that they replace."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

Shape = tuple[int, ...]


def _product(x: Shape, weight: Shape) -> int:
    """x (..., K) times weight (N, K) transposed."""
    return 2 * prod(x[:-1]) * prod(weight)


def _bhtd(shape: Shape) -> Shape:
    batch, tokens, heads, dim = shape
    return batch, heads, tokens, dim


@register_flop_formula(torch.ops.fastvit.linear)
def linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """One product."""
    return _product(x, weight)


@register_flop_formula(torch.ops.fastvit.linear_backward)
def linear_backward(dout: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """One product for each gradient that is wanted: input, weight."""
    return _product(x, weight) * sum(rest[-2])


@register_flop_formula(torch.ops.fastvit.mlp)
def mlp(x: Shape, fc1: Shape, fc1_bias: Shape | None, fc2: Shape, *_: Any, **__: Any) -> int:
    """Two products."""
    return _product(x, fc1) + _product(x, fc2)


@register_flop_formula(torch.ops.fastvit.mlp_backward)
def mlp_backward(dout: Shape, x: Shape, fc1: Shape, fc1_bias: Shape | None, fc2: Shape, *rest: Any, **_: Any) -> int:
    """The hidden gradient always, the others where they are wanted."""
    needs_x, needs_fc1, needs_fc2 = rest[-2]
    return _product(x, fc1) * (needs_x + needs_fc1) + _product(x, fc2) * (1 + needs_fc2)


@register_flop_formula(torch.ops.fastvit.attention)
def attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """As F.scaled_dot_product_attention."""
    return sdpa_flop_count(_bhtd(q), _bhtd(k), _bhtd(v))


@register_flop_formula(torch.ops.fastvit.attention_backward)
def attention_backward(dout: Shape, dlse: Shape | None, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """As F.scaled_dot_product_attention's backward."""
    return sdpa_backward_flop_count(_bhtd(dout), _bhtd(q), _bhtd(k), _bhtd(v))


@register_flop_formula(torch.ops.fastvit.attention_qkvpacked)
def attention_qkvpacked(qkv: Shape, *_: Any, **__: Any) -> int:
    """As :func:`attention` of its thirds."""
    return attention(*[(*qkv[:2], *qkv[3:])] * 3)


@register_flop_formula(torch.ops.fastvit.attention_qkvpacked_backward)
def attention_qkvpacked_backward(dout: Shape, dlse: Shape | None, qkv: Shape, *_: Any, **__: Any) -> int:
    """As :func:`attention_backward` of its thirds."""
    return attention_backward(dout, dlse, *[(*qkv[:2], *qkv[3:])] * 3)


@register_flop_formula(torch.ops.fastvit.patch_embed)
def patch_embed(images: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """As the strided convolution: every pixel meets every output channel once."""
    return 2 * prod(images) * weight[0]


@register_flop_formula(torch.ops.fastvit.patch_embed_backward)
def patch_embed_backward(
    dout: Shape, images: Shape | None, image_shape: Shape, dtype: Any, weight: Shape, *rest: Any, **_: Any
) -> int:
    """As the convolution's backward: one product for the images' gradient, one for the weight's."""
    needs_images, needs_weight, _ = rest[-2]
    return 2 * prod(image_shape) * weight[0] * (needs_images + needs_weight)


@register_flop_formula(torch.ops.fastvit.patch_embed_packed)
def patch_embed_packed(pixels: Shape, layout: Any, weight: Shape, *_: Any, **__: Any) -> int:
    """As :func:`patch_embed`: the pixels are those of whole patches."""
    return 2 * prod(pixels) * weight[0]


@register_flop_formula(torch.ops.fastvit.patch_embed_packed_backward)
def patch_embed_packed_backward(
    dout: Shape, pixels: Shape | None, size: int, dtype: Any, layout: Any, weight: Shape, *rest: Any, **_: Any
) -> int:
    """As :func:`patch_embed_backward`."""
    return 2 * size * weight[0] * sum(rest[-2])
