"""Attention's kernels in the interpreter, against the reference and its gradients, by the rule of numerics.py."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import attention_cases
from attention_cases import make
from fastvit.triton.attention import attention_forward
from fastvit.triton.attention_backward import attention_backward
from fastvit.triton.launch import assume, record
from numerics import DTYPES

LAUNCHERS = (attention_forward, attention_backward)
check = partial(attention_cases.check, LAUNCHERS)


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
def test_gradient_of_the_output_alone(dtype: torch.dtype) -> None:
    check(make(17, 33, 32, dtype), lse=False)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_any_scale(scale: float) -> None:
    check(make(19, 70, 16, torch.float32), scale=scale)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 20])  # 20: rows that are not 16-byte aligned
def test_packed(dim: int, dtype: torch.dtype) -> None:
    attention_cases.check_packed(LAUNCHERS, dim, dtype)


@pytest.mark.parametrize("keys", [85])
def test_large_scores_neither_overflow_nor_reach_absent_keys(keys: int) -> None:
    attention_cases.check_large_scores(LAUNCHERS, make(21, keys, 16, torch.float32))


def test_strides_are_free() -> None:
    attention_cases.check_strides_are_free(LAUNCHERS, torch.float32, 18, 16)


@pytest.mark.parametrize("tokens", [19])
def test_memory_outside_the_tensors_is_left_alone(tokens: int) -> None:
    attention_cases.check_memory_outside_the_tensors_is_left_alone(LAUNCHERS, torch.float32, tokens, 24)
