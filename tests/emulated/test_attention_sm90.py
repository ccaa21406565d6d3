"""Attention's forward kernel for Hopper (TMA, mbarriers, wgmma), run on the CPU, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.cuda import extension
from fastvit.cuda.attention import attention_forward
from head_dims import HEAD_DIMS
from numerics import assert_as_right_as_eager

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _hopper() -> Iterator[None]:
    """Outputs are filled with NaN before the kernel, which the emulated Hopper runs on 4 multiprocessors."""
    torch.use_deterministic_algorithms(True)
    extension.set_architecture(90)
    yield
    extension.set_architecture(80)
    torch.use_deterministic_algorithms(False)


def check(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> None:
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def expected(dtype: torch.dtype) -> Any:
        return reference.attention(q.to(dtype), k.to(dtype), v.to(dtype), scale=scale, return_lse=True)

    ours = attention_forward(q, k, v, scale)
    assert_as_right_as_eager(ours, expected(q.dtype), expected(torch.float64), names=("out", "lse"))


def make(
    queries: int, keys: int, dim: int, dtype: torch.dtype = torch.bfloat16, batch: int = 1, heads: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(batch, t, heads, dim, dtype=dtype) for t in (queries, keys, keys))


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_head_dim(dim: int) -> None:
    """Two tiles of rows, the second of which is short, and keys that are no multiple of anything."""
    check(*make(67, 75, dim, heads=2))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim, keys", [(32, 150), (32, 257), (64, 33), (64, 65), (64, 129), (64, 197), (64, 257),
                                       (80, 197), (80, 257), (96, 129), (96, 197), (128, 112), (128, 130)])  # fmt: skip
def test_every_tiling_in_one_block_of_keys(dim: int, keys: int, dtype: torch.dtype) -> None:
    check(*make(30, keys, dim, dtype))


@pytest.mark.parametrize("dim, keys", [(32, 500), (64, 300), (64, 577), (72, 400), (80, 300), (88, 265), (104, 257),
                                       (128, 197), (128, 250)])  # fmt: skip
def test_blocks_of_keys(dim: int, keys: int) -> None:
    """Online softmax; also of rows whose highest scores come block by block."""
    q, k, v = make(70, keys, dim)
    check(q, k * torch.linspace(0.2, 2, keys).view(1, -1, 1, 1).to(k.dtype), v)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65])
def test_small_and_odd_sizes(tokens: int) -> None:
    check(*make(tokens, tokens, 64))


@pytest.mark.parametrize("queries, keys", [(1, 197), (197, 1), (1, 600), (300, 20)])
def test_queries_and_keys_differ(queries: int, keys: int) -> None:
    check(*make(queries, keys, 64, torch.float16))


@pytest.mark.parametrize("batch, heads, tokens", [(3, 5, 50), (3, 3, 197), (2, 4, 300), (5, 3, 129)])
def test_more_heads_than_multiprocessors(batch: int, heads: int, tokens: int) -> None:
    """Rings go round, warpgroups take turns, and results wait in the slots of the queries."""
    check(*make(tokens, tokens, 64, batch=batch, heads=heads))


@pytest.mark.parametrize("tokens", [65, 257])
@pytest.mark.parametrize("dim", [64, 72])
def test_packed(dim: int, tokens: int) -> None:
    """q, k and v as they lie in one tensor."""
    qkv = torch.randn(2, tokens, 3, 3, dim, dtype=torch.float16)
    check(*qkv.unbind(2))


def test_strided() -> None:
    """Heads before tokens, and rows in wider ones of NaN."""
    q = torch.randn(2, 3, 40, 64, dtype=torch.float16).transpose(1, 2)
    wide = torch.full((2, 45, 3, 80), torch.nan, dtype=torch.float16)
    wide[..., 8:72] = torch.randn(2, 45, 3, 64)
    check(q, wide[..., 8:72], q[:1, :1].expand(2, 45, 3, 64).contiguous())


def test_neighbours_do_not_leak() -> None:
    """Rows of other images, heads and columns are NaN: the masks, and TMA's edges, keep all of them out."""
    tokens = 100
    whole = torch.full((3, tokens, 3, 3, 72), torch.nan, dtype=torch.float16)
    whole[1, :, :, 1] = torch.randn(tokens, 3, 72)
    check(*whole[1:2, :, :, 1:2].unbind(2))


@pytest.mark.parametrize("tokens", [40, 257, 300])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
def test_scales(scale: float, tokens: int) -> None:
    check(*make(20, tokens, 64, torch.float16), scale=scale)


def test_large_scores() -> None:
    """Scores of 20000: one key takes all, and its value comes out within the roundings of P and of the result."""
    q, k, v = make(33, 100, 64, torch.float16)
    out, _ = attention_forward(30 * q, 30 * k, v, 1.0)
    exact = reference.attention((30 * q).double(), (30 * k).double(), v.double(), scale=1.0)
    torch.testing.assert_close(out.double(), exact, rtol=2**-10, atol=1e-6)


def test_empty() -> None:
    q, k, v = make(4, 5, 64)
    out, lse = attention_forward(q[:0], k[:0], v[:0], 1.0)
    assert out.shape == (0, 4, 1, 64) and lse.shape == (0, 1, 4)
    out, _ = attention_forward(q[:, :0], k, v, 1.0)
    assert out.shape == (1, 0, 1, 64)


def test_same_bits_twice() -> None:
    q, k, v = make(100, 300, 64, heads=3)
    for a, b in zip(attention_forward(q, k, v, 0.1), attention_forward(q, k, v, 0.1), strict=True):
        assert torch.equal(a, b)
