"""Relative position keys (the ViT paper's appendix D.3) by the kernels for compute capability 8.0, run on the CPU:
output, log-sum-exp and every gradient, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit import ops, reference
from fastvit.attention_options import AttentionOptions
from fastvit.cuda import extension
from fastvit.cuda.attention import attention_forward
from head_dims import HEAD_DIMS
from numerics import assert_same_bits_twice, check_op

pytestmark = pytest.mark.usefixtures("_eager_in_its_own_dtype")

HALF = (torch.float16, torch.bfloat16)
DROPOUT = {"dropout_p": 0.3, "seed": torch.tensor([0x1234567_89ABCDEF])}


def attention(**args: Any) -> Any:
    with fastvit.backend("cuda"):
        return ops.attention(**args, return_lse=True)


def check(args: dict[str, Any]) -> None:
    check_op(attention, lambda **args: reference.attention(**args, return_lse=True), args)


def make(
    tokens: int,
    dim: int = 32,
    dtype: torch.dtype = torch.float16,
    batch: int = 2,
    heads: int = 2,
    shared: bool = False,
    keys_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    args = {name: torch.randn(batch, tokens, heads, dim, dtype=dtype).requires_grad_() for name in "qkv"}
    shape = (2 * tokens - 1, dim) if shared else (heads, 2 * tokens - 1, dim)
    return args | {"rel_pos_keys": torch.randn(shape).to(keys_dtype or dtype).requires_grad_()}


def random_mask(batch: int, keys: int) -> Tensor:
    mask = torch.rand(batch, keys) < 0.7
    mask[:, min(1, keys - 1)] = True
    return mask


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 80, 130])
def test_counts_of_tokens(tokens: int, shared: bool) -> None:
    """Both sides of a slice, a pair of slices, a warp's rows and a block's, in the forward and both walks back."""
    check(make(tokens, shared=shared))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    check(make(41, dim, dtype, batch=1))


def test_197_tokens() -> None:
    check(make(197, 64, torch.bfloat16, batch=1, shared=True))


@pytest.mark.parametrize("dtype", HALF)
def test_keys_of_another_dtype_are_rounded(dtype: torch.dtype) -> None:
    """Wide ones are parameters under autocast; their gradient is wide."""
    wide = make(21, dtype=dtype, keys_dtype=torch.float32)
    narrow = wide | {"rel_pos_keys": wide["rel_pos_keys"].detach().to(dtype).requires_grad_()}
    results = []
    for args in (wide, narrow):
        out, _ = attention(**args)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), list(args.values()))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.to(b.dtype), b)
    assert results[0][-1].dtype == torch.float32


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_with_everything(dtype: torch.dtype, shared: bool) -> None:
    more = {"key_mask": random_mask(2, 50), "scale": -0.2} | DROPOUT
    check(make(50, 40, dtype, shared=shared) | more)


def test_rows_without_keys() -> None:
    """Zeros, -inf, and no gradient; the other image as if it were alone."""
    mask = random_mask(2, 37)
    mask[0] = False
    args = make(37)
    out, lse = attention(**args, key_mask=mask)
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, list(args.values()), upstream)
    assert all((g[0] == 0).all() for g in gradients[:3])
    alone = {name: (t if name == "rel_pos_keys" else t[1:]) for name, t in args.items()}
    out, _ = attention(**alone, key_mask=mask[1:])
    (expected,) = torch.autograd.grad(out, args["rel_pos_keys"], upstream[1:])
    torch.testing.assert_close(gradients[-1], expected)


def test_strides() -> None:
    shared = torch.randn(32, 2 * 19).half().T[::2].requires_grad_()
    each = torch.randn(19, 2, 2 * 32).half().transpose(0, 1)[..., ::2].requires_grad_()
    for keys in (shared, each):
        check(make(10) | {"rel_pos_keys": keys})


def test_packed_qkv() -> None:
    qkv = torch.randn(2, 37, 3, 2, 72, dtype=torch.bfloat16).requires_grad_()
    args = {"qkv": qkv, "rel_pos_keys": torch.randn(73, 72, dtype=torch.bfloat16).requires_grad_()}

    def kernel(**args: Any) -> Any:
        with fastvit.backend("cuda"):
            return ops.attention_qkvpacked(**args, return_lse=True)

    check_op(kernel, lambda **args: reference.attention_qkvpacked(**args, return_lse=True), args)


def test_a_warp_of_rows_more_than_a_tile_of_shared_memory_has() -> None:
    """Head dim 128 where a block may take 99 KB: everything still fits."""
    extension.set_architecture(86)
    try:
        check(make(70, 128, batch=1))
    finally:
        extension.set_architecture(80)


def test_same_bits_twice() -> None:
    assert_same_bits_twice(attention, make(50, batch=3, shared=True) | {"key_mask": random_mask(3, 50)} | DROPOUT)


def test_empty_batch() -> None:
    args = make(20, batch=0)
    out, _ = attention(**args)
    (gradient,) = torch.autograd.grad(out, args["rel_pos_keys"], out)
    assert (gradient == 0).all()


def test_what_the_launchers_do_not_take_is_refused() -> None:
    q = torch.randn(1, 4, 2, 32).half()
    cu = torch.tensor([0, 4], dtype=torch.int32)
    keys = torch.randn(2, 7, 32)
    with pytest.raises(RuntimeError, match=r"rel_pos_keys; accepted: \(2, 7, 32\) float16 for as many queries as keys"):
        attention_forward(q, q, q, 1.0, AttentionOptions(rel_pos_keys=torch.randn(2, 8, 32)))
    with pytest.raises(RuntimeError, match=r"rel_pos_keys; accepted: \(2, 9, 32\) float16 for as many queries as keys"):
        attention_forward(q, torch.randn(1, 5, 2, 32).half(), torch.randn(1, 5, 2, 32).half(), 1.0,
                          AttentionOptions(rel_pos_keys=keys))  # fmt: skip
    with pytest.raises(RuntimeError, match="no bias, rel_pos_table, rel_pos_keys or key_mask"):
        attention_forward(q, q, q, 1.0, AttentionOptions(rel_pos_keys=keys, cu_q=cu, cu_k=cu, max_q=4, max_k=4))
