"""The rotary CUDA kernel on the CPU: every vector width, prefix, layout and dtype of the angles, by the error rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.cuda.rope import apply_rotary
from numerics import assert_as_right_as_eager

HALF = (torch.float16, torch.bfloat16)


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """There, and the gradients back."""
    upstream = torch.randn_like(q), torch.randn_like(k)
    runs = []
    for dtype in (q.dtype, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k)]
        angles = (cos, sin) if dtype == q.dtype else (cos.double(), sin.double())
        turned = reference.rotate(*leaves, *angles)
        back = torch.autograd.grad(turned, leaves, [x.to(dtype) for x in upstream])
        runs.append([*(x.detach() for x in turned), *back])
    ours = [*apply_rotary(q, k, cos, sin), *apply_rotary(*upstream, cos, sin, inverse=True)]
    assert_as_right_as_eager(ours, *runs, names=["q'", "k'", "dq", "dk"])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [8, 32, 40, 64, 72, 80, 128])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    check(*torch.randn(2, 2, 9, 3, dim).to(dtype), *torch.randn(2, 7, dim))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("batch", "tokens", "heads", "prefix"), [(1, 1, 1, 0), (5, 197, 3, 1), (2, 17, 5, 17)])
def test_tokens_heads_and_prefix(batch: int, tokens: int, heads: int, prefix: int, dtype: torch.dtype) -> None:
    """Few blocks are shared out by heads; those of 5 images of 197 tokens take all heads each."""
    check(*torch.randn(2, batch, tokens, heads, 16).to(dtype), *torch.randn(2, tokens - prefix, 16))


@pytest.mark.parametrize("angles", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [24, 32])
def test_angles_of_each_image_in_any_dtype(dim: int, angles: torch.dtype) -> None:
    check(*torch.randn(2, 3, 6, 2, dim).half(), *torch.randn(2, 3, 5, dim).to(angles))


def test_packed_and_strided() -> None:
    """Views of a packed projection are read as they are; rows at odd strides are copied."""
    angles = torch.randn(2, 16, 24)
    for width in (24, 25):
        qkv = torch.full((2, 17, 3, 2, width), torch.nan, dtype=torch.float16)
        qkv[..., :24] = torch.randn(2, 17, 3, 2, 24)
        q, k, _ = qkv[..., :24].unbind(2)
        for ours, plain in zip(apply_rotary(q, k, *angles), apply_rotary(q.clone(), k.clone(), *angles), strict=True):
            assert torch.equal(ours, plain)
        check(q, k, *angles)


def test_nothing_to_turn() -> None:
    q = torch.randn(0, 5, 2, 8).half()
    assert apply_rotary(q, q, *torch.randn(2, 5, 8))[0].shape == q.shape


@pytest.mark.parametrize(
    ("shape", "angles", "message"),
    [
        ((1, 2, 1, 12), (2, 12), "head dim 12; accepted: multiples of 8"),
        ((1, 2, 1, 16), (3, 16), r"accepted: \(T', 16\) or \(1, T', 16\) with T' up to 2"),
    ],
)
def test_what_is_refused(shape: tuple[int, ...], angles: tuple[int, ...], message: str) -> None:
    q = torch.zeros(shape, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=message):
        apply_rotary(q, q, *torch.zeros(2, *angles))
