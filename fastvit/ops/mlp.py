"""The feed-forward half of a transformer block: two linears, their norm, activation and residual."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastvit import activations, reference
from fastvit.cuda.linear import linear_normed_forward
from fastvit.ops import backends, checks, onednn
from fastvit.ops.library import (
    as_rows,
    cast_gradients,
    dense,
    launchers,
    needs_grad,
    none_if_empty,
    or_empty,
    register,
)
from fastvit.ops.linear import (
    check,
    norm_fake,
    norm_gradients,
    normalised_rows,
    operands,
    saved_fake,
    vector_fake,
    weight_fake,
)
from fastvit.reference import Norm


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
    """Compute y = act(LN(x) W1^T + b1) W2^T + b2, or residual + row_scale * gamma * y (the ViT paper's equation 3).

    Args:
        x: (..., D) in the weights' dtype; with a norm it may be float32 beside 16-bit weights.
        fc1_weight: (F, D), fc1_bias: (F,) or None. fc2_weight: (D', F), or (D', F / 2) for a gated activation.
        fc2_bias: (D',) or None. Biases may be float32.
        norm: (weight (D,), bias (D,) or None, eps) of the LayerNorm before, or None.
        activation: a name in :data:`fastvit.activations.ACTIVATIONS`, or "swiglu" (silu(first half) * second half).
        residual: (..., D'); may be float32, and the result then is. gamma: (D',) LayerScale.
        row_scale: (B,) float32 with B = x.shape[0], drop-path, or one for each row; it gets no gradient.

    Returns:
        (..., D') in the residual's dtype, or without one in the weights'. Backward keeps x, the norm's statistics
        and the pre-activation, and recomputes the rest.

    Raises:
        ValueError: a shape, dtype, device or activation that does not fit.
        BackendUnavailable: the backend that is set can't run this.
    """
    activations.check(activation, gated=True, optional=False, where="ops.mlp: ")
    norm_weight, norm_bias, eps = check("mlp", x, fc1_weight, fc1_bias, norm, None, None, None)
    columns = activations.columns(activation)
    hidden = fc1_weight.shape[0] // columns
    if fc2_weight.ndim != 2 or fc2_weight.shape[1] != hidden or fc1_weight.shape[0] % columns:
        raise ValueError(
            f"ops.mlp: fc1_weight has shape {tuple(fc1_weight.shape)}, fc2_weight {tuple(fc2_weight.shape)}; "
            f"with {activation} the second must be (D, {hidden}) and fc1's rows even"
        )
    checks.shape("mlp", "fc2_bias", fc2_bias, (fc2_weight.shape[0],))
    checks.merging("mlp", x.shape[:-1], fc2_weight.shape[0], residual, gamma, row_scale)
    merged = {"residual": residual, "gamma": gamma, "row_scale": row_scale}
    checks.same_device("mlp", x.device, fc2_weight=fc2_weight, fc2_bias=fc2_bias, **merged)
    checks.same_dtype("mlp", fc1_weight=fc1_weight, fc2_weight=fc2_weight)
    grad = needs_grad(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, residual, gamma)
    chosen = backends.choose("mlp", x, needs_grad=grad, weights=(fc1_weight, fc2_weight))
    if chosen not in backends.KERNELS:
        run = onednn.mlp if chosen == "onednn" else reference.mlp
        return run(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm=norm, activation=activation, **merged)
    add_x = residual is x  # then backward adds its gradient in the norm's own kernel
    x, fc1_weight, fc2_weight = operands("mlp", x, fc1_weight, fc2_weight, normed=norm is not None)
    if add_x and residual is not None and x.dtype == residual.dtype:
        residual = None
    else:
        add_x = False
    out, _, _, _ = _mlp(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, eps, activation, residual, add_x,
        gamma, row_scale, grad, chosen,
    )  # fmt: skip
    return out


def _forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
    activation: str,
    residual: Tensor | None,
    add_x: bool,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = launchers(backend)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = dense(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    gamma, row_scale = dense(gamma, row_scale)
    rows, mean, rstd, preact = as_rows(x), None, None, None
    if backend == "cuda" and eps is not None and not save:  # may fold the norm into the product
        norm = norm_weight, norm_bias, eps
        hidden, mean, rstd = linear_normed_forward(rows, norm, fc1_weight, fc1_bias, activation=activation)
    else:
        if eps is not None:
            dtype = fc1_weight.dtype
            rows, _, mean, rstd = kernels.layer_norm_forward(rows, norm_weight, norm_bias, eps, out_dtype=dtype)
        hidden, preact = kernels.linear_forward(rows, fc1_weight, fc1_bias, activation=activation, save_preact=save)
    residual = x if add_x else residual
    residual = None if residual is None else as_rows(residual)
    out, _ = kernels.linear_forward(hidden, fc2_weight, fc2_bias, residual=residual, gamma=gamma, row_scale=row_scale)
    mean, rstd, preact = (or_empty(t, out) for t in (mean, rstd, preact))
    return out.view(*x.shape[:-1], out.shape[-1]), mean, rstd, preact


def _fake(a: Any) -> tuple[Tensor, ...]:
    like = a.x if a.add_x else a.fc2_weight if a.residual is None else a.residual
    out = like.new_empty((*a.x.shape[:-1], a.fc2_weight.shape[0]))
    return out, *saved_fake(a, a.fc1_weight, a.save)


def _backward(a: Any) -> tuple[Tensor, ...]:
    kernels = launchers(a.backend)
    needs_x, needs_fc1, needs_fc2 = a.needs
    fc1_weight, fc2_weight, fc2_bias = dense(a.fc1_weight, a.fc2_weight, a.fc2_bias)
    gamma, row_scale = dense(a.gamma, a.row_scale)
    dout = as_rows(a.dout)
    dx = dfc1 = dfc1_bias = dfc2 = dfc2_bias = dnorm_weight = dnorm_bias = dgamma = None
    scaled = kernels.scale_rows(dout, fc2_weight.dtype, row_scale)  # what both products of the second linear read
    dpreact, hidden = kernels.linear_input_gradient(
        scaled, fc2_weight, gamma=gamma, preact=a.preact, activation=a.activation
    )
    if needs_fc2:
        assert hidden is not None  # there is an activation
        dfc2, dfc2_bias, dgamma = kernels.linear_weight_gradient(
            scaled, hidden, weight=fc2_weight, bias=fc2_bias, gamma=gamma, need_bias=fc2_bias is not None
        )
    del hidden
    if needs_fc1:
        rows = normalised_rows(a, fc1_weight.dtype)
        dfc1, dfc1_bias, _ = kernels.linear_weight_gradient(dpreact, rows, need_bias=a.fc1_bias is not None)
    if needs_x:
        dx, _ = kernels.linear_input_gradient(dpreact, fc1_weight)
        stream = dout if a.add_x else None
        if a.eps is not None:
            dx, dnorm_weight, dnorm_bias = norm_gradients(a, dx, stream)
        elif stream is not None:
            dx = dx + stream
        dx = dx.view(a.x.shape)
    gradients = (dx, dfc1, dfc1_bias, dfc2, dfc2_bias, dnorm_weight, dnorm_bias, dgamma)
    return tuple(or_empty(g, dout) for g in gradients)


def _backward_fake(a: Any) -> tuple[Tensor, ...]:
    needs_x, needs_fc1, needs_fc2 = a.needs
    return (
        a.x.new_empty(a.x.shape if needs_x else 0),
        *weight_fake(a.fc1_weight, a.fc1_bias, needs_fc1),
        *weight_fake(a.fc2_weight, a.fc2_bias, needs_fc2),
        *norm_fake(a, needs_x),
        vector_fake(a.x, a.fc2_weight.shape[0], needs_fc2 and a.gamma is not None),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, eps, activation, residual, add_x, gamma, row_scale, _, ctx.backend = inputs
    _, mean, rstd, preact = output
    ctx.mark_non_differentiable(mean, rstd, preact)
    ctx.set_materialize_grads(False)
    ctx.eps, ctx.activation, ctx.merged, ctx.add_x = eps, activation, residual is not None, add_x
    ctx.save_for_backward(*tensors, mean, rstd, preact, gamma, row_scale)


def _gradient(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 15
    *tensors, mean, rstd, preact, gamma, row_scale = ctx.saved_tensors
    _, _, fc1_bias, _, fc2_bias, norm_weight, norm_bias = tensors
    needs = ctx.needs_input_grad
    needs = [needs[0] or needs[5] or needs[6], needs[1] or needs[2], needs[3] or needs[4] or needs[11]]
    gradients = _mlp_backward(
        dout, *tensors, ctx.eps, mean, rstd, preact, ctx.activation, ctx.add_x, gamma, row_scale, needs, ctx.backend
    )
    dx, dfc1, dfc1_bias, dfc2, dfc2_bias, dnorm_weight, dnorm_bias, dgamma = map(none_if_empty, gradients)
    dfc1_bias, dfc2_bias, dnorm_weight, dnorm_bias, dgamma = cast_gradients(
        (dfc1_bias, fc1_bias),
        (dfc2_bias, fc2_bias),
        (dnorm_weight, norm_weight),
        (dnorm_bias, norm_bias),
        (dgamma, gamma),
    )
    dresidual = dout if ctx.merged else None
    parameters = (dfc1, dfc1_bias, dfc2, dfc2_bias, dnorm_weight, dnorm_bias)
    return dx, *parameters, None, None, dresidual, None, dgamma, None, None, None


_mlp_backward = register(
    "mlp_backward(Tensor dout, Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "Tensor? norm_weight, Tensor? norm_bias, float? eps, Tensor mean, Tensor rstd, Tensor preact, str activation, "
    "bool add_x, Tensor? gamma, Tensor? row_scale, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_mlp = register(
    "mlp(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? norm_weight, "
    "Tensor? norm_bias, float? eps, str activation, Tensor? residual, bool add_x, Tensor? gamma, Tensor? row_scale, "
    "bool save, str backend) -> (Tensor out, Tensor mean, Tensor rstd, Tensor preact)",
    _forward,
    _fake,
    backward=_gradient,
    setup_context=_setup_context,
)
