"""Attention's kernels for compute capability 8.0, run on the CPU, against the reference and its gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor

import attention_cases
from attention_cases import make
from fastvit import reference
from fastvit.cuda import extension
from fastvit.cuda.attention import attention_backward, attention_forward
from head_dims import HEAD_DIMS
from numerics import assert_as_right_as_eager

HALF = (torch.float16, torch.bfloat16)
LAUNCHERS = (attention_forward, attention_backward)
check = partial(attention_cases.check, LAUNCHERS)


@contextmanager
def on(architecture: int) -> Iterator[None]:
    extension.set_architecture(architecture)
    yield
    extension.set_architecture(80)


def check_forward(sizes: Iterable[tuple[int, int, int]], dtype: torch.dtype, scale: float) -> None:
    """Outputs for all (queries, keys, d) together: what is rounded differently in one of them is a matter of luck."""
    kernel, eager, exact = [], [], []
    for queries, keys, dim in sizes:
        q, k, v = (x.detach() for x in make(queries, keys, dim, dtype).values())
        kernel.append(attention_forward(q, k, v, scale))
        for results, t in ((eager, dtype), (exact, torch.float64)):
            results.append(reference.attention(q.to(t), k.to(t), v.to(t), scale=scale, return_lse=True))

    def joined(results: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [torch.cat([x.flatten() for x in one]) for one in zip(*results, strict=True)]

    assert_as_right_as_eager(joined(kernel), joined(eager), joined(exact))


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(dim: int) -> None:
    """Online softmax and both gradients; 91 keys end in a slice of 8 (forward) or 16 and 8 (backward)."""
    check(make(37, 91, dim, HALF[dim // 8 % 2]))


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims_in_a_single_pass(dim: int) -> None:
    with on(100):  # whose shared memory fits them all twice
        check_forward([(19, 150, dim)], HALF[(dim // 8 + 1) % 2], 0.2)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 64), (8, 32), (16, 72), (17, 72), (50, 64), (65, 80), (145, 64)])
def test_token_counts(tokens: int, dim: int, dtype: torch.dtype) -> None:
    # Of one token nothing but the log-sum-exp has a gradient in q: one element, which eager rounds once less.
    check(make(tokens, tokens, dim, dtype), lse=tokens > 1)


@pytest.mark.parametrize("architecture", [80, 86])  # a single pass, and online where shared memory is short
@pytest.mark.parametrize("dtype", HALF)
def test_197_tokens(dtype: torch.dtype, architecture: int) -> None:
    with on(architecture):
        check(make(197, 197, 64, dtype))


def test_257_tokens_and_several_heads_and_images() -> None:
    check(make(257, 257, 32, torch.bfloat16, batch=2, heads=3))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("queries", "keys"), [(1, 197), (65, 17), (5, 300), (300, 5), (129, 193)])
def test_queries_and_keys_differ(queries: int, keys: int, dtype: torch.dtype) -> None:
    check(make(queries, keys, 40, dtype))


@pytest.mark.parametrize("architecture", [80, 86])
def test_every_count_of_keys(architecture: int) -> None:
    """Both sides of every slice and block, and of the counts that are taken in a single pass."""
    with on(architecture):
        check_forward([(3, keys, 64) for keys in range(1, 216)], torch.float16, -0.3)


@pytest.mark.parametrize("dim", [64, 80])
def test_every_count_of_rows_in_a_block(dim: int) -> None:
    """What does not fill a block, of keys in the query gradient and of queries in the other."""
    for rest in range(1, 66, 3):
        check(make(rest, rest + 1, dim, HALF[rest % 2]))


@pytest.mark.parametrize("dtype", HALF)
def test_gradient_of_the_output_alone(dtype: torch.dtype) -> None:
    check(make(17, 33, 32, dtype), lse=False)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
@pytest.mark.parametrize("keys", [70, 200])
def test_any_scale(keys: int, scale: float) -> None:
    check(make(19, keys, 32, torch.float16), scale=scale)


def test_empty_batch() -> None:
    q = torch.randn(0, 5, 2, 32).half()
    out, lse = attention_forward(q, q, q, 1.0)
    assert out.shape == (0, 5, 2, 32)
    assert lse.shape == (0, 2, 5)
    attention_backward(out, lse, q, q, q, out, lse, 1.0, *(torch.empty_like(q) for _ in range(3)))


def test_what_the_kernels_do_not_take_is_refused() -> None:
    def forward(*shape: int, dtype: torch.dtype = torch.float16) -> None:
        q = torch.randn(*shape).to(dtype)
        attention_forward(q, q, q, 1.0)

    for dim in (24, 36, 136):
        with pytest.raises(
            RuntimeError, match=f"head dim {dim}; accepted: multiples of 8 from 32 to 128|multiples of 8"
        ):
            forward(1, 3, 1, dim)
    with pytest.raises(RuntimeError, match="float32; accepted: float16, bfloat16"):
        forward(1, 3, 1, 64, dtype=torch.float32)
    q = torch.randn(1, 3, 1, 64).half()
    with pytest.raises(RuntimeError, match="v in bfloat16; accepted: q's float16"):
        attention_forward(q, q, q.bfloat16(), 1.0)
    with pytest.raises(RuntimeError, match="v with 4 in dimension 1; accepted: 3"):
        attention_forward(q, q, torch.randn(1, 4, 1, 64).half(), 1.0)
    out, lse = attention_forward(q, q, q, 1.0)
    unaligned = torch.empty(200).half()[1:193].view(q.shape)
    with pytest.raises(RuntimeError, match="dk with strides .*; accepted: .* multiples of 8"):
        attention_backward(q, None, q, q, q, out, lse, 1.0, torch.empty_like(q), unaligned, torch.empty_like(q))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [40, 64])
def test_packed(dim: int, dtype: torch.dtype) -> None:
    attention_cases.check_packed(LAUNCHERS, dim, dtype)


@pytest.mark.parametrize("keys", [85, 133])
def test_large_scores_neither_overflow_nor_reach_absent_keys(keys: int) -> None:
    attention_cases.check_large_scores(LAUNCHERS, make(21, keys, 32, torch.bfloat16))


def test_strides_are_free() -> None:
    attention_cases.check_strides_are_free(LAUNCHERS, torch.float16, 70, 40)


@pytest.mark.parametrize("tokens", [67, 150])
def test_memory_outside_the_tensors_is_left_alone(tokens: int) -> None:
    attention_cases.check_memory_outside_the_tensors_is_left_alone(LAUNCHERS, torch.float16, tokens, 72)
