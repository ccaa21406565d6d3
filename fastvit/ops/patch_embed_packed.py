"""Packed images of any sizes to tokens: :func:`fastvit.ops.patch_embed` for :class:`fastvit.PackedImages`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit import reference
from fastvit.ops import backends, checks, onednn
from fastvit.ops.library import cast_for_autocast, launchers, needs_grad, none_if_empty, or_empty, register
from fastvit.ops.patch_embed import constants, stream_dtype
from fastvit.packing import Layout, PackedImages


def patch_embed_packed(
    packed: PackedImages,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Embed every patch of n packed images in one launch, each image's after prefix tokens of its own.

    Args:
        packed: the images, N patches in all, of the weight's channels and patch size.
        weight: (D, C, p, q), the convolution's own parameter.
        bias: (D,) or None.
        pos_embed: (N, D), a row for each patch. (What positions the prefix tokens have is added to them before.)
        prefix_tokens: (1, P, D), put before the patches of every image.
        mean, std, out_dtype: as in :func:`fastvit.ops.patch_embed`.

    Returns:
        (1, N + n * P, D): where each image's tokens are, ``packed.sequences(P)`` says.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        BackendUnavailable: the backend that is set can't run this.
    """
    name = "patch_embed_packed"
    if not isinstance(packed, PackedImages):
        raise ValueError(f"ops.{name}: packed is a {type(packed).__name__}; fastvit.pack makes what is expected")
    expected = (packed.channels, *packed.patch_size)
    if weight.ndim != 4 or tuple(weight.shape[1:]) != expected:
        c, p, q = expected
        raise ValueError(
            f"ops.{name}: weight has shape {tuple(weight.shape)}, expected (D, {c}, {p}, {q}): "
            f"the images were packed for {c} channels and patches of {p}x{q}"
        )
    width, patches = weight.shape[0], packed.layout.image.shape[0]
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    if packed.pixels.dtype != torch.uint8:
        checks.floating(name, pixels=packed.pixels)
    checks.floating(name, weight=weight, bias=bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens)
    checks.shape(name, "bias", bias, (width,))
    checks.shape(name, "pos_embed", pos_embed, (patches, width))
    checks.shape(name, "prefix_tokens", prefix_tokens, (1, prefix, width))
    mean, std = (constants(name, what, t, packed.channels, packed.device) for what, t in (("mean", mean), ("std", std)))
    checks.same_device(name, packed.pixels, weight=weight, bias=bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens)
    grad = needs_grad(packed.pixels, weight, bias, pos_embed, prefix_tokens)
    chosen = backends.choose(
        "patch_embed",
        packed.pixels if packed.pixels.dtype != torch.uint8 else weight,
        needs_grad=grad,
        weights=(weight,),
    )
    out_dtype = out_dtype or stream_dtype(packed.pixels, pos_embed, prefix_tokens)
    if chosen in backends.KERNELS:
        (weight,) = cast_for_autocast(packed.pixels, weight)
        return _patch_embed_packed(
            packed.pixels, list(packed.layout), weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype, chosen
        )
    if chosen == "onednn":
        weight, out_dtype = weight.to(onednn.product_dtype(weight.dtype)), out_dtype or weight.dtype
    return reference.patch_embed_packed(
        packed,
        weight,
        bias,
        pos_embed=pos_embed,
        prefix_tokens=prefix_tokens,
        mean=mean,
        std=std,
        out_dtype=out_dtype,
    )


def _forward(
    pixels: Tensor,
    layout: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    out_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    return launchers(backend).patch_embed_packed_forward(
        pixels,
        weight.contiguous(),
        bias,
        Layout(*layout),
        pos_embed=pos_embed,
        prefix_tokens=prefix_tokens,
        mean=mean,
        std=std,
        out_dtype=out_dtype,
    )


def _fake(pixels, layout, weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype, backend):
    starts, _, _, image, *_ = layout
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    return weight.new_empty((1, image.shape[0] + starts.shape[0] * prefix, weight.shape[0]), dtype=out_dtype)


def _backward(
    dout: Tensor,
    pixels: Tensor | None,
    size: int,
    pixel_dtype: torch.dtype,
    layout: list[Tensor],
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    needs_pixels, needs_weight = needs
    dout, places = dout.to(weight.dtype).contiguous(), Layout(*layout)
    dpixels = dweight = None
    if needs_pixels:
        dpixels = _pixel_gradient(dout, weight, places, std, size, pixel_dtype)
    if needs_weight:
        dweight = launchers(backend).patch_embed_packed_weight_gradient(
            dout, pixels, weight.shape, places, mean=mean, std=std
        )
        dweight = dweight.to(weight.dtype)
    return or_empty(dpixels, dout), or_empty(dweight, dout)


def _pixel_gradient(
    dout: Tensor, weight: Tensor, layout: Layout, std: Tensor | None, size: int, dtype: torch.dtype
) -> Tensor:
    """The formula in PyTorch: who asks for it explains a model, and is in no hurry. Every pixel is in one patch."""
    dpatches = (dout @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    if std is not None:
        dpatches = dpatches / std.view(-1, 1, 1)
    gradient = torch.empty(size, dtype=dtype, device=dout.device)
    gradient[layout.pixels(weight.shape[1], (weight.shape[2], weight.shape[3]))] = dpatches.to(dtype)
    return gradient


def _backward_fake(dout, pixels, size, pixel_dtype, layout, weight, mean, std, needs, backend):
    needs_pixels, needs_weight = needs
    return (
        weight.new_empty(size if needs_pixels else 0, dtype=pixel_dtype if needs_pixels else None),
        weight.new_empty(weight.shape if needs_weight else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pixels, layout, weight, bias, pos_embed, prefix_tokens, mean, std, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.size, ctx.pixel_dtype = pixels.shape[0], pixels.dtype
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, pos_embed, prefix_tokens)]
    ctx.prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    ctx.save_for_backward(pixels if weight.requires_grad else None, weight, mean, std, *layout)


def _gradient(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
    if dout is None:
        return (None, [None] * len(Layout._fields), *(None,) * 8)
    pixels, weight, mean, std, *layout = ctx.saved_tensors
    needs_pixels, _, needs_weight, needs_bias, needs_pos, needs_prefix, *_ = ctx.needs_input_grad
    places, rows = Layout(*layout), dout[0]
    bias_dtype, pos_dtype, prefix_dtype = ctx.dtypes
    dbias = dpos = dprefix = None
    if ctx.prefix:
        if needs_prefix:
            dprefix = rows[places.prefix_tokens(ctx.prefix)].sum(0, keepdim=True, dtype=torch.float32).to(prefix_dtype)
        rows = rows.index_select(0, places.patch_tokens(ctx.prefix))
    if needs_bias:
        dbias = rows.sum(0, dtype=torch.float32).to(bias_dtype)
    if needs_pos:
        dpos = rows.to(pos_dtype)
    dpixels, dweight = map(
        none_if_empty,
        _patch_embed_packed_backward(
            rows,
            pixels,
            ctx.size,
            ctx.pixel_dtype,
            layout,
            weight,
            mean,
            std,
            [needs_pixels, needs_weight],
            ctx.backend,
        ),
    )
    return dpixels, [None] * len(layout), dweight, dbias, dpos, dprefix, None, None, None, None


_patch_embed_packed_backward = register(
    "patch_embed_packed_backward(Tensor dout, Tensor? pixels, SymInt size, ScalarType pixel_dtype, Tensor[] layout, "
    "Tensor weight, Tensor? mean, Tensor? std, bool[] needs, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_patch_embed_packed = register(
    "patch_embed_packed(Tensor pixels, Tensor[] layout, Tensor weight, Tensor? bias, Tensor? pos_embed, "
    "Tensor? prefix_tokens, Tensor? mean, Tensor? std, ScalarType? out_dtype, str backend) -> Tensor",
    _forward,
    _fake,
    backward=_gradient,
    setup_context=_setup_context,
)
