"""The definition of every op in plain PyTorch: the judge of all kernels, and a backend of its own.

Notation: B images, T tokens, D width, H heads, d = D / H. Nothing here checks its arguments
(``fastvit.ops`` does) and nothing is clever, so that export, ``torch.compile``, ``torch.func`` and
double backward see through it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.packing import Layout, PackedImages

Norm = tuple[Tensor, Tensor | None, float]  # weight (D,), bias (D,) or None, eps


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Apply a named activation; ``swiglu`` halves the last dimension: silu(first half) * second half."""
    match activation:
        case None:
            return x
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "swiglu":
            gate, value = x.chunk(2, dim=-1)
            return F.silu(gate) * value
    raise ValueError(f"unknown activation {activation!r}")


def merge(y: Tensor, residual: Tensor, gamma: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """residual + row_scale * gamma * y, in the residual's dtype. row_scale (B,) scales whole images, else each row."""
    if gamma is not None:
        y = y * gamma
    if row_scale is not None:
        images = row_scale.shape[0] == y.shape[0]
        y = y * row_scale.view(*(y.shape[:1] if images else y.shape[:-1]), *[1] * (y.ndim - 1 if images else 1))
    return (residual + y).to(residual.dtype)


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last dimension with the result in ``dtype``; float32 weights are not rounded."""
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if dtypes == {dtype}:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(dtype)


def normalise_pixels(images: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(images - mean) / std in ``dtype``; images (..., C, H, W), uint8 ones in units of 255."""
    if images.dtype == torch.uint8:
        images = images.to(torch.promote_types(dtype, torch.float32)) / 255
    if mean is not None:
        images = images - mean.to(images.dtype).view(-1, 1, 1)
    if std is not None:
        images = images / std.to(images.dtype).view(-1, 1, 1)
    return images.to(dtype)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`fastvit.ops.patch_embed`. The strided convolution of the paper's equation 1, then the rows."""
    if images.dtype == torch.uint8 and images.shape[1] != weight.shape[1]:  # (B, H, W, C)
        images = images.permute(0, 3, 1, 2)
    images = normalise_pixels(images, mean, std, weight.dtype)
    x = F.conv2d(images, weight, None if bias is None else bias.to(weight.dtype), weight.shape[2:])
    x = x.flatten(2).transpose(1, 2).to(out_dtype or x.dtype)
    if pos_embed is not None and pos_embed.shape[1] == x.shape[1]:
        x = (x + pos_embed).to(x.dtype)
        pos_embed = None
    if prefix_tokens is not None:
        x = torch.cat([prefix_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
    return x if pos_embed is None else (x + pos_embed).to(x.dtype)


def patch_embed_packed(
    packed: PackedImages,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`fastvit.ops.patch_embed_packed`. The patches are gathered, then multiplied as any matrix."""
    x = F.linear(
        packed_patches(packed, mean, std, weight.dtype),
        weight.flatten(1),
        None if bias is None else bias.to(weight.dtype),
    )
    x = x.to(out_dtype or x.dtype)
    if pos_embed is not None:
        x = (x + pos_embed).to(x.dtype)
    return (x if prefix_tokens is None else with_prefix(x, packed.layout, prefix_tokens)).unsqueeze(0)


def packed_patches(packed: PackedImages, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The normalised pixels of each patch in the weight's order, (N, C * p * q)."""
    patches = packed.pixels[packed.layout.pixels(packed.channels, packed.patch_size)]
    return normalise_pixels(patches, mean, std, dtype).flatten(1)


def with_prefix(x: Tensor, layout: Layout, prefix_tokens: Tensor) -> Tensor:
    """Patches x (N, D) with the prefix tokens (1, P, D) before those of each image: (N + n * P, D)."""
    prefix = prefix_tokens.shape[1]
    at = layout.prefix_tokens(prefix)
    out = x.new_zeros(x.shape[0] + at.numel(), x.shape[1]).index_copy(0, layout.patch_tokens(prefix), x)
    return out.index_copy(0, at.flatten(), prefix_tokens.to(x.dtype).expand(len(at), -1, -1).flatten(0, 1))


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fastvit.ops.layer_norm`."""
    if residual is None:
        return normalise(x, weight, bias, eps, out_dtype or x.dtype)
    stream = merge(x, residual, gamma, row_scale)
    return normalise(stream, weight, bias, eps, out_dtype or stream.dtype), stream


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """See :func:`fastvit.ops.linear`."""
    if norm is not None:
        x = normalise(x, *norm, weight.dtype)
    y = activate(F.linear(x, weight, None if bias is None else bias.to(weight.dtype)), activation)
    return y if residual is None else merge(y, residual, gamma, row_scale)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    norm: Norm | None = None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """See :func:`fastvit.ops.mlp`."""
    hidden = linear(x, fc1_weight, fc1_bias, norm=norm, activation=activation)
    return linear(hidden, fc2_weight, fc2_bias, residual=residual, gamma=gamma, row_scale=row_scale)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fastvit.ops.attention`. softmax(q k^T * scale) v for each head."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if k.shape[2] == 0:  # a row with no key gives zeros
        out = (q @ k.mT) @ v  # zeros, with a graph
        lse = q.new_full(q.shape[:-1], -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        if return_lse:
            wide = torch.promote_types(q.dtype, torch.float32)
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            lse = (q.to(wide) @ k.to(wide).mT * scale).logsumexp(-1)
    out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def attention_qkvpacked(
    qkv: Tensor, *, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`fastvit.ops.attention_qkvpacked`."""
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, scale=scale, return_lse=return_lse)
