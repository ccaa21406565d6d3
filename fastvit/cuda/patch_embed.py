"""Patch embedding on the CUDA kernels: ``csrc/patch_embed.cu``, for packed images ``csrc/patch_embed_packed.cu``."""

from __future__ import annotations

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
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(B, P + N, D), as :func:`fastvit.triton.patch_embed.patch_embed_forward`; D is a multiple of 8."""
    batch, _, height, right = images.shape
    width, _, p, q = weight.shape
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    tokens = prefix + (height // p) * (right // q)
    out = torch.empty(batch, tokens, width, dtype=out_dtype or weight.dtype, device=images.device)
    positions = None if pos_embed is None else pos_embed[0].contiguous()
    first = None if prefix_tokens is None or prefix == 0 else prefix_tokens[0].contiguous()
    weight = aligned(weight.contiguous())
    extension.library.patch_embed_forward(images, images, weight, unit_rows(bias), positions, first, mean, std, out)
    return out


def patch_embed_weight_gradient(
    dout: Tensor,
    images: Tensor,
    weight_shape: tuple[int, int, int, int] | torch.Size,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    prefix: int,
) -> Tensor:
    """dweight (D, C, p, q) float32, as :func:`fastvit.triton.patch_embed.patch_embed_weight_gradient`."""
    width, channels, p, q = weight_shape
    features = channels * p * q
    rows = dout.shape[0] * (dout.shape[1] - prefix)
    splits = extension.library.patch_embed_weight_gradient_splits(dout, rows, width, features)
    partials = torch.empty(splits, width, features, dtype=torch.float32, device=dout.device)
    dout = aligned(dout.contiguous())
    extension.library.patch_embed_weight_gradient(dout, dout, images, mean, std, p, q, prefix, partials)
    return sum_partials(partials).view(weight_shape)


def patch_embed_row_gradients(dout: Tensor) -> Tensor:
    """dout (B, T, D) summed over the batch: (T, D) float32."""
    return sum_partials(dout)


def patch_embed_image_gradient(
    dout: Tensor,
    weight: Tensor,
    image_shape: tuple[int, int, int, int] | torch.Size,
    *,
    std: Tensor | None = None,
    prefix: int,
    dtype: torch.dtype,
) -> Tensor:
    """dimages (B, C, H, W), as :func:`fastvit.triton.patch_embed.patch_embed_image_gradient`."""
    dimages = torch.empty(image_shape, dtype=dtype, device=dout.device)
    dout, weight = aligned(dout.contiguous()), aligned(weight.contiguous())
    extension.library.patch_embed_image_gradient(dout, dout, weight, std, prefix, dimages)
    return dimages


def patch_embed_packed_forward(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(1, N + n * P, D), as :func:`fastvit.triton.patch_embed_packed.patch_embed_packed_forward`."""
    width, prefix = weight.shape[0], 0 if prefix_tokens is None else prefix_tokens.shape[1]
    tokens = layout.image.shape[0] + layout.starts.shape[0] * prefix
    out = torch.empty(1, tokens, width, dtype=out_dtype or weight.dtype, device=pixels.device)
    positions = None if pos_embed is None else pos_embed.contiguous()
    first = None if prefix_tokens is None or prefix == 0 else prefix_tokens[0].contiguous()
    weight, pixels = aligned(weight.contiguous()), pixels.contiguous()
    extension.library.patch_embed_packed_forward(
        pixels, pixels, weight, unit_rows(bias), *_tables(layout), positions, first, mean, std, out[0]
    )
    return out


def patch_embed_packed_weight_gradient(
    dout: Tensor,
    pixels: Tensor,
    weight_shape: tuple[int, int, int, int] | torch.Size,
    layout: Layout,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """dweight float32, as :func:`fastvit.triton.patch_embed_packed.patch_embed_packed_weight_gradient`."""
    width, channels, p, q = weight_shape
    features = channels * p * q
    splits = extension.library.patch_embed_weight_gradient_splits(dout, dout.shape[0], width, features)
    partials = torch.empty(splits, width, features, dtype=torch.float32, device=dout.device)
    dout, pixels = aligned(dout.contiguous()), pixels.contiguous()
    extension.library.patch_embed_packed_weight_gradient(
        dout, dout, pixels, p, q, *_tables(layout), mean, std, partials
    )
    return sum_partials(partials).view(weight_shape)


def _tables(layout: Layout) -> list[Tensor]:
    return [table.contiguous() for table in layout]
