"""LayerNorm, with the residual add before it fused in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit import reference
from fastvit.ops import backends, checks
from fastvit.ops.library import (
    as_rows,
    autocast_dtype,
    cast_gradients,
    launchers,
    needs_grad,
    none_if_empty,
    or_empty,
    register,
)


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
    """Apply LayerNorm over the last dimension (Ba et al., 2016), statistics in float32.

    Args:
        x: (..., D) floating. The kernels take float32, float16 and bfloat16; rows that are not contiguous are copied.
        weight, bias: (D,), each or both None; may be float32 beside a 16-bit x.
        eps: added to the variance.
        residual: (..., D); may be float32. Then s = residual + row_scale * gamma * x is normalised and returned too.
        gamma: (D,) LayerScale.
        row_scale: (B,) float32 with B = x.shape[0], drop-path, or one for each row; it gets no gradient.
        out_dtype: of the normalised result; by default x's, or the residual's.

    Returns:
        LN(x) (..., D), or (LN(s), s) with s in the residual's dtype with a residual.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        BackendUnavailable: the backend that is set can't run this.
    """
    checks.floating("layer_norm", x=x, weight=weight, bias=bias, residual=residual, gamma=gamma)
    if x.ndim == 0:
        raise ValueError("ops.layer_norm: x is a scalar; it needs at least one dimension")
    width = x.shape[-1]
    checks.shape("layer_norm", "weight", weight, (width,))
    checks.shape("layer_norm", "bias", bias, (width,))
    checks.merging("layer_norm", x.shape[:-1], width, residual, gamma, row_scale)
    merged = {"residual": residual, "gamma": gamma, "row_scale": row_scale}
    checks.same_device("layer_norm", x.device, weight=weight, bias=bias, **merged)
    chosen = backends.choose("layer_norm", x, needs_grad=needs_grad(x, weight, bias, residual, gamma))
    if chosen not in backends.KERNELS:
        return reference.layer_norm(x, weight, bias, eps, out_dtype=out_dtype, **merged)
    if out_dtype is None and autocast_dtype(x.device) is not None:
        out_dtype = torch.float32  # as autocast does for F.layer_norm
    y, stream, _, _ = _layer_norm(x, weight, bias, eps, residual, gamma, row_scale, out_dtype, chosen)
    return y if residual is None else (y, stream)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    out_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, stream, mean, rstd = launchers(backend).layer_norm_forward(
        as_rows(x), weight, bias, eps,
        residual=None if residual is None else as_rows(residual), gamma=gamma, row_scale=row_scale, out_dtype=out_dtype,
    )  # fmt: skip
    return y.view(x.shape), x.new_empty(0) if stream is None else stream.view(x.shape), mean, rstd


def _fake(a: Any) -> tuple[Tensor, ...]:
    normalised = a.x if a.residual is None else a.residual
    y = a.x.new_empty(a.x.shape, dtype=a.out_dtype or normalised.dtype)
    statistics = a.x.new_empty(a.x.numel() // a.x.shape[-1], dtype=torch.float32)
    stream = a.x.new_empty(0) if a.residual is None else a.residual.new_empty(a.x.shape)
    return y, stream, statistics, torch.empty_like(statistics)


def _backward(a: Any) -> tuple[Tensor, ...]:
    dx, dresidual, dweight, dbias, dgamma = launchers(a.backend).layer_norm_backward(
        as_rows(a.dy), None if a.dstream is None else as_rows(a.dstream), as_rows(a.normalised), a.weight, a.mean,
        a.rstd, branch=None if a.branch is None else as_rows(a.branch), gamma=a.gamma, row_scale=a.row_scale,
        need_params=a.needs_params,
    )  # fmt: skip
    shape = a.normalised.shape
    dresidual = None if dresidual is None else dresidual.view(shape)
    return dx.view(shape), *(or_empty(g, dx) for g in (dresidual, dweight, dbias, dgamma))


def _backward_fake(a: Any) -> tuple[Tensor, ...]:
    merged = a.branch is not None
    dx = (a.branch if merged else a.normalised).new_empty(a.normalised.shape)
    dresidual = torch.empty_like(a.normalised) if merged else dx.new_empty(0)

    def parameter(present: bool) -> Tensor:
        return dx.new_empty(0) if not present else dx.new_empty(dx.shape[-1], dtype=torch.float32)

    needs = a.needs_params
    return dx, dresidual, parameter(needs), parameter(needs), parameter(needs and merged and a.gamma is not None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, residual, gamma, row_scale, _, ctx.backend = inputs
    _, stream, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd, *([stream] if residual is None else []))
    ctx.set_materialize_grads(False)
    ctx.merged, ctx.branch_dtype = residual is not None, x.dtype
    branch = x if ctx.merged and gamma is not None else None
    ctx.save_for_backward(stream if ctx.merged else x, weight, bias, mean, rstd, branch, gamma, row_scale)


def _gradient(ctx: Any, dy: Tensor | None, dstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    normalised, weight, bias, mean, rstd, branch, gamma, row_scale = ctx.saved_tensors
    dy = torch.zeros_like(normalised) if dy is None else dy
    needs_params = any(ctx.needs_input_grad[i] for i in (1, 2, 5))
    gradients = _layer_norm_backward(
        dy, dstream, normalised, weight, mean, rstd, branch, gamma, row_scale, needs_params, ctx.backend
    )
    dx, dresidual, dweight, dbias, dgamma = map(none_if_empty, gradients)
    if ctx.merged and branch is None and dx is not None:
        dresidual = dx  # no LayerScale: the branch gets the stream's gradient, scaled by image
        if row_scale is not None:
            dx = dx * row_scale.view(-1, *[1] * (dx.ndim - 1))
        dx = dx.to(ctx.branch_dtype)
    dweight, dbias, dgamma = cast_gradients((dweight, weight), (dbias, bias), (dgamma, gamma))
    return dx, dweight, dbias, None, dresidual, dgamma, None, None, None


_layer_norm_backward = register(
    "layer_norm_backward(Tensor dy, Tensor? dstream, Tensor normalised, Tensor? weight, Tensor mean, Tensor rstd, "
    "Tensor? branch, Tensor? gamma, Tensor? row_scale, bool needs_params, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_layer_norm = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual, Tensor? gamma, "
    "Tensor? row_scale, ScalarType? out_dtype, str backend) -> (Tensor y, Tensor stream, Tensor mean, Tensor rstd)",
    _forward,
    _fake,
    backward=_gradient,
    setup_context=_setup_context,
)
