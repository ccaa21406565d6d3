"""Images to tokens: the strided convolution, position embeddings and prefix tokens."""

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
    if images.dtype != torch.uint8:
        checks.floating("patch_embed", images=images)
    checks.floating("patch_embed", weight=weight, bias=bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens)
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    tokens = (height // p) * (right // q)
    checks.shape("patch_embed", "bias", bias, (width,))
    checks.shape("patch_embed", "prefix_tokens", prefix_tokens, (1, prefix, width))
    if pos_embed is not None and tuple(pos_embed.shape) not in ((1, tokens, width), (1, prefix + tokens, width)):
        raise ValueError(
            f"ops.patch_embed: pos_embed has shape {tuple(pos_embed.shape)}, expected (1, {tokens}, {width}) "
            f"or (1, {prefix + tokens}, {width})"
        )
    mean, std = (
        constants("patch_embed", name, t, channels, images.device) for name, t in (("mean", mean), ("std", std))
    )
    checks.same_device(
        "patch_embed", images, weight=weight, bias=bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens
    )
    grad = needs_grad(images, weight, bias, pos_embed, prefix_tokens)
    chosen = backends.choose(
        "patch_embed", images if images.dtype != torch.uint8 else weight, needs_grad=grad, weights=(weight,)
    )
    out_dtype = out_dtype or stream_dtype(images, pos_embed, prefix_tokens)
    if chosen in backends.KERNELS:
        (weight,) = cast_for_autocast(images, weight)
        return _patch_embed(images, weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype, chosen)
    if chosen == "onednn":
        weight, out_dtype = weight.to(onednn.product_dtype(weight.dtype)), out_dtype or weight.dtype
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


def _forward(
    images: Tensor,
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
        pos_embed=pos_embed,
        prefix_tokens=prefix_tokens,
        mean=mean,
        std=std,
        out_dtype=out_dtype,
    )


def _fake(images, weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype, backend):
    batch, _, height, right = images.shape
    tokens = (height // weight.shape[2]) * (right // weight.shape[3])
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    return weight.new_empty((batch, prefix + tokens, weight.shape[0]), dtype=out_dtype)


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
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[1], any(wanted[2:5])]
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
