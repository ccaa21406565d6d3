"""Attention, from separate q, k, v or straight from the packed projection."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import reference
from fastvit.attention_options import LEARNED, SCHEMA, TENSORS, AttentionOptions
from fastvit.ops import backends, checks
from fastvit.ops.library import autocast_dtype, cast_for_autocast, launchers, needs_grad, register, unit_stride
from fastvit.ops.rope import rotate


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    bias: Tensor | None = None,
    rel_pos_table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rel_pos_keys: Tensor | None = None,
    key_mask: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute softmax(q k^T * scale + bias) v for each head (Vaswani et al., 2017, equation 1) without storing T x T.

    Args:
        q: (B, Tq, H, d) floating; k, v: (B, Tk, H, d). The last dimension is contiguous (else it is copied), the
            other strides are free: views of a packed projection need no copy. The kernels take d from 1 to 128.
        scale: of the scores; by default d ** -0.5.
        return_lse: also return the log-sum-exp of each row of scores.
        bias: floating, of 4 dimensions that broadcast to (B, H, Tq, Tk), added to the scaled scores. It has a
            gradient.
        rel_pos_table: ((2h-1)(2w-1), H) floating with window=(h, w): the relative position bias of BEiT (Bao et al.,
            2022) for Tq = Tk = h*w patches in raster order. Query (yi, xi) and key (yj, xj) take row
            (yi - yj + h - 1) * (2w - 1) + xi - xj + w - 1. With 3 rows more a class token comes first, and they are
            for the class token's query with any key, any query with its key, and both its own. It has a gradient.
        rel_pos_keys: (2T-1, d) or (H, 2T-1, d) floating, with Tq = Tk = T: relative position keys (the ViT paper's
            appendix D.3): scale * q_i . rel_pos_keys[i - j + T - 1] is added to score (i, j). It has a gradient. The
            kernels round it to q's dtype. Bias, table and these exclude each other.
        key_mask: (B, Tk) bool, True = kept: the others are no keys at all.
        rope: (cos, sin): rotates q and k first, as :func:`fastvit.ops.rope.rotate` says; Tq = Tk.
        cu_seqlens: (n + 1,) int32: B = 1, and the n sequences that start there, the last of which ends at T, attend
            each to itself. Two of them where queries and keys are packed differently. Not with bias, rel_pos_table,
            rel_pos_keys or key_mask. On a CPU its values are checked; on a GPU nothing waits for them, and tokens
            outside every sequence get no result.
        max_seqlen: the longest sequence (of queries, of keys), or more; goes with cu_seqlens.
        dropout_p: the probability, below 1, that a weight is dropped; the others are divided by 1 - dropout_p.
        seed: int64 of one element on q's device. Weight (i, j) of image b and head h is dropped where word 0 of
            Philox4x32-10, with counter (j, i, b * H + h, 0) and key (seed's low, seed's high 32 bits), is below
            dropout_p * 2^32. Sequences are images, and i and j start in each.

    Returns:
        (B, Tq, H, d) in q's dtype; with return_lse also (B, H, Tq) float32, natural log, that of the weights before
        dropout. A row with no key gives zeros and -inf.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit.
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
    checks.same_device("attention", q.device, k=k, v=v)
    autocast = autocast_dtype(q.device)
    if autocast is None:
        checks.same_dtype("attention", q=q, k=k, v=v)
    if rope is not None:
        q, k = rotate(q, k, *rope)
    options = checks.attention(
        "attention", q, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]),
        bias=bias, rel_pos_table=rel_pos_table, window=window, rel_pos_keys=rel_pos_keys, key_mask=key_mask,
        cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    needs_learned = needs_grad(q, k, v, options.learned)
    chosen = backends.choose("attention", q, needs_grad=needs_learned)
    if chosen not in backends.KERNELS:
        with _differentiable_twice("attention", needs_learned):
            return reference.attention(q, k, v, scale=scale, return_lse=return_lse, **options.for_reference())
    q, k, v = cast_for_autocast(autocast, q, k, v)
    out, lse = _attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, chosen, *options)
    return (out, lse) if return_lse else out


def attention_qkvpacked(
    qkv: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    bias: Tensor | None = None,
    rel_pos_table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rel_pos_keys: Tensor | None = None,
    key_mask: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute :func:`attention` of q, k, v = qkv.unbind(2), with one packed gradient (but for rope).

    Args:
        qkv: (B, T, 3, H, d) floating, as a fused projection writes it.
        scale and what follows: as in :func:`attention`.

    Returns:
        (B, T, H, d); with return_lse also (B, H, T) float32.

    Raises:
        ValueError, BackendUnavailable: as :func:`attention`.
    """
    checks.floating("attention_qkvpacked", qkv=qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or 0 in qkv.shape[3:]:
        raise ValueError(f"ops.attention_qkvpacked: qkv has shape {tuple(qkv.shape)}, expected (B, T, 3, H, d)")
    keywords: dict[str, Any] = {
        "bias": bias, "rel_pos_table": rel_pos_table, "window": window, "rel_pos_keys": rel_pos_keys,
        "key_mask": key_mask, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "dropout_p": dropout_p, "seed": seed,
    }  # fmt: skip
    if rope is not None:
        keywords |= {"scale": scale, "return_lse": return_lse, "rope": rope}
        return attention(*qkv.unbind(2), **keywords)
    batch, tokens, _, heads, _ = qkv.shape
    options = checks.attention("attention_qkvpacked", qkv, (batch, heads, tokens, tokens), **keywords)
    needs_learned = needs_grad(qkv, options.learned)
    chosen = backends.choose("attention_qkvpacked", qkv, needs_grad=needs_learned)
    if chosen not in backends.KERNELS:
        with _differentiable_twice("attention_qkvpacked", needs_learned):
            return reference.attention_qkvpacked(qkv, scale=scale, return_lse=return_lse, **options.for_reference())
    (qkv,) = cast_for_autocast(autocast_dtype(qkv.device), qkv)
    out, lse = _attention_qkvpacked(qkv, qkv.shape[-1] ** -0.5 if scale is None else scale, chosen, *options)
    return (out, lse) if return_lse else out


def _differentiable_twice(op: str, needs_grad: bool) -> AbstractContextManager[None]:
    """Return a context with second and forward-mode derivatives, which PyTorch's fused attention lacks."""
    if backends.setting(op) == "reference" and (needs_grad or backends.transformed()):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


# --- the ops: (tensors, scale, backend, *values) -> (out, lse) ---------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, *values: Any) -> tuple[Tensor, Tensor]:
    options = AttentionOptions(*values).expanded(q, k)
    return launchers(backend).attention_forward(unit_stride(q), unit_stride(k), unit_stride(v), scale, options)


def _forward_packed(qkv: Tensor, scale: float, backend: str, *values: Any) -> tuple[Tensor, Tensor]:
    q, k, v = unit_stride(qkv).unbind(2)
    return launchers(backend).attention_forward(q, k, v, scale, AttentionOptions(*values).expanded(q, k))


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = a.q.shape
    return a.q.new_empty(a.q.shape), a.q.new_empty((batch, heads, tokens), dtype=torch.float32)


def _fake_packed(a: Any) -> tuple[Tensor, Tensor]:
    a.q = a.qkv.select(2, 0)
    return _fake(a)


# --- their derivatives: needs_learned asks for the gradient of the learned option, which else has shape (0,) ---


def _backward(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (a.q, a.k, a.v))
    return dq, dk, dv, _backward_into(a, a.q, a.k, a.v, dq, dk, dv)


def _backward_packed(a: Any) -> tuple[Tensor, Tensor]:
    dqkv = torch.empty(a.qkv.shape, dtype=a.qkv.dtype, device=a.qkv.device)
    return dqkv, _backward_into(a, *a.qkv.unbind(2), *dqkv.unbind(2))


def _backward_into(a: Any, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """Write dq, dk and dv; return the float32 gradient of the learned option."""
    dlearned = _learned_gradient(a)
    dout, q, k, v = (unit_stride(t) for t in (a.dout, q, k, v))
    launchers(a.backend).attention_backward(
        dout, a.dlse, q, k, v, a.out, a.lse, a.scale, dq, dk, dv, _options(a).expanded(q, k),
        dlearned if a.needs_learned else None,
    )  # fmt: skip
    return dlearned


def _options(a: Any) -> AttentionOptions:
    return AttentionOptions(*(getattr(a, name) for name in AttentionOptions._fields))


def _learned_gradient(a: Any) -> Tensor:
    learned = _options(a).learned
    empty: Tensor = a.lse.new_empty(learned.shape if a.needs_learned and learned is not None else 0)
    return empty


def _backward_fake(a: Any) -> tuple[Tensor, ...]:
    return *(t.new_empty(t.shape) for t in (a.q, a.k, a.v)), _learned_gradient(a)


def _backward_fake_packed(a: Any) -> tuple[Tensor, Tensor]:
    return a.qkv.new_empty(a.qkv.shape), _learned_gradient(a)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    count = len(inputs) - len(AttentionOptions._fields) - 2  # q, k, v: 3, or qkv: 1
    ctx.scale, ctx.backend = inputs[count : count + 2]
    options = AttentionOptions(*inputs[count + 2 :])
    ctx.others = {name: value for name, value in options._asdict().items() if name not in TENSORS}
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(getattr(options, name) for name in TENSORS), *inputs[:count], *output)


def _gradient(op: Any, ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs: of the tensors, None for scale and backend, one for each option."""
    saved = ctx.saved_tensors
    options = AttentionOptions(**ctx.others, **dict(zip(TENSORS, saved[: len(TENSORS)], strict=True)))
    *inputs, out, lse = saved[len(TENSORS) :]
    needs = AttentionOptions(*ctx.needs_input_grad[-len(AttentionOptions._fields) :])
    learned = next((name for name in LEARNED if getattr(needs, name)), None)
    dout = torch.zeros_like(out) if dout is None else dout
    *gradients, dlearned = op(dout, dlse, *inputs, out, lse, ctx.scale, ctx.backend, *options, learned is not None)
    of_options: dict[str, Tensor | None] = dict.fromkeys(AttentionOptions._fields)
    if options.learned is not None and learned is not None:
        of_options[learned] = dlearned.to(options.learned.dtype)
    return *gradients, None, None, *of_options.values()


_attention_backward = register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
    f"str backend, {SCHEMA}, bool needs_learned) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_attention = register(
    f"attention(Tensor q, Tensor k, Tensor v, float scale, str backend, {SCHEMA}) -> (Tensor out, Tensor lse)",
    _forward,
    _fake,
    backward=partial(_gradient, _attention_backward),
    setup_context=_setup_context,
)
_attention_qkvpacked_backward = register(
    "attention_qkvpacked_backward(Tensor dout, Tensor? dlse, Tensor qkv, Tensor out, Tensor lse, float scale, "
    f"str backend, {SCHEMA}, bool needs_learned) -> (Tensor, Tensor)",
    _backward_packed,
    _backward_fake_packed,
)
_attention_qkvpacked = register(
    f"attention_qkvpacked(Tensor qkv, float scale, str backend, {SCHEMA}) -> (Tensor out, Tensor lse)",
    _forward_packed,
    _fake_packed,
    backward=partial(_gradient, _attention_qkvpacked_backward),
    setup_context=_setup_context,
)
