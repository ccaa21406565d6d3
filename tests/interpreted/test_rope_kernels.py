"""The rotary kernel in the interpreter, against the reference and its gradients, by the rule of numerics.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.triton.launch import record
from fastvit.triton.rope import apply_rotary
from numerics import DTYPES, check_op


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return apply_rotary(q, k, cos, sin)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *apply_rotary(dq, dk, *ctx.saved_tensors, inverse=True), None, None


def check(q: Tensor, k: Tensor, *angles: Tensor) -> None:
    args = {"q": q.requires_grad_(), "k": k.requires_grad_()} | dict(zip(("cos", "sin"), angles, strict=True))
    check_op(lambda **kw: _Rope.apply(*kw.values()), reference.rotate, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 6, 64, 72, 128])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    check(*torch.randn(2, 2, 5, 2, dim, dtype=dtype), *torch.randn(2, 4, dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 1, 1), (1, 16, 3), (3, 70, 3), (2, 17, 5)])
def test_tokens_and_heads(batch: int, tokens: int, heads: int, dtype: torch.dtype) -> None:
    """Few blocks are shared out by heads; those of 3 images of 70 tokens take all heads each."""
    check(*torch.randn(2, batch, tokens, heads, 8, dtype=dtype), *torch.randn(2, tokens, 8))


@pytest.mark.parametrize("prefix", [0, 1, 5, 18, 20])
def test_tokens_before_the_angles_stay_as_they_are(prefix: int) -> None:
    q, k = torch.randn(2, 2, 20, 2, 12)
    cos, sin = torch.randn(2, 20 - prefix, 12)
    check(q, k, cos, sin)
    for x, turned in zip((q, k), apply_rotary(q, k, cos, sin), strict=True):
        assert torch.equal(turned[:, :prefix], x[:, :prefix])


@pytest.mark.parametrize("angles", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_angles_of_each_image_in_any_dtype(dtype: torch.dtype, angles: torch.dtype) -> None:
    q, k = torch.randn(2, 3, 7, 2, 8, dtype=dtype)
    check(q, k, *torch.randn(2, 3, 5, 8, dtype=angles))


def test_packed_and_strided() -> None:
    """Views of a packed projection, and of (B, H, T, d); NaN lies around them."""
    cos, sin = torch.randn(2, 16, 10)
    qkv = torch.full((2, 19, 3, 4, 14), torch.nan)
    qkv[:, 1:18, :2, :3, 2:12] = torch.randn(2, 17, 2, 3, 10)
    q, k = qkv[:, 1:18, :2, :3, 2:12].unbind(2)
    for prepare in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        turned = apply_rotary(prepare(q), prepare(k), cos, sin)
        for ours, plain in zip(turned, apply_rotary(q.contiguous(), k.contiguous(), cos, sin), strict=True):
            assert not ours.isnan().any()
            assert torch.equal(ours, plain)


def test_there_and_back() -> None:
    q, k = torch.randn(2, 2, 9, 2, 16)
    angles = torch.randn(8, 8).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    for x, back in zip((q, k), apply_rotary(*apply_rotary(q, k, cos, sin), cos, sin, inverse=True), strict=True):
        torch.testing.assert_close(back, x)


def test_nothing_to_turn() -> None:
    for shape in ((0, 5, 2, 8), (2, 0, 2, 8)):
        q = torch.randn(shape)
        turned, _ = apply_rotary(q, q, *torch.randn(2, shape[1], 8))
        assert turned.shape == q.shape


def test_one_launch_of_views_without_a_copy() -> None:
    qkv = torch.empty(64, 201, 3, 12, 64, dtype=torch.bfloat16, device="meta")
    q, k, _ = qkv.unbind(2)
    with record(90) as launches:
        apply_rotary(q, k, *torch.empty(2, 196, 64, device="meta"))
    (one,) = launches
    assert one.args["q_ptr"] is q and one.args["k_ptr"] is k
    assert one.args["prefix"] == 5
