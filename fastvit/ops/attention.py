"""Attention, from separate q, k, v or straight from the packed projection."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import reference
from fastvit.ops import backends, checks
from fastvit.ops.library import autocasting, cast_for_autocast, launchers, needs_grad, register


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v for each head (Vaswani et al., 2017, equation 1), T x T never stored.

    Args:
        q: (B, Tq, H, d) floating; k, v: (B, Tk, H, d). The last dimension is contiguous (else it is copied), the
            other strides are free: views of a packed projection need no copy. The kernels take d from 1 to 128.
        scale: of the scores; by default d ** -0.5.
        return_lse: also return the log-sum-exp of each row of scores.

    Returns:
        (B, Tq, H, d) in q's dtype; with return_lse also (B, H, Tq) float32, natural log. With Tk = 0: zeros, -inf.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        BackendUnavailable: the backend that is set can't run this.
    """
    checks.floating("attention", q=q, k=k, v=v)
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"ops.attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "expected (B, Tq, H, d), (B, Tk, H, d), (B, Tk, H, d)"
        )
    if 0 in q.shape[2:]:
        raise ValueError(f"ops.attention: q has shape {tuple(q.shape)}; heads and head dim start at 1")
    checks.same_device("attention", q, k=k, v=v)
    if not autocasting(q):
        checks.same_dtype("attention", q=q, k=k, v=v)
    chosen = backends.choose("attention", q, needs_grad=needs_grad(q, k, v))
    if chosen not in backends.KERNELS:
        with _differentiable_twice("attention", q, k, v):
            return reference.attention(q, k, v, scale=scale, return_lse=return_lse)
    q, k, v = cast_for_autocast(q, q, k, v)
    out, lse = _attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, chosen)
    return (out, lse) if return_lse else out


def attention_qkvpacked(
    qkv: Tensor, *, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` on q, k, v = qkv.unbind(2), with one packed gradient.

    Args:
        qkv: (B, T, 3, H, d) floating, as a fused projection writes it.
        scale, return_lse: as in :func:`attention`.

    Returns:
        (B, T, H, d); with return_lse also (B, H, T) float32.

    Raises:
        ValueError, BackendUnavailable: as :func:`attention`.
    """
    checks.floating("attention_qkvpacked", qkv=qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or 0 in qkv.shape[3:]:
        raise ValueError(f"ops.attention_qkvpacked: qkv has shape {tuple(qkv.shape)}, expected (B, T, 3, H, d)")
    chosen = backends.choose("attention_qkvpacked", qkv, needs_grad=needs_grad(qkv))
    if chosen not in backends.KERNELS:
        with _differentiable_twice("attention_qkvpacked", qkv):
            return reference.attention_qkvpacked(qkv, scale=scale, return_lse=return_lse)
    (qkv,) = cast_for_autocast(qkv, qkv)
    out, lse = _attention_qkvpacked(qkv, qkv.shape[-1] ** -0.5 if scale is None else scale, chosen)
    return (out, lse) if return_lse else out


def _differentiable_twice(op: str, *tensors: Tensor) -> AbstractContextManager[None]:
    """PyTorch's fused attention has no second (or forward-mode) derivatives; who names the reference gets them."""
    if backends.setting(op) == "reference" and (needs_grad(*tensors) or backends.transformed()):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    return launchers(backend).attention_forward(_unit_stride(q), _unit_stride(k), _unit_stride(v), scale)


def _forward_packed(qkv: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    q, k, v = _unit_stride(qkv).unbind(2)
    return _forward(q, k, v, scale, backend)


def _fake(q, k, v, scale, backend):
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)


def _fake_packed(qkv, scale, backend):
    q, k, v = qkv.unbind(2)
    return _fake(q, k, v, scale, backend)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    _backward_into(dout, dlse, q, k, v, out, lse, scale, dq, dk, dv, backend)
    return dq, dk, dv


def _backward_packed(
    dout: Tensor, dlse: Tensor | None, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, backend: str
) -> Tensor:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = qkv.unbind(2)
    dq, dk, dv = dqkv.unbind(2)
    _backward_into(dout, dlse, q, k, v, out, lse, scale, dq, dk, dv, backend)
    return dqkv


def _backward_into(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    backend: str,
) -> None:
    dout, q, k, v = (_unit_stride(t) for t in (dout, q, k, v))
    launchers(backend).attention_backward(dout, dlse, q, k, v, out, lse, scale, dq, dk, dv)


def _backward_fake(dout, dlse, q, k, v, out, lse, scale, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _backward_fake_packed(dout, dlse, qkv, out, lse, scale, backend):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _upstream(dout: Tensor | None, out: Tensor) -> Tensor:
    return torch.zeros_like(out) if dout is None else dout


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    return *_attention_backward(_upstream(dout, out), dlse, q, k, v, out, lse, ctx.scale, ctx.backend), None, None


def _gradient_packed(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, out, lse = ctx.saved_tensors
    return _attention_qkvpacked_backward(_upstream(dout, out), dlse, qkv, out, lse, ctx.scale, ctx.backend), None, None


_attention_backward = register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_attention = register(
    "attention(Tensor q, Tensor k, Tensor v, float scale, str backend) -> (Tensor out, Tensor lse)",
    _forward,
    _fake,
    backward=_gradient,
    setup_context=_setup_context,
)
_attention_qkvpacked_backward = register(
    "attention_qkvpacked_backward(Tensor dout, Tensor? dlse, Tensor qkv, Tensor out, Tensor lse, float scale, "
    "str backend) -> Tensor",
    _backward_packed,
    _backward_fake_packed,
)
_attention_qkvpacked = register(
    "attention_qkvpacked(Tensor qkv, float scale, str backend) -> (Tensor out, Tensor lse)",
    _forward_packed,
    _fake_packed,
    backward=_gradient_packed,
    setup_context=_setup_context,
)
