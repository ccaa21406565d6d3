"""These tests run the Triton kernels in Triton's interpreter, on CPU tensors, in a process of their own."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreted needs TRITON_INTERPRET=1, set before Python starts: see `make test`")


@pytest.fixture(autouse=True)
def _poisoned(poison: None) -> None:
    """Every test here finds NaN in new memory."""
