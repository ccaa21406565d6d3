"""Patch embedding on the CUDA kernels: ``csrc/patch_embed.cu``, for packed images ``csrc/patch_embed_packed.cu``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.cuda import extension
from fastvit.cuda.elementwise import sum_partials
from fastvit.cuda.extension import aligned, unit_rows
from fastvit.packing import Layout


def patch_embed_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: Layout | None = None,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Embed images as :func:`fastvit.triton.patch_embed.patch_embed_forward`; D is a multiple of 8."""
    dim, _, p, q = weight.shape
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    first = None if prefix_tokens is None or prefix == 0 else prefix_tokens[0].contiguous()
    if layout is None:
        shape = images.shape[0], prefix + (images.shape[2] // p) * (images.shape[3] // q), dim
        positions = None if pos_embed is None else pos_embed[0].contiguous()
    else:
        shape = 1, layout.image.shape[0] + layout.starts.shape[0] * prefix, dim
        positions = None if pos_embed is None else pos_embed.contiguous()
    out = torch.empty(shape, dtype=out_dtype or weight.dtype, device=images.device)
    weight, bias = aligned(weight.contiguous()), unit_rows(bias)
    if layout is None:
        extension.library.patch_embed_forward(images, images, weight, bias, positions, first, mean, std, out)
    else:
        extension.library.patch_embed_packed_forward(
            images, images.contiguous(), weight, bias, *_tables(layout), positions, first, mean, std, out[0]
        )
    return out


def patch_embed_weight_gradient(
    dout: Tensor,
    images: Tensor,
    weight_shape: Sequence[int],
    *,
    layout: Layout | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    prefix: int = 0,
) -> Tensor:
    """Return dweight float32 as :func:`fastvit.triton.patch_embed.patch_embed_weight_gradient`."""
    dim, channels, p, q = weight_shape
    features = channels * p * q
    rows = dout.shape[0] * (dout.shape[1] - prefix) if layout is None else dout.shape[0]
    splits = extension.library.patch_embed_weight_gradient_splits(dout, rows, dim, features)
    partials = torch.empty(splits, dim, features, dtype=torch.float32, device=dout.device)
    dout = aligned(dout.contiguous())
    if layout is None:
        extension.library.patch_embed_weight_gradient(dout, dout, images, mean, std, p, q, prefix, partials)
    else:
        extension.library.patch_embed_packed_weight_gradient(
            dout, dout, images.contiguous(), p, q, *_tables(layout), mean, std, partials
        )
    return sum_partials(partials).view(weight_shape)


def patch_embed_row_gradients(dout: Tensor) -> Tensor:
    """Return dout (B, T, D) summed over the batch: (T, D) float32."""
    return sum_partials(dout)


def patch_embed_image_gradient(
    dout: Tensor,
    weight: Tensor,
    image_shape: Sequence[int],
    *,
    std: Tensor | None = None,
    prefix: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return dimages (B, C, H, W) as :func:`fastvit.triton.patch_embed.patch_embed_image_gradient`."""
    dimages = torch.empty(image_shape, dtype=dtype, device=dout.device)
    dout, weight = aligned(dout.contiguous()), aligned(weight.contiguous())
    extension.library.patch_embed_image_gradient(dout, dout, weight, std, prefix, dimages)
    return dimages


def _tables(layout: Layout) -> list[Tensor]:
    return [table.contiguous() for table in layout]
