"""Images to tokens: the strided convolution, position embeddings and prefix tokens, of a batch or of packed images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fastvit import reference
from fastvit.ops import backends, checks, onednn
from fastvit.ops.library import autocasting, cast_for_autocast, launchers, needs_grad, none_if_empty, or_empty, register
from fastvit.packing import Layout, PackedImages


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Cut images into patches and embed them (equation 1 of the ViT paper): tokens of shape (B, P + N, D).

    Args:
        images: (B, C, H, W) floating (any strides), or uint8 (B, C, H, W) or (B, H, W, C); uint8 counts as 0..1
            after division by 255. H and W are multiples of the patch.
        weight: (D, C, p, q), the convolution's own parameter.
        bias: (D,) or None. Bias, positions and prefix may be float32 beside 16-bit weights.
        pos_embed: (1, P + N, D), or (1, N, D), which leaves the prefix without; N = (H / p) (W / q).
        prefix_tokens: (1, P, D), the class and register tokens, put first.
        mean, std: C values in 0..1 units (a sequence, or float32 on the images' device): the image is
            (image - mean) / std, computed inside the kernel.
        out_dtype: of the result; by default the weight's, and under autocast the widest of the product, the positions
            and the prefix, so that a residual stream of float32 begins here.

    Returns:
        (B, P + N, D).

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        BackendUnavailable: the backend that is set can't run this.
    """
    if weight.ndim != 4:
        raise ValueError(f"ops.patch_embed: weight has shape {tuple(weight.shape)}, expected (D, C, p, q)")
    width, channels, p, q = weight.shape
    if images.ndim != 4:
        raise ValueError(f"ops.patch_embed: images have shape {tuple(images.shape)}, expected four dimensions")
    if images.dtype == torch.uint8 and images.shape[1] != channels and images.shape[3] == channels:
        images = images.permute(0, 3, 1, 2)
    if images.shape[1] != channels:
        raise ValueError(f"ops.patch_embed: images {tuple(images.shape)} don't have the weight's {channels} channels")
    height, right = images.shape[2:]
    if height % p or right % q:
        raise ValueError(f"ops.patch_embed: images of {height}x{right} are not divisible by the patch of {p}x{q}")
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    tokens = (height // p) * (right // q)
    positions = ((1, tokens, width), (1, prefix + tokens, width))
    weight, mean, std, out_dtype, chosen = _prepare(
        "patch_embed", images, weight, bias, pos_embed, positions, prefix_tokens, mean, std, out_dtype
    )
    if chosen in backends.KERNELS:
        return _patch_embed(images, weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype, chosen)
    return reference.patch_embed(
        images,
        weight,
        bias,
        pos_embed=pos_embed,
        prefix_tokens=prefix_tokens,
        mean=mean,
        std=std,
        out_dtype=out_dtype,
    )


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
    positions = ((packed.layout.image.shape[0], weight.shape[0]),)
    weight, mean, std, out_dtype, chosen = _prepare(
        name, packed.pixels, weight, bias, pos_embed, positions, prefix_tokens, mean, std, out_dtype
    )
    if chosen in backends.KERNELS:
        return _patch_embed_packed(
            packed.pixels, list(packed.layout), weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype, chosen
        )
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


def _prepare(
    op: str,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    positions: tuple[tuple[int, ...], ...],
    prefix_tokens: Tensor | None,
    mean: Tensor | Sequence[float] | None,
    std: Tensor | Sequence[float] | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, torch.dtype | None, str]:
    """Check what plain and packed images have in common: pos_embed has one of the shapes ``positions``.

    Returns:
        the weight in the dtype of the product, mean, std, the result's dtype (None: the weight's) and the backend.
    """
    width, channels = weight.shape[:2]
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    rows = {"bias": bias, "pos_embed": pos_embed, "prefix_tokens": prefix_tokens}
    if images.dtype != torch.uint8:
        checks.floating(op, images=images)
    checks.floating(op, weight=weight, **rows)
    checks.shape(op, "bias", bias, (width,))
    checks.shape(op, "prefix_tokens", prefix_tokens, (1, prefix, width))
    if pos_embed is not None and tuple(pos_embed.shape) not in positions:
        expected = " or ".join(map(str, positions))
        raise ValueError(f"ops.{op}: pos_embed has shape {tuple(pos_embed.shape)}, expected {expected}")
    mean, std = (constants(op, name, t, channels, images.device) for name, t in (("mean", mean), ("std", std)))
    checks.same_device(op, images, weight=weight, **rows)
    chosen = backends.choose(
        "patch_embed",
        images if images.dtype != torch.uint8 else weight,
        needs_grad=needs_grad(images, weight, *rows.values()),
        weights=(weight,),
    )
    out_dtype = out_dtype or stream_dtype(images, pos_embed, prefix_tokens)
    if chosen in backends.KERNELS:
        (weight,) = cast_for_autocast(images, weight)
    elif chosen == "onednn":
        weight, out_dtype = weight.to(onednn.product_dtype(weight.dtype)), out_dtype or weight.dtype
    return weight, mean, std, out_dtype, chosen


def stream_dtype(images: Tensor, *rows: Tensor | None) -> torch.dtype | None:
    """The result's dtype where nothing says otherwise: the weight's (None), or under autocast the widest's."""
    if not autocasting(images):
        return None
    dtype = torch.get_autocast_dtype(images.device.type)
    for row in rows:
        dtype = dtype if row is None else torch.promote_types(dtype, row.dtype)
    return dtype


@cache
def _copied(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False), unset_fake_temporarily():  # it outlives the mode of its first use
        return torch.tensor(values, dtype=torch.float32, device=device)


def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():  # made where it is used: a graph that holds a copy from the CPU can't be replayed
        return torch.cat([torch.full((1,), value, dtype=torch.float32, device=device) for value in values])
    return _copied(values, device)


def constants(
    op: str, name: str, values: Tensor | Sequence[float] | None, channels: int, device: torch.device
) -> Tensor | None:
    """mean or std as a float32 tensor (C,) on ``device``; sequences are copied there once per process."""
    if values is None:
        return None
    if not isinstance(values, Tensor):
        values = _on_device(tuple(float(v) for v in values), device)
    checks.shape(op, name, values, (channels,))
    if values.device != device:
        raise ValueError(f"ops.{op}: {name} is on {values.device}, the images are on {device}")
    return values.float().contiguous()


def _run(
    images: Tensor,
    layout: Layout | None,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    out_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    return launchers(backend).patch_embed_forward(
        images,
        weight.contiguous(),
        bias,
        layout=layout,
        pos_embed=pos_embed,
        prefix_tokens=prefix_tokens,
        mean=mean,
        std=std,
        out_dtype=out_dtype,
    )


def _forward(images: Tensor, *rest: Any) -> Tensor:
    return _run(images, None, *rest)


def _forward_packed(pixels: Tensor, layout: list[Tensor], *rest: Any) -> Tensor:
    return _run(pixels, Layout(*layout), *rest)


def _fake(images, weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype, backend):
    batch, _, height, right = images.shape
    tokens = (height // weight.shape[2]) * (right // weight.shape[3])
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    return weight.new_empty((batch, prefix + tokens, weight.shape[0]), dtype=out_dtype)


def _fake_packed(pixels, layout, weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype, backend):
    starts, _, _, image, *_ = layout
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    return weight.new_empty((1, image.shape[0] + starts.shape[0] * prefix, weight.shape[0]), dtype=out_dtype)


def _backward(
    dout: Tensor,
    images: Tensor | None,
    image_shape: list[int],
    image_dtype: torch.dtype,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    prefix: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = launchers(backend)
    needs_images, needs_weight, needs_rows = needs
    dout, weight = dout.contiguous(), weight.contiguous()
    dimages = dweight = drows = None
    if needs_rows:
        drows = kernels.patch_embed_row_gradients(dout)
    dout = dout.to(weight.dtype)  # for the products
    if needs_images:
        dimages = kernels.patch_embed_image_gradient(
            dout, weight, tuple(image_shape), std=std, prefix=prefix, dtype=image_dtype
        )
    if needs_weight:
        assert images is not None
        dweight = kernels.patch_embed_weight_gradient(dout, images, weight.shape, mean=mean, std=std, prefix=prefix)
        dweight = dweight.to(weight.dtype)
    return or_empty(dimages, dout), or_empty(dweight, dout), or_empty(drows, dout)


def _backward_fake(dout, images, image_shape, image_dtype, weight, mean, std, prefix, needs, backend):
    needs_images, needs_weight, needs_rows = needs
    return (
        weight.new_empty(image_shape if needs_images else 0, dtype=image_dtype if needs_images else None),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(dout.shape[1:] if needs_rows else 0, dtype=torch.float32 if needs_rows else None),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, bias, pos_embed, prefix_tokens, mean, std, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.image_shape, ctx.image_dtype = images.shape, images.dtype
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, pos_embed, prefix_tokens)]
    ctx.prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    ctx.positions = 0 if pos_embed is None else pos_embed.shape[1]
    ctx.save_for_backward(images if weight.requires_grad else None, weight, mean, std)


def _gradient(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    images, weight, mean, std = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:2], any(ctx.needs_input_grad[2:5])]
    dimages, dweight, drows = map(
        none_if_empty,
        _patch_embed_backward(
            dout, images, ctx.image_shape, ctx.image_dtype, weight, mean, std, ctx.prefix, needs, ctx.backend
        ),
    )
    dbias = dpos = dprefix = None
    if drows is not None:  # (P + N, D) float32, summed over the batch
        bias_dtype, pos_dtype, prefix_dtype = ctx.dtypes
        if bias_dtype is not None:
            dbias = drows[ctx.prefix :].sum(0).to(bias_dtype)
        if pos_dtype is not None:
            dpos = drows[drows.shape[0] - ctx.positions :].to(pos_dtype).unsqueeze(0)
        if prefix_dtype is not None:
            dprefix = drows[: ctx.prefix].to(prefix_dtype).unsqueeze(0)
    return dimages, dweight, dbias, dpos, dprefix, None, None, None, None


def _backward_packed(
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
        assert pixels is not None
        dweight = launchers(backend).patch_embed_weight_gradient(
            dout, pixels, weight.shape, layout=places, mean=mean, std=std
        )
        dweight = dweight.to(weight.dtype)
    return or_empty(dpixels, dout), or_empty(dweight, dout)


def _pixel_gradient(
    dout: Tensor, weight: Tensor, layout: Layout, std: Tensor | None, size: int, dtype: torch.dtype
) -> Tensor:
    """Compute the formula in PyTorch: only explanations of a model need it. Every pixel is in one patch."""
    dpatches = (dout @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    if std is not None:
        dpatches = dpatches / std.view(-1, 1, 1)
    gradient = torch.empty(size, dtype=dtype, device=dout.device)
    gradient[layout.pixels(weight.shape[1], (weight.shape[2], weight.shape[3]))] = dpatches.to(dtype)
    return gradient


def _backward_fake_packed(dout, pixels, size, pixel_dtype, layout, weight, mean, std, needs, backend):
    needs_pixels, needs_weight = needs
    return (
        weight.new_empty(size if needs_pixels else 0, dtype=pixel_dtype if needs_pixels else None),
        weight.new_empty(weight.shape if needs_weight else 0),
    )


def _setup_context_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pixels, layout, weight, bias, pos_embed, prefix_tokens, mean, std, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.size, ctx.pixel_dtype = pixels.shape[0], pixels.dtype
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, pos_embed, prefix_tokens)]
    ctx.prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    ctx.save_for_backward(pixels if weight.requires_grad else None, weight, mean, std, *layout)


def _gradient_packed(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
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


_patch_embed_backward = register(
    "patch_embed_backward(Tensor dout, Tensor? images, SymInt[] image_shape, ScalarType image_dtype, Tensor weight, "
    "Tensor? mean, Tensor? std, SymInt prefix, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_patch_embed = register(
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix_tokens, Tensor? mean, "
    "Tensor? std, ScalarType? out_dtype, str backend) -> Tensor",
    _forward,
    _fake,
    backward=_gradient,
    setup_context=_setup_context,
)
_patch_embed_packed_backward = register(
    "patch_embed_packed_backward(Tensor dout, Tensor? pixels, SymInt size, ScalarType pixel_dtype, Tensor[] layout, "
    "Tensor weight, Tensor? mean, Tensor? std, bool[] needs, str backend) -> (Tensor, Tensor)",
    _backward_packed,
    _backward_fake_packed,
)
_patch_embed_packed = register(
    "patch_embed_packed(Tensor pixels, Tensor[] layout, Tensor weight, Tensor? bias, Tensor? pos_embed, "
    "Tensor? prefix_tokens, Tensor? mean, Tensor? std, ScalarType? out_dtype, str backend) -> Tensor",
    _forward_packed,
    _fake_packed,
    backward=_gradient_packed,
    setup_context=_setup_context_packed,
)
