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
from fastvit.ops.library import (
    autocast_dtype,
    cast_for_autocast,
    launchers,
    needs_grad,
    none_if_empty,
    or_empty,
    register,
)
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
    if height % p or right % q or height < 1 or right < 1:
        fault = "are empty" if height < 1 or right < 1 else f"are not divisible by the patch of {p}x{q}"
        raise ValueError(f"ops.patch_embed: images of {height}x{right} {fault}")
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    tokens = (height // p) * (right // q)
    positions = ((1, tokens, width), (1, prefix + tokens, width))
    rows = {"bias": bias, "pos_embed": pos_embed, "prefix_tokens": prefix_tokens}
    constants = _check("patch_embed", images.dtype, images.device, weight, positions, rows, mean, std)
    grad = needs_grad(images, weight, *rows.values())
    x = weight if images.dtype == torch.uint8 else images
    chosen = backends.choose("patch_embed", x, needs_grad=grad, weights=(weight,))
    weight, out_dtype = _dtypes(chosen, images.device, weight, pos_embed, prefix_tokens, out_dtype)
    if chosen in backends.KERNELS:
        return _patch_embed(images, [], weight, *rows.values(), *constants.values(), out_dtype, chosen)
    return reference.patch_embed(images, weight, **rows, **constants, out_dtype=out_dtype)


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
        (1, N + n * P, D), the tokens of each image at its place in ``packed.sequences(P)``.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        BackendUnavailable: the backend that is set can't run this.
    """
    name = "patch_embed_packed"
    if not isinstance(packed, PackedImages):
        raise ValueError(f"ops.{name}: packed is a {type(packed).__name__}; fastvit.pack makes PackedImages")
    expected = (packed.channels, *packed.patch_size)
    if weight.ndim != 4 or tuple(weight.shape[1:]) != expected:
        c, p, q = expected
        raise ValueError(
            f"ops.{name}: weight has shape {tuple(weight.shape)}, expected (D, {c}, {p}, {q}): "
            f"the images were packed for {c} channels and patches of {p}x{q}"
        )
    pixels, positions = packed.pixels, ((packed.layout.image.shape[0], weight.shape[0]),)
    rows = {"bias": bias, "pos_embed": pos_embed, "prefix_tokens": prefix_tokens}
    constants = _check(name, pixels.dtype, pixels.device, weight, positions, rows, mean, std)
    grad = needs_grad(pixels, weight, *rows.values())
    x = weight if pixels.dtype == torch.uint8 else pixels
    chosen = backends.choose("patch_embed", x, needs_grad=grad, weights=(weight,))
    weight, out_dtype = _dtypes(chosen, pixels.device, weight, pos_embed, prefix_tokens, out_dtype)
    if chosen in backends.KERNELS:
        layout = list(packed.layout)
        return _patch_embed(pixels, layout, weight, *rows.values(), *constants.values(), out_dtype, chosen)
    return reference.patch_embed_packed(packed, weight, **rows, **constants, out_dtype=out_dtype)


def _check(
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    weight: Tensor,
    positions: tuple[tuple[int, ...], ...],
    rows: dict[str, Tensor | None],
    mean: Tensor | Sequence[float] | None,
    std: Tensor | Sequence[float] | None,
) -> dict[str, Tensor | None]:
    """Check what goes with images of ``dtype`` on ``device``; return mean and std as float32 tensors (C,) there.

    Args:
        positions: the shapes that pos_embed may have.
        rows: bias, pos_embed and prefix_tokens.
    """
    width, channels = weight.shape[:2]
    prefix_tokens, pos_embed = rows["prefix_tokens"], rows["pos_embed"]
    if dtype != torch.uint8 and not dtype.is_floating_point:
        raise ValueError(f"ops.{op}: images have dtype {dtype}; accepted: uint8, float32, float16, bfloat16 or float64")
    checks.floating(op, weight=weight, **rows)
    checks.shape(op, "bias", rows["bias"], (width,))
    checks.shape(op, "prefix_tokens", prefix_tokens, (1, 0 if prefix_tokens is None else prefix_tokens.shape[1], width))
    if pos_embed is not None and tuple(pos_embed.shape) not in positions:
        expected = " or ".join(map(str, positions))
        raise ValueError(f"ops.{op}: pos_embed has shape {tuple(pos_embed.shape)}, expected {expected}")
    checks.same_device(op, device, weight=weight, **rows)
    constants = {}
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and not isinstance(values, Tensor):
            values = _on_device(tuple(float(v) for v in values), device)
        checks.shape(op, name, values, (channels,))
        checks.same_device(op, device, **{name: values})
        constants[name] = None if values is None else values.float().contiguous()
    return constants


def _dtypes(
    backend: str,
    device: torch.device,
    weight: Tensor,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, torch.dtype | None]:
    """Return the weight in the product's dtype, and the result's dtype (None: the weight's)."""
    autocast = autocast_dtype(device)
    if autocast is not None and out_dtype is None:
        out_dtype = autocast
        for row in (pos_embed, prefix_tokens):
            out_dtype = out_dtype if row is None else torch.promote_types(out_dtype, row.dtype)
    if backend in backends.KERNELS:
        (weight,) = cast_for_autocast(autocast, weight)
    elif backend == "onednn":
        weight, out_dtype = weight.to(onednn.product_dtype(weight.dtype)), out_dtype or weight.dtype
    return weight, out_dtype


@cache
def _copied(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False), unset_fake_temporarily():  # it outlives the mode of its first use
        return torch.tensor(values, dtype=torch.float32, device=device)


def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():  # made where it is used: a graph that holds a copy from the CPU can't be replayed
        return torch.cat([torch.full((1,), value, dtype=torch.float32, device=device) for value in values])
    return _copied(values, device)


def _forward(
    images: Tensor,
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
    return launchers(backend).patch_embed_forward(
        images, weight, bias, layout=Layout(*layout) if layout else None,
        pos_embed=pos_embed, prefix_tokens=prefix_tokens, mean=mean, std=std, out_dtype=out_dtype,
    )  # fmt: skip


def _fake(a: Any) -> Tensor:
    prefix = 0 if a.prefix_tokens is None else a.prefix_tokens.shape[1]
    if a.layout:
        layout = Layout(*a.layout)
        batch, tokens = 1, layout.image.shape[0] + layout.starts.shape[0] * prefix
    else:
        batch, _, height, right = a.images.shape
        tokens = prefix + (height // a.weight.shape[2]) * (right // a.weight.shape[3])
    return a.weight.new_empty((batch, tokens, a.weight.shape[0]), dtype=a.out_dtype)


def _backward(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    kernels = launchers(a.backend)
    needs_images, needs_weight, needs_rows = a.needs
    dimages = dweight = drows = None
    layout = Layout(*a.layout) if a.layout else None
    dout = a.dout.contiguous()
    if needs_rows:
        drows = kernels.patch_embed_row_gradients(dout)
    dout = dout.to(a.weight.dtype)  # for the products
    if layout is not None:
        dout = dout[0]
    if needs_images and layout is not None:
        dimages = _pixel_gradient(dout, a.weight, layout, a.std, a.image_shape, a.image_dtype)
    elif needs_images:
        dimages = kernels.patch_embed_image_gradient(
            dout, a.weight, tuple(a.image_shape), std=a.std, prefix=a.prefix, dtype=a.image_dtype
        )
    if needs_weight:
        dweight = kernels.patch_embed_weight_gradient(
            dout, a.images, a.weight.shape, layout=layout, mean=a.mean, std=a.std, prefix=a.prefix
        )
        dweight = dweight.to(a.weight.dtype)
    return or_empty(dimages, dout), or_empty(dweight, dout), or_empty(drows, dout)


def _pixel_gradient(
    dout: Tensor, weight: Tensor, layout: Layout, std: Tensor | None, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Compute the formula in PyTorch: only explanations of a model need it. Every pixel is in one patch."""
    dpatches = (dout @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    if std is not None:
        dpatches = dpatches / std.view(-1, 1, 1)
    gradient = torch.empty(shape, dtype=dtype, device=dout.device)
    gradient[layout.pixels(weight.shape[1], (weight.shape[2], weight.shape[3]))] = dpatches.to(dtype)
    return gradient


def _backward_fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_images, needs_weight, needs_rows = a.needs
    return (
        a.weight.new_empty(a.image_shape if needs_images else 0, dtype=a.image_dtype if needs_images else None),
        a.weight.new_empty(a.weight.shape if needs_weight else 0),
        a.weight.new_empty(a.dout.shape[1:] if needs_rows else 0, dtype=torch.float32 if needs_rows else None),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, layout, weight, *rows, mean, std, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.image_shape, ctx.image_dtype = images.shape, images.dtype
    ctx.dtypes = [None if t is None else t.dtype for t in rows]
    _, pos_embed, prefix_tokens = rows
    ctx.prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    ctx.positions = 0 if pos_embed is None else pos_embed.shape[1]
    ctx.save_for_backward(images if weight.requires_grad else None, weight, mean, std, *layout)


def _gradient(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
    images, weight, mean, std, *layout = ctx.saved_tensors
    if dout is None:
        return (None, [None] * len(layout), *(None,) * 8)
    needs_images, _, needs_weight, *needs_rows = ctx.needs_input_grad[:6]
    bias_dtype, pos_dtype, prefix_dtype = ctx.dtypes
    prefix, dbias, dpos, dprefix = ctx.prefix, None, None, None
    if layout:
        if prefix:
            if needs_rows[2]:
                rows = dout[0, Layout(*layout).prefix_tokens(prefix)]
                dprefix = rows.sum(0, keepdim=True, dtype=torch.float32).to(prefix_dtype)
            dout, prefix = dout.index_select(1, Layout(*layout).patch_tokens(prefix)), 0
        if needs_rows[0]:
            dbias = dout[0].sum(0, dtype=torch.float32).to(bias_dtype)
        if needs_rows[1]:
            dpos = dout[0].to(pos_dtype)
    needs = [needs_images, needs_weight, not layout and any(needs_rows)]
    gradients = _patch_embed_backward(
        dout, images, ctx.image_shape, ctx.image_dtype, layout, weight, mean, std, prefix, needs, ctx.backend
    )
    dimages, dweight, drows = map(none_if_empty, gradients)
    if drows is not None:  # (P + N, D) float32, summed over the batch
        if bias_dtype is not None:
            dbias = drows[prefix:].sum(0).to(bias_dtype)
        if pos_dtype is not None:
            dpos = drows[drows.shape[0] - ctx.positions :].to(pos_dtype).unsqueeze(0)
        if prefix_dtype is not None:
            dprefix = drows[:prefix].to(prefix_dtype).unsqueeze(0)
    return dimages, [None] * len(layout), dweight, dbias, dpos, dprefix, None, None, None, None


_patch_embed_backward = register(
    "patch_embed_backward(Tensor dout, Tensor? images, SymInt[] image_shape, ScalarType image_dtype, Tensor[] layout, "
    "Tensor weight, Tensor? mean, Tensor? std, SymInt prefix, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_patch_embed = register(
    # layout: the tables of packed images, whose pixels are (S,); none for images (B, C, H, W)
    "patch_embed(Tensor images, Tensor[] layout, Tensor weight, Tensor? bias, Tensor? pos_embed, "
    "Tensor? prefix_tokens, Tensor? mean, Tensor? std, ScalarType? out_dtype, str backend) -> Tensor",
    _forward,
    _fake,
    backward=_gradient,
    setup_context=_setup_context,
)
