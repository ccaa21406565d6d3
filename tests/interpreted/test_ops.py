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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_deterministic(case: Case) -> None:
    assert_same_bits_twice(case.kernel, case.args(torch.float16, "cpu"))
