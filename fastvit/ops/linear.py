"""Linear layers with what surrounds them in a Vision Transformer fused in."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvit import activations, reference
from fastvit.ops import backends, checks, onednn
from fastvit.ops.library import (
    as_rows,
    autocasting,
    by_name,
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
    """act(LN(x) W^T + b), or residual + row_scale * gamma * act(LN(x) W^T + b).

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
    check("linear", x, weight, bias, norm, residual, gamma, row_scale)
    activations.check(activation, where="ops.linear: ")
    norm_weight, norm_bias, eps = norm or (None, None, None)
    grad = needs_grad(x, weight, bias, norm_weight, norm_bias, residual, gamma)
    chosen = backends.choose("linear", x, needs_grad=grad, weights=(weight,))
    if chosen in backends.KERNELS:
        x, weight = operands("linear", x, weight, normed=norm is not None)
        if activation is not None and residual is not None:  # no model has both: merged in a second step
            y, _, _, _ = _linear(
                x, weight, bias, norm_weight, norm_bias, eps, activation, None, None, None, grad, chosen
            )
            return reference.merge(y, residual, gamma, row_scale)
        out, _, _, _ = _linear(
            x, weight, bias, norm_weight, norm_bias, eps, activation, residual, gamma, row_scale, grad, chosen
        )
        return out
    run = onednn.linear if chosen == "onednn" else reference.linear
    return run(x, weight, bias, norm=norm, activation=activation, residual=residual, gamma=gamma, row_scale=row_scale)


def check(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    checks.floating(op, x=x, weight=weight, bias=bias, residual=residual, gamma=gamma)
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"ops.{op}: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; expected (..., K) and (N, K)"
        )
    checks.shape(op, "bias", bias, (weight.shape[0],))
    checks.norm(op, norm, x.shape[-1])
    checks.merging(op, x.shape[:-1], weight.shape[0], residual, gamma, row_scale)
    norm_weight, norm_bias, _ = norm or (None, None, None)
    checks.same_device(
        op,
        x,
        weight=weight,
        bias=bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        residual=residual,
        gamma=gamma,
        row_scale=row_scale,
    )
    if norm is None and not autocasting(x):
        checks.same_dtype(op, x=x, weight=weight)


def operands(op: str, x: Tensor, *weights: Tensor, normed: bool) -> tuple[Any, ...]:
    """The product's operands in one dtype; a normed x keeps its own, the norm writes the weight's."""
    weights = cast_for_autocast(x, *weights)
    if not normed:
        (x,) = cast_for_autocast(x, x)
    if weights[0].dtype not in backends.KERNEL_DTYPES:
        raise ValueError(f"ops.{op}: weight dtype {weights[0].dtype} is not supported by the kernels")
    return x, *weights


def normalise(
    kernels: Any,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(LN(x), mean, rstd) as rows in ``dtype`` by the kernel, or (x as rows, None, None) where eps is None."""
    if eps is None:
        return as_rows(x), None, None
    y, _, mean, rstd = kernels.layer_norm_forward(as_rows(x), norm_weight, norm_bias, eps, out_dtype=dtype)
    return y, mean, rstd


def normed_product(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    *,
    activation: str | None,
    save: bool,
    **merged: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(out, preact, mean, rstd) of act(LN(x) W^T + b), ``merged`` with a residual, gamma or row_scale.

    The norm is a kernel of its own but for CUDA in inference, whose launcher may fold it into the product.
    """
    kernels = launchers(backend)
    if backend == "cuda" and eps is not None and not save and all(t is None for t in merged.values()):
        norm = norm_weight, norm_bias, eps
        from fastvit.cuda.linear import linear_normed_forward

        out, row_mean, row_rstd = linear_normed_forward(as_rows(x), norm, weight, bias, activation=activation)
        return out, None, row_mean, row_rstd
    rows, mean, rstd = normalise(kernels, x, norm_weight, norm_bias, eps, weight.dtype)
    out, preact = kernels.linear_forward(
        rows, weight, bias, activation=activation, save_preact=save and activation is not None, **merged
    )
    return out, preact, mean, rstd


def normalise_gradient(
    kernels: Any,
    dnormed: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dnorm_weight, dnorm_bias) from the gradient of LN(x), plus dstream where x also is the residual."""
    dstream = None if dstream is None else as_rows(dstream)
    needs_params = norm_weight is not None or norm_bias is not None
    dx, _, dweight, dbias, _ = kernels.layer_norm_backward(
        dnormed, dstream, as_rows(x), norm_weight, mean, rstd, need_params=needs_params
    )
    return dx.view(x.shape), None if norm_weight is None else dweight, None if norm_bias is None else dbias


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
    weight, bias, gamma, row_scale = dense(weight, bias, gamma, row_scale)
    out, preact, mean, rstd = normed_product(
        backend,
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        eps,
        activation=activation,
        save=save,
        residual=None if residual is None else as_rows(residual),
        gamma=gamma,
        row_scale=row_scale,
    )
    return out.view(*x.shape[:-1], out.shape[-1]), or_empty(mean, out), or_empty(rstd, out), or_empty(preact, out)


def saved_fake(a: Any, weight: Tensor, save: bool) -> tuple[Tensor, ...]:
    """Fake (mean, rstd, preact): statistics where there is a norm, the pre-activation where it is saved."""
    rows = math.prod(a.x.shape[:-1])
    statistics = (a.x.new_empty(0 if a.eps is None else rows, dtype=torch.float32) for _ in range(2))
    return *statistics, weight.new_empty((rows, weight.shape[0]) if save else 0)


def _fake(a: Any) -> tuple[Tensor, ...]:
    out = (a.weight if a.residual is None else a.residual).new_empty((*a.x.shape[:-1], a.weight.shape[0]))
    return out, *saved_fake(a, a.weight, a.save and a.activation is not None)


def _backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    mean: Tensor,
    rstd: Tensor,
    preact: Tensor,
    activation: str | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    kernels = launchers(backend)
    needs_x, needs_weight = needs
    weight, bias, gamma, row_scale = dense(weight, bias, gamma, row_scale)
    dout = as_rows(dout)
    dx = dweight = dbias = dgamma = dnorm_weight = dnorm_bias = None
    if activation is not None:
        dout, _ = kernels.activation_gradient(dout, preact, activation)
    dout = kernels.scale_rows(dout, weight.dtype, row_scale)  # what both products read
    if needs_weight:
        rows, _, _ = normalise(kernels, x, norm_weight, norm_bias, eps, weight.dtype)
        dweight, dbias, dgamma = kernels.linear_weight_gradient(
            dout, rows, weight=weight, bias=bias, gamma=gamma, need_bias=bias is not None
        )
    if needs_x:
        dx, _ = kernels.linear_input_gradient(dout, weight, gamma=gamma)
        if eps is not None:
            dx, dnorm_weight, dnorm_bias = normalise_gradient(kernels, dx, None, x, norm_weight, norm_bias, mean, rstd)
        dx = dx.view(x.shape)
    return tuple(or_empty(g, dout) for g in (dx, dweight, dbias, dnorm_weight, dnorm_bias, dgamma))


def _backward_fake(a: Any) -> tuple[Tensor, ...]:
    needs_x, needs_weight = a.needs
    return (
        a.x.new_empty(a.x.shape if needs_x else 0),
        *weight_fake(a.weight, a.bias, needs_weight),
        *norm_fake(a, needs_x),
        vector_fake(a.x, a.weight.shape[0], needs_weight and a.gamma is not None),
    )


def weight_fake(weight: Tensor, bias: Tensor | None, needed: bool) -> tuple[Tensor, Tensor]:
    """Fake gradients of a linear layer's weight and bias."""
    present = needed and bias is not None
    return weight.new_empty(weight.shape if needed else 0), vector_fake(weight, weight.shape[0], present)


def norm_fake(a: Any, needed: bool) -> tuple[Tensor, ...]:
    """Fake gradients of the norm's weight and bias."""
    width = a.x.shape[-1]
    return tuple(vector_fake(a.x, width, needed and t is not None) for t in (a.norm_weight, a.norm_bias))


def vector_fake(x: Tensor, length: int, present: bool) -> Tensor:
    """Fake float32 gradient (length,), or (0,) where it is absent."""
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
    wanted = ctx.needs_input_grad
    needs = [wanted[0] or wanted[3] or wanted[4], wanted[1] or wanted[2] or wanted[8]]
    dx, dweight, dbias, dnorm_weight, dnorm_bias, dgamma = map(
        none_if_empty,
        _linear_backward(
            dout,
            x,
            weight,
            bias,
            norm_weight,
            norm_bias,
            ctx.eps,
            mean,
            rstd,
            preact,
            ctx.activation,
            gamma,
            row_scale,
            needs,
            ctx.backend,
        ),
    )
    dbias, dnorm_weight, dnorm_bias, dgamma = cast_gradients(
        (dbias, bias), (dnorm_weight, norm_weight), (dnorm_bias, norm_bias), (dgamma, gamma)
    )
    dresidual = dout if ctx.merged else None
    return dx, dweight, dbias, dnorm_weight, dnorm_bias, None, None, dresidual, dgamma, None, None, None


_BACKWARD = (
    "linear_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "float? eps, Tensor mean, Tensor rstd, Tensor preact, str? activation, Tensor? gamma, Tensor? row_scale, "
    "bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_FORWARD = (
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float? eps, "
    "str? activation, Tensor? residual, Tensor? gamma, Tensor? row_scale, bool save, str backend) "
    "-> (Tensor out, Tensor mean, Tensor rstd, Tensor preact)"
)
_linear_backward = register(_BACKWARD, _backward, by_name(_BACKWARD, _backward_fake))
_linear = register(_FORWARD, _forward, by_name(_FORWARD, _fake), backward=_gradient, setup_context=_setup_context)
