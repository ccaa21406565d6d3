"""Attention's kernels in the interpreter, against the reference and its gradients, by the rule of numerics.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.triton.attention import attention_forward
from fastvit.triton.attention_backward import attention_backward
from fastvit.triton.launch import assume, record
from numerics import DTYPES, check_op


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = attention_forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        attention_backward(dout, dlse, q, k, v, out, lse, ctx.scale, *gradients)
        return *gradients, None


class _Packed(torch.autograd.Function):
    """q, k and v as views of one tensor, and their gradients as views of another: nothing is copied."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = attention_forward(*qkv.unbind(2), scale)
        ctx.save_for_backward(qkv, out, lse)
        ctx.scale = scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, None]:
        qkv, out, lse = ctx.saved_tensors
        dqkv = torch.full_like(qkv, torch.nan)
        attention_backward(dout, dlse, *qkv.unbind(2), out, lse, ctx.scale, *dqkv.unbind(2))
        return dqkv, None


def make(queries: int, keys: int, dim: int, dtype: torch.dtype, batch: int = 1, heads: int = 1) -> dict[str, Any]:
    """q, k and v that require gradients."""
    shapes = {"q": (batch, queries, heads, dim), "k": (batch, keys, heads, dim), "v": (batch, keys, heads, dim)}
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def check(args: dict[str, Any], scale: float | None = None, lse: bool = True) -> None:
    """Output, log-sum-exp and all gradients; without ``lse`` no gradient reaches the log-sum-exp."""
    scale = args["q"].shape[-1] ** -0.5 if scale is None else scale

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return _Attention.apply(q, k, v, scale)[: 1 + lse]

    def expected(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return reference.attention(q, k, v, scale=scale, return_lse=True)[: 1 + lse]

    check_op(kernel, expected, args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 5, 32, 64, 72, 80, 88, 96, 104, 128])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    check(make(17, 17, dim, dtype))


# Different blocks and pieces on different architectures; float32 has the same on all.
@pytest.mark.parametrize(
    ("dtype", "arch"), [(torch.float32, 80), *((dtype, arch) for dtype in DTYPES[1:] for arch in (80, 90))]
)
@pytest.mark.parametrize("tokens", [1, 5, 50, 65, 197])
def test_token_counts(tokens: int, dtype: torch.dtype, arch: int) -> None:
    with assume(arch):
        check(make(tokens, tokens, 24, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 197), (65, 17), (5, 300), (300, 5)])
def test_queries_and_keys_differ(queries: int, keys: int, dtype: torch.dtype) -> None:
    check(make(queries, keys, 24, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 20])  # 20: rows that are not 16-byte aligned
def test_packed(dim: int, dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 21, 3, 3, dim, dtype=dtype).requires_grad_()
    check_op(
        lambda qkv: _Packed.apply(qkv, 0.3),
        lambda qkv: reference.attention_qkvpacked(qkv, scale=0.3, return_lse=True),
        {"qkv": qkv},
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_output_alone(dtype: torch.dtype) -> None:
    check(make(17, 33, 32, dtype), lse=False)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_any_scale(scale: float) -> None:
    check(make(19, 70, 16, torch.float32), scale=scale)


def test_large_scores_neither_overflow_nor_reach_absent_keys() -> None:
    """All scores are below -100: a key or query beyond the last would have a probability above exp(100)."""
    args = make(21, 85, 16, torch.float32)
    args = {name: (x.detach().abs() + 1).requires_grad_() for name, x in args.items()}
    check(args, scale=-4.0)


def test_strides_are_free() -> None:
    """(B, H, T, d) in memory for q, (T, B, H, d) for k, every third row for v; a dout with gaps."""
    batch, tokens, heads, dim = 2, 18, 2, 16
    q = torch.randn(batch, heads, tokens, dim).transpose(1, 2)
    k = torch.randn(tokens, batch, heads, dim).transpose(0, 1)
    v = torch.randn(batch, tokens * 3, heads, dim)[:, ::3]
    dout = torch.randn(batch, tokens, heads, 2 * dim)[..., :dim]
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


def test_memory_outside_the_tensors_is_left_alone() -> None:
    """Inputs lie among NaN, and gradients among sevens, in every direction."""
    batch, tokens, heads, dim = 1, 19, 2, 24

    def inside(buffer: Tensor) -> Tensor:
        return buffer[:, 2 : 2 + tokens, :heads, 8 : 8 + dim]

    def surrounded(value: float) -> Tensor:
        return torch.full((batch, tokens + 5, heads + 1, dim + 16), value)

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


def test_no_key_and_no_query() -> None:
    q, empty = torch.randn(2, 3, 2, 8), torch.randn(2, 0, 2, 8)
    out, lse = attention_forward(q, empty, empty, 1.0)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    dq = torch.full_like(q, torch.nan)
    attention_backward(q, None, q, empty, empty, out, lse, 1.0, dq, empty.clone(), empty.clone())
    assert (dq == 0).all()

    out, lse = attention_forward(empty, q, q, 1.0)
    assert out.shape == empty.shape
    dk, dv = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    attention_backward(out, None, empty, q, q, out, lse, 1.0, empty.clone(), dk, dv)
    assert (dk == 0).all()
    assert (dv == 0).all()


def test_empty_batch() -> None:
    q = torch.randn(0, 5, 2, 8)
    out, lse = attention_forward(q, q, q, 1.0)
    assert out.shape == (0, 5, 2, 8)
    assert lse.shape == (0, 2, 5)
    attention_backward(out, lse, q, q, q, out, lse, 1.0, *(torch.empty_like(q) for _ in range(3)))


def test_head_dim_above_128_is_refused() -> None:
    q = torch.randn(1, 2, 1, 136)
    with pytest.raises(ValueError, match="1 to 128, got 136"):
        attention_forward(q, q, q, 1.0)


def test_one_launch_forward_and_two_backward_on_tiles_that_fit() -> None:
    qkv = torch.empty(2, 197, 3, 12, 64, dtype=torch.bfloat16, device="meta")
    q, k, v = qkv.unbind(2)
    with record(90) as launches:
        out, lse = attention_forward(q, k, v, 0.125)
        attention_backward(out, None, q, k, v, out, lse, 0.125, *torch.empty_like(qkv).unbind(2))
    forward, query, key_value = launches
    assert sum(forward.args["TAIL"]) == 208
    assert forward.args["BLOCK_N"] == 0
    for one, through in ((query, "BLOCK_N"), (key_value, "BLOCK_M")):
        assert 196 // one.args[through] * one.args[through] + sum(one.args["TAIL"]) == 208
    with record(80) as launches:
        attention_forward(*torch.empty(1, 197, 3, 1, 88, dtype=torch.float16, device="meta").unbind(2), 1.0)
    assert sum(launches[0].args["PIECES"]) == 96
