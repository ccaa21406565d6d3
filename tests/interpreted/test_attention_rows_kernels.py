"""Rows of attention's weights and distances in the interpreter, against the reference, by the rule of numerics.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit import analysis, reference
from fastvit.triton.attention import attention_forward
from fastvit.triton.attention_rows import attention_distance, attention_rows
from fastvit.triton.launch import record
from numerics import DTYPES, assert_as_right_as_eager


def make(queries: int, keys: int, dim: int, dtype: torch.dtype, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and their log-sum-exp."""
    q, k = (torch.randn(2, tokens, heads, dim, dtype=dtype) for tokens in (queries, keys))
    return q, k, attention_forward(q, k, k, dim**-0.5)[1]


def check_rows(q: Tensor, k: Tensor, lse: Tensor, rows: list[int], **options: Any) -> None:
    at = torch.tensor(rows, dtype=torch.int64)
    bias = reference.bias_of_rows(q, at % q.shape[1], torch.float32, None, **options)
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[2], len(rows), k.shape[1])
    ours = attention_rows(q, k, lse, at, q.shape[-1] ** -0.5, bias=bias)
    eager = reference.attention_rows(q, k, lse, at, **options)
    exact = reference.attention_rows(q.double(), k.double(), lse.double(), at, **options)
    assert ours.dtype == torch.float32
    assert_as_right_as_eager(ours, eager, exact)


def check_distance(q: Tensor, k: Tensor, lse: Tensor, *args: Any, **options: Any) -> None:
    ours = attention_distance(q, k, lse, q.shape[-1] ** -0.5, *args, options.get("patch_size", (1.0, 1.0)))
    eager = reference.attention_distance(q, k, lse, *args, **options)
    exact = reference.attention_distance(q.double(), k.double(), lse.double(), *args, **options)
    assert_as_right_as_eager(ours, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 32, 72, 104, 128])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    q, k, lse = make(7, 7, dim, dtype)
    check_rows(q, k, lse, [0, 6, 3])
    check_distance(q, k, lse, (2, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 70), (70, 1), (70, 131)])
def test_queries_and_keys_differ(queries: int, keys: int, dtype: torch.dtype) -> None:
    check_rows(*make(queries, keys, 16, dtype), list(range(queries)))


def test_rows_count_from_the_end_and_repeat() -> None:
    q, k, lse = make(9, 21, 16, torch.float32)
    check_rows(q, k, lse, [-1, 8, 0, -9, 0])


def test_a_row_that_is_none_is_nan_and_reads_nothing_else() -> None:
    q, k, lse = make(9, 21, 16, torch.float32)
    out = attention_rows(q, k, lse, torch.tensor([9, -10, 2**40, 1]), 0.25)
    assert out[:, :, :3].isnan().all()
    assert torch.equal(out[:, :, 3:], attention_rows(q, k, lse, torch.tensor([1]), 0.25))


def test_what_is_added_to_the_scores() -> None:
    q, k, _ = make(7, 7, 16, torch.float32)
    mask = torch.rand(2, 7) < 0.5
    mask[1] = False
    mask[0, 0] = True
    for options in (
        {"bias": torch.randn(2, 1, 7, 7)},
        {"bias": torch.randn(1, 2, 1, 7), "key_mask": mask},
        {"rel_pos_table": torch.randn(3 * 5 + 3, 2), "window": (2, 3), "key_mask": mask},
        {"key_mask": mask},
    ):
        _, lse = reference.attention(q, k, k, return_lse=True, **options)
        check_rows(q, k, lse, [0, 6, 3], **options)
        if "key_mask" in options:
            added = reference.bias_of_rows(q, torch.arange(7), torch.float32, None, **options).expand(2, 2, 7, 7)
            assert (attention_rows(q, k, lse, torch.arange(7), 0.25, bias=added)[1] == 0).all()


def test_without_keys_or_rows() -> None:
    q, k = torch.randn(2, 3, 2, 8), torch.randn(2, 0, 2, 8)
    lse = torch.full((2, 2, 3), -math.inf)
    assert attention_rows(q, k, lse, torch.tensor([0]), 1.0).shape == (2, 2, 1, 0)
    assert attention_rows(q, q, lse, torch.empty(0, dtype=torch.int64), 1.0).shape == (2, 2, 0, 3)
    assert (attention_rows(q, q, lse, torch.tensor([0, 2]), 1.0) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("grid", "prefix"), [((1, 1), 0), ((8, 9), 0), ((3, 25), 1), ((5, 2), 5)])
def test_distances(grid: tuple[int, int], prefix: int, dtype: torch.dtype) -> None:
    tokens = grid[0] * grid[1] + prefix
    check_distance(*make(tokens, tokens, 16, dtype), grid, patch_size=(14.0, 16.0))


def test_views_are_read_as_they_are() -> None:
    """Of a packed projection with NaN for values; two launches for a distance, one for rows."""
    qkv = torch.randn(2, 13, 3, 2, 16)
    qkv[:, :, 2] = torch.nan
    q, k, _ = qkv.unbind(2)
    lse = attention_forward(q, k, k, 0.25)[1]
    check_rows(q, k, lse, [1])
    check_distance(q, k, lse, (3, 4))
    q, k, _ = torch.empty(8, 197, 3, 12, 64, dtype=torch.bfloat16, device="meta").unbind(2)
    lse = torch.empty(8, 12, 197, device="meta")
    with record(90) as launches:
        attention_rows(q, k, lse, torch.empty(1, dtype=torch.int64, device="meta"), 0.125)
        attention_distance(q, k, lse, 0.125, (14, 14), (16.0, 16.0))
    rows, distance, _ = launches
    assert rows.args["q_ptr"] is q and rows.args["BLOCK_M"] == 16
    assert distance.args["partials_ptr"].numel() == 4 * 8 * 12  # nothing of the size of the weights


def test_analysis_runs_on_the_kernels() -> None:
    model = fastvit.ViT(img_size=24, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    images = torch.randn(1, 3, 24, 24)
    for look in (analysis.attention_maps, analysis.rollout, analysis.mean_attention_distance):
        found = []
        for backend in ("triton", "reference"):
            with fastvit.backend(backend):
                found.append(look(model, images))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_head_dim_above_128_is_refused() -> None:
    q, lse = torch.randn(1, 2, 1, 136), torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="1 to 128, got 136"):
        attention_rows(q, q, lse, torch.tensor([0]), 1.0)
