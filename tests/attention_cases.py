"""Attention's cases for every backend; ``launchers`` are its ``attention_forward`` and ``attention_backward``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvit import reference
from numerics import check_op

Launchers = tuple[Callable[..., Any], Callable[..., Any]]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, launchers: Launchers, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = launchers[0](q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.launchers, ctx.scale = launchers, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        ctx.launchers[1](dout, dlse, q, k, v, out, lse, ctx.scale, *gradients)
        return None, *gradients, None


class _Packed(torch.autograd.Function):
    """q, k and v as views of one tensor, and their gradients as views of another: nothing is copied."""

    @staticmethod
    def forward(ctx: Any, launchers: Launchers, qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = launchers[0](*qkv.unbind(2), scale)
        ctx.save_for_backward(qkv, out, lse)
        ctx.launchers, ctx.scale = launchers, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[None, Tensor, None]:
        qkv, out, lse = ctx.saved_tensors
        dqkv = torch.full_like(qkv, torch.nan)
        ctx.launchers[1](dout, dlse, *qkv.unbind(2), out, lse, ctx.scale, *dqkv.unbind(2))
        return None, dqkv, None


def make(queries: int, keys: int, dim: int, dtype: torch.dtype, batch: int = 1, heads: int = 1) -> dict[str, Any]:
    """q, k and v that require gradients."""
    shapes = {"q": (batch, queries, heads, dim), "k": (batch, keys, heads, dim), "v": (batch, keys, heads, dim)}
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def check(launchers: Launchers, args: dict[str, Any], scale: float | None = None, lse: bool = True) -> None:
    """Output, log-sum-exp and all gradients; without ``lse`` no gradient reaches the log-sum-exp."""
    scale = args["q"].shape[-1] ** -0.5 if scale is None else scale

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return _Attention.apply(launchers, q, k, v, scale)[: 1 + lse]

    def expected(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return reference.attention(q, k, v, scale=scale, return_lse=True)[: 1 + lse]

    check_op(kernel, expected, args)


def check_packed(launchers: Launchers, dim: int, dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 21, 3, 3, dim, dtype=dtype).requires_grad_()
    check_op(
        lambda qkv: _Packed.apply(launchers, qkv, 0.3),
        lambda qkv: reference.attention_qkvpacked(qkv, scale=0.3, return_lse=True),
        {"qkv": qkv},
    )


def check_large_scores(launchers: Launchers, args: dict[str, Any]) -> None:
    """All scores are below -100: a key or query beyond the last would have a probability above exp(100)."""
    args = {name: (x.detach().abs() + 1).requires_grad_() for name, x in args.items()}
    check(launchers, args, scale=-4.0)


def check_strides_are_free(launchers: Launchers, dtype: torch.dtype, tokens: int, dim: int) -> None:
    """(B, H, T, d) in memory for q, (T, B, H, d) for k, every third row for v; a dout with gaps."""
    attention_forward, attention_backward = launchers
    batch, heads = 2, 2
    q = torch.randn(batch, heads, tokens, dim).to(dtype).transpose(1, 2)
    k = torch.randn(tokens, batch, heads, dim).to(dtype).transpose(0, 1)
    v = torch.randn(batch, tokens * 3, heads, dim).to(dtype)[:, ::3]
    dout = torch.randn(batch, tokens, heads, 2 * dim).to(dtype)[..., :dim]
    results = []
    for prepare in (torch.Tensor.contiguous, lambda x: x):
        inputs = [prepare(x) for x in (q, k, v)]
        out, lse = attention_forward(*inputs, 0.25)
        gradients = [torch.full_like(x, torch.nan) for x in inputs]
        attention_backward(prepare(dout), None, *inputs, out, lse, 0.25, *gradients)
        results.append((out, lse, *gradients))
    for plain, strided in zip(*results, strict=True):
        assert not strided.isnan().any()
        assert torch.equal(plain, strided)


def check_memory_outside_the_tensors_is_left_alone(
    launchers: Launchers, dtype: torch.dtype, tokens: int, dim: int
) -> None:
    """Inputs lie among NaN, and gradients among sevens, in every direction."""
    attention_forward, attention_backward = launchers
    batch, heads = 1, 2

    def inside(buffer: Tensor) -> Tensor:
        return buffer[:, 2 : 2 + tokens, :heads, 8 : 8 + dim]

    def surrounded(value: float) -> Tensor:
        return torch.full((batch, tokens + 5, heads + 1, dim + 16), value, dtype=dtype)

    inputs = [inside(surrounded(torch.nan)).copy_(torch.randn(batch, tokens, heads, dim)) for _ in range(4)]
    buffers = [surrounded(7.0) for _ in range(3)]
    *qkv, dout = inputs
    out, lse = attention_forward(*qkv, 0.2)
    attention_backward(dout, None, *qkv, out, lse, 0.2, *map(inside, buffers))
    for x in (out, lse, *buffers):
        assert not x.isnan().any()
    for buffer in buffers:
        inside(buffer).fill_(7.0)
        assert (buffer == 7.0).all()
