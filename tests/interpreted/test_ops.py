"""Every op through ``fastvit.ops`` on the Triton backend, in the interpreter: forward and every gradient."""

from __future__ import annotations

import pytest
import torch

import fastvit
from cases import CASES, Case, with_shared_residual
from fastvit import ops, reference
from numerics import DTYPES, assert_same_bits_twice, check_op


@pytest.fixture(autouse=True)
def _triton():
    with fastvit.backend("triton"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_is_as_right_as_eager(case: Case, dtype: torch.dtype) -> None:
    check_op(case.kernel, case.reference, case.args(dtype, "cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [True, False])
def test_mlp_on_its_own_residual(dtype: torch.dtype, normed: bool) -> None:
    args = next(c for c in CASES if str(c) == "mlp-gelu").args(dtype, "cpu")
    del args["residual"]
    if not normed:
        args["norm"] = None
    check_op(with_shared_residual(ops.mlp), with_shared_residual(reference.mlp), args)


VECTORS = {
    "linear-merge": ("bias", "gamma", "row_scale"),
    "mlp-gelu": ("fc1_bias", "fc2_bias", "gamma", "row_scale"),
    "layer_norm-merge": ("weight", "bias", "gamma", "row_scale"),
    "patch_embed-uint8-nchw": ("bias", "mean", "std"),
}


@pytest.mark.parametrize("layout", ["every second", "one, expanded"])
@pytest.mark.parametrize(("name", "vector"), [(n, v) for n, vectors in VECTORS.items() for v in vectors])
def test_vectors_of_any_stride(name: str, vector: str, layout: str) -> None:
    args = next(c for c in CASES if str(c) == name).args(torch.float32, "cpu")
    given = args[vector]
    if layout == "every second":
        strided = given.detach().repeat_interleave(2)[::2]
    else:
        strided = (given.detach()[:1] + 1).expand_as(given)
    assert not strided.is_contiguous()
    args[vector] = strided.requires_grad_(given.requires_grad)
    check_op(getattr(ops, name.partition("-")[0]), getattr(reference, name.partition("-")[0]), args)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_deterministic(case: Case) -> None:
    assert_same_bits_twice(case.kernel, case.args(torch.float16, "cpu"))
