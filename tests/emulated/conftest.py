"""These tests run the CUDA kernels' own sources on the CPU, compiled by g++ (tests/emulator), on CPU tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastvit.cuda import extension
from fastvit.ops.library import implement_on_cpu

_SCRIPT = Path(__file__).resolve().parents[1] / "emulator" / "build.py"


@pytest.fixture(scope="session", autouse=True)
def library() -> Path:
    """The kernels for this CPU, brought up to date; from now on ``fastvit.cuda`` runs CPU tensors by them."""
    spec = importlib.util.spec_from_file_location("emulated_build", _SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path: Path = script.build()
    extension.emulate(path)
    implement_on_cpu()
    return path


@pytest.fixture(autouse=True)
def _poisoned(poison: None) -> None:
    """Every test here finds NaN in new memory."""


@pytest.fixture
def _eager_in_its_own_dtype() -> Iterator[None]:
    """Where a mask has a gradient PyTorch's attention would compute in float32, which is no eager result in 16 bits."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
