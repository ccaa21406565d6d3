"""Linear layers with what surrounds them in a Vision Transformer fused in."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvit import activations, reference
from fastvit.cuda.linear import linear_normed_forward
from fastvit.ops import backends, checks, onednn
from fastvit.ops.library import (
    as_rows,
    autocast_dtype,
    cast_for_autocast,
    cast_gradients,
    dense,
    launchers,
    needs_grad,
    none_if_empty,
    or_empty,
    register,
)
from fastvit.reference import Norm


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
    """Compute act(LN(x) W^T + b), or residual + row_scale * gamma * act(LN(x) W^T + b).

    Args:
        x: (..., K) in the weight's dtype; with a norm it may be float32 beside 16-bit weights.
        weight: (N, K). bias: (N,) or None, may be float32.
        norm: (weight (K,), bias (K,) or None, eps) of a LayerNorm before the product, or None.
        activation: None, or a name in :data:`fastvit.activations.ACTIVATIONS`: "gelu" (erf), "relu", "silu", ...
        residual: (..., N); may be float32, and the result then is.
        gamma: (N,) LayerScale (Touvron et al., 2021).
        row_scale: (B,) float32 with B = x.shape[0], drop-path, or one for each row; it gets no gradient.

    Returns:
        (..., N) in the residual's dtype, or without one in the weight's.

    Raises:
        ValueError: a shape, dtype, device or activation that does not fit.
        BackendUnavailable: the backend that is set can't run this.
    """
    norm_weight, norm_bias, eps = check("linear", x, weight, bias, norm, residual, gamma, row_scale)
    activations.check(activation, where="ops.linear: ")
    grad = needs_grad(x, weight, bias, norm_weight, norm_bias, residual, gamma)
    chosen = backends.choose("linear", x, needs_grad=grad, weights=(weight,))
    if chosen not in backends.KERNELS:
        run = onednn.linear if chosen == "onednn" else reference.linear
        merged = {"residual": residual, "gamma": gamma, "row_scale": row_scale}
        return run(x, weight, bias, norm=norm, activation=activation, **merged)
    x, weight = operands("linear", x, weight, normed=norm is not None)
    inputs = x, weight, bias, norm_weight, norm_bias, eps, activation
    if activation is not None and residual is not None:  # no model has both: merged in a second step
        y, _, _, _ = _linear(*inputs, None, None, None, grad, chosen)
        return reference.merge(y, residual, gamma, row_scale)
    out, _, _, _ = _linear(*inputs, residual, gamma, row_scale, grad, chosen)
    return out


def check(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, float | None]:
    """Check the arguments of a linear layer; return the norm's weight, bias and eps, None each without a norm."""
    checks.floating(op, x=x, weight=weight, bias=bias, residual=residual, gamma=gamma)
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"ops.{op}: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; expected (..., K) and (N, K)"
        )
    if norm is not None and (not isinstance(norm, tuple) or len(norm) != 3):
        raise ValueError(f"ops.{op}: norm must be (weight, bias, eps), got {norm!r}")
    norm_weight, norm_bias, eps = norm or (None, None, None)
    checks.shape(op, "bias", bias, (weight.shape[0],))
    checks.shape(op, "norm weight", norm_weight, (x.shape[-1],))
    checks.shape(op, "norm bias", norm_bias, (x.shape[-1],))
    checks.merging(op, x.shape[:-1], weight.shape[0], residual, gamma, row_scale)
    parameters = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    checks.same_device(op, x.device, **parameters, residual=residual, gamma=gamma, row_scale=row_scale)
    if norm is None and autocast_dtype(x.device) is None:
        checks.same_dtype(op, x=x, weight=weight)
    return norm_weight, norm_bias, eps


def operands(op: str, x: Tensor, *weights: Tensor, normed: bool) -> tuple[Any, ...]:
    """Return the product's operands in one dtype; a normed x keeps its own, the norm writes the weight's."""
    autocast = autocast_dtype(x.device)
    weights = cast_for_autocast(autocast, *weights)
    if not normed:
        (x,) = cast_for_autocast(autocast, x)
    if weights[0].dtype not in backends.KERNEL_DTYPES:
        raise ValueError(f"ops.{op}: weight dtype {weights[0].dtype} is not supported by the kernels")
    return x, *weights


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = launchers(backend)
    weight, bias, gamma, row_scale = dense(weight, bias, gamma, row_scale)
    rows, mean, rstd, preact = as_rows(x), None, None, None
    if backend == "cuda" and eps is not None and not save and residual is None:  # may fold the norm into the product
        norm = norm_weight, norm_bias, eps
        out, mean, rstd = linear_normed_forward(rows, norm, weight, bias, activation=activation)
    else:
        if eps is not None:
            rows, _, mean, rstd = kernels.layer_norm_forward(rows, norm_weight, norm_bias, eps, out_dtype=weight.dtype)
        out, preact = kernels.linear_forward(
            rows, weight, bias, activation=activation, save_preact=save and activation is not None,
            residual=None if residual is None else as_rows(residual), gamma=gamma, row_scale=row_scale,
        )  # fmt: skip
    return out.view(*x.shape[:-1], out.shape[-1]), or_empty(mean, out), or_empty(rstd, out), or_empty(preact, out)


def saved_fake(a: Any, weight: Tensor, save: bool) -> tuple[Tensor, ...]:
    """Return fake (mean, rstd, preact): statistics where there is a norm, the pre-activation where it is saved."""
    rows = math.prod(a.x.shape[:-1])
    statistics = (a.x.new_empty(0 if a.eps is None else rows, dtype=torch.float32) for _ in range(2))
    return *statistics, weight.new_empty((rows, weight.shape[0]) if save else 0)


def _fake(a: Any) -> tuple[Tensor, ...]:
    out = (a.weight if a.residual is None else a.residual).new_empty((*a.x.shape[:-1], a.weight.shape[0]))
    return out, *saved_fake(a, a.weight, a.save and a.activation is not None)


def _backward(a: Any) -> tuple[Tensor, ...]:
    kernels = launchers(a.backend)
    needs_x, needs_weight = a.needs
    weight, bias, gamma, row_scale = dense(a.weight, a.bias, a.gamma, a.row_scale)
    dout = as_rows(a.dout)
    dx = dweight = dbias = dgamma = dnorm_weight = dnorm_bias = None
    if a.activation is not None:
        dout, _ = kernels.activation_gradient(dout, a.preact, a.activation)
    dout = kernels.scale_rows(dout, weight.dtype, row_scale)  # what both products read
    if needs_weight:
        dweight, dbias, dgamma = kernels.linear_weight_gradient(
            dout, normalised_rows(a, weight.dtype), weight=weight, bias=bias, gamma=gamma, need_bias=bias is not None
        )
    if needs_x:
        dx, _ = kernels.linear_input_gradient(dout, weight, gamma=gamma)
        if a.eps is not None:
            dx, dnorm_weight, dnorm_bias = norm_gradients(a, dx)
        dx = dx.view(a.x.shape)
    return tuple(or_empty(g, dout) for g in (dx, dweight, dbias, dnorm_weight, dnorm_bias, dgamma))


def normalised_rows(a: Any, dtype: torch.dtype) -> Tensor:
    """Compute LN(x) once more as rows in ``dtype``; return x's own rows where there is no norm."""
    rows = as_rows(a.x)
    if a.eps is None:
        return rows
    return launchers(a.backend).layer_norm_forward(rows, a.norm_weight, a.norm_bias, a.eps, out_dtype=dtype)[0]


def norm_gradients(
    a: Any, dnormed: Tensor, dstream: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (dx, dnorm_weight, dnorm_bias) from the gradient of LN(x), plus dstream where x also is the residual."""
    needs_params = a.norm_weight is not None or a.norm_bias is not None
    dx, _, dweight, dbias, _ = launchers(a.backend).layer_norm_backward(
        dnormed, dstream, as_rows(a.x), a.norm_weight, a.mean, a.rstd, need_params=needs_params
    )
    return dx, None if a.norm_weight is None else dweight, None if a.norm_bias is None else dbias


def _backward_fake(a: Any) -> tuple[Tensor, ...]:
    needs_x, needs_weight = a.needs
    return (
        a.x.new_empty(a.x.shape if needs_x else 0),
        *weight_fake(a.weight, a.bias, needs_weight),
        *norm_fake(a, needs_x),
        vector_fake(a.x, a.weight.shape[0], needs_weight and a.gamma is not None),
    )


def weight_fake(weight: Tensor, bias: Tensor | None, needed: bool) -> tuple[Tensor, Tensor]:
    """Return fake gradients of a linear layer's weight and bias."""
    present = needed and bias is not None
    return weight.new_empty(weight.shape if needed else 0), vector_fake(weight, weight.shape[0], present)


def norm_fake(a: Any, needed: bool) -> tuple[Tensor, ...]:
    """Return fake gradients of the norm's weight and bias."""
    width = a.x.shape[-1]
    return tuple(vector_fake(a.x, width, needed and t is not None) for t in (a.norm_weight, a.norm_bias))


def vector_fake(x: Tensor, length: int, present: bool) -> Tensor:
    """Return a fake float32 gradient (length,), or (0,) where it is absent."""
    return x.new_empty(length if present else 0, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, norm_weight, norm_bias, eps, activation, residual, gamma, row_scale, _, ctx.backend = inputs
    _, mean, rstd, preact = output
    ctx.mark_non_differentiable(mean, rstd, preact)
    ctx.set_materialize_grads(False)
    ctx.eps, ctx.activation, ctx.merged = eps, activation, residual is not None
    ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, mean, rstd, preact, gamma, row_scale)


def _gradient(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 12
    x, weight, bias, norm_weight, norm_bias, mean, rstd, preact, gamma, row_scale = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needs = [needs[0] or needs[3] or needs[4], needs[1] or needs[2] or needs[8]]
    gradients = _linear_backward(
        dout, x, weight, bias, norm_weight, norm_bias, ctx.eps, mean, rstd, preact, ctx.activation, gamma, row_scale,
        needs, ctx.backend,
    )  # fmt: skip
    dx, dweight, dbias, dnorm_weight, dnorm_bias, dgamma = map(none_if_empty, gradients)
    dbias, dnorm_weight, dnorm_bias, dgamma = cast_gradients(
        (dbias, bias), (dnorm_weight, norm_weight), (dnorm_bias, norm_bias), (dgamma, gamma)
    )
    dresidual = dout if ctx.merged else None
    return dx, dweight, dbias, dnorm_weight, dnorm_bias, None, None, dresidual, dgamma, None, None, None


_linear_backward = register(
    "linear_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "float? eps, Tensor mean, Tensor rstd, Tensor preact, str? activation, Tensor? gamma, Tensor? row_scale, "
    "bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float? eps, "
    "str? activation, Tensor? residual, Tensor? gamma, Tensor? row_scale, bool save, str backend) "
    "-> (Tensor out, Tensor mean, Tensor rstd, Tensor preact)",
    _forward,
    _fake,
    backward=_gradient,
    setup_context=_setup_context,
)
