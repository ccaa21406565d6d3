"""BEiT's block on the Triton kernels, in the interpreter, against timm's."""

from __future__ import annotations

import copy

import pytest
import torch

import fastvit
from beit_cases import OPTIONS, WIDTH, pair, run
from numerics import assert_as_right_as_eager, assert_model_as_right_as_eager


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_block_is_as_right_as_timms(dtype: torch.dtype) -> None:
    ours, theirs = pair(dtype, **OPTIONS["BEiT"])
    x = torch.randn(2, 13, WIDTH, dtype=dtype)
    want, exact = run(copy.deepcopy(theirs), x), run(copy.deepcopy(theirs).double(), x.double())
    with fastvit.backend("triton"):
        got = run(ours, x)
    runs = [list(each.values()) for each in (got, want, exact)]
    if dtype == torch.float32:
        assert_as_right_as_eager(*runs, names=list(got))
    else:
        assert_model_as_right_as_eager(*runs)
