"""These tests run the Triton kernels in Triton's interpreter, on CPU tensors, in a process of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreted needs TRITON_INTERPRET=1, set before Python starts: see `make test`")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """In deterministic mode PyTorch fills new memory with NaN: an element that a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
