"""The CUDA kernels for rows of attention's weights and for distances, on the CPU, by the error rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit import analysis, reference
from fastvit.cuda.attention_rows import attention_distance, attention_rows
from head_dims import HEAD_DIMS
from numerics import assert_as_right_as_eager

HALF = (torch.float16, torch.bfloat16)


def make(queries: int, keys: int, dim: int, dtype: torch.dtype, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and their log-sum-exp."""
    q, k = (torch.randn(2, tokens, heads, dim).to(dtype) for tokens in (queries, keys))
    return q, k, reference.attention(q, k, k, return_lse=True)[1]


def check_rows(q: Tensor, k: Tensor, lse: Tensor, rows: list[int], **options: Any) -> None:
    at = torch.tensor(rows, dtype=torch.int64)
    bias = reference.bias_of_rows(q, at % q.shape[1], torch.float32, None, **options)
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[2], len(rows), k.shape[1])
    ours = attention_rows(q, k, lse, at, q.shape[-1] ** -0.5, bias=bias)
    eager = reference.attention_rows(q, k, lse, at, **options)
    exact = reference.attention_rows(q.double(), k.double(), lse.double(), at, **options)
    assert_as_right_as_eager(ours, eager, exact)


def check_distance(q: Tensor, k: Tensor, lse: Tensor, grid: tuple[int, int], patch_size: tuple[float, float]) -> None:
    ours = attention_distance(q, k, lse, q.shape[-1] ** -0.5, grid, patch_size)
    eager = reference.attention_distance(q, k, lse, grid, patch_size=patch_size)
    exact = reference.attention_distance(q.double(), k.double(), lse.double(), grid, patch_size=patch_size)
    assert_as_right_as_eager(ours, eager, exact)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    q, k, lse = make(13, 13, dim, dtype)
    check_rows(q, k, lse, [0, 12, 3])
    check_distance(q, k, lse, (3, 4), (16.0, 16.0))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 197), (70, 1), (130, 64), (65, 129)])
def test_queries_and_keys_differ(queries: int, keys: int, dtype: torch.dtype) -> None:
    check_rows(*make(queries, keys, 32, dtype), list(range(queries)))


def test_rows_count_from_the_end_repeat_and_may_be_none() -> None:
    q, k, lse = make(9, 21, 32, torch.float16)
    check_rows(q, k, lse, [-1, 8, 0, -9, 0])
    out = attention_rows(q, k, lse, torch.tensor([9, -10, 2**40, 1]), 0.2)
    assert out[:, :, :3].isnan().all()
    assert torch.equal(out[:, :, 3:], attention_rows(q, k, lse, torch.tensor([1]), 0.2))


def test_what_is_added_to_the_scores() -> None:
    q, k, _ = make(7, 7, 40, torch.float16)
    mask = torch.rand(2, 7) < 0.5
    mask[1] = False
    mask[0, 0] = True
    for options in (
        {"bias": torch.randn(2, 1, 7, 7)},
        {"rel_pos_table": torch.randn(3 * 5 + 3, 2), "window": (2, 3), "key_mask": mask},
    ):
        _, lse = reference.attention(q, k, k, return_lse=True, **options)
        check_rows(q, k, lse, [0, 6, 3], **options)
    added = reference.bias_of_rows(q, torch.arange(7), torch.float32, None, **options).expand(2, 2, 7, 7)
    assert (attention_rows(q, k, lse, torch.arange(7), 0.2, bias=added)[1] == 0).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("grid", "prefix"), [((1, 1), 0), ((8, 9), 0), ((3, 43), 1), ((16, 4), 5)])
def test_distances(grid: tuple[int, int], prefix: int, dtype: torch.dtype) -> None:
    tokens = grid[0] * grid[1] + prefix
    check_distance(*make(tokens, tokens, 32, dtype), grid, (14.0, 16.0))


def test_views_of_a_packed_projection() -> None:
    qkv = torch.randn(2, 13, 3, 2, 32).half()
    qkv[:, :, 2] = torch.nan
    q, k, _ = qkv.unbind(2)
    lse = reference.attention(q, k, k, return_lse=True)[1]
    check_rows(q, k, lse, [1, 2])
    check_distance(q, k, lse, (3, 4), (1.0, 1.0))


def test_analysis_runs_on_the_kernels() -> None:
    model = fastvit.ViT(img_size=24, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=0).half()
    images = torch.randn(1, 3, 24, 24).half()
    for look in (analysis.attention_maps, analysis.rollout, analysis.mean_attention_distance):
        found = []
        for backend in ("cuda", "reference"):
            with fastvit.backend(backend):
                found.append(look(model, images))
        torch.testing.assert_close(*found, rtol=1e-2, atol=1e-3)


def test_nothing_to_do() -> None:
    q, k, lse = make(3, 3, 32, torch.float16)
    assert attention_rows(q, k[:, :0], lse, torch.tensor([0]), 1.0).shape == (2, 2, 1, 0)
    assert attention_rows(q, k, lse, torch.empty(0, dtype=torch.int64), 1.0).shape == (2, 2, 0, 3)
    assert (attention_rows(q, k, torch.full_like(lse, -math.inf), torch.tensor([0]), 1.0) == 0).all()
    assert attention_distance(q[:0], k[:0], lse[:0], 1.0, (1, 2), (1.0, 1.0)).shape == (0, 2)


def test_what_is_refused() -> None:
    q, k, lse = make(3, 3, 32, torch.float16)
    with pytest.raises(RuntimeError, match=r"rows; accepted: \(R,\) int64"):
        attention_rows(q, k, lse, torch.tensor([0], dtype=torch.int32), 1.0)
    with pytest.raises(RuntimeError, match="a grid of 2x2; accepted: up to the 3 tokens"):
        attention_distance(q, k, lse, 1.0, (2, 2), (1.0, 1.0))
    with pytest.raises(RuntimeError, match=r"lse; accepted: \(2, 2, 3\) float32, contiguous"):
        attention_rows(q, k, lse[:, :1], torch.tensor([0]), 1.0)
