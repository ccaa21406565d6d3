from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

from head_dims import QUICK

# What ships is tested, not tiles that somebody measured on this machine.
os.environ["FASTVIT_CACHE"] = os.path.join(tempfile.gettempdir(), "fastvit-tests-without-a-cache")


def pytest_configure(config: pytest.Config) -> None:
    if "not slow" in config.option.markexpr:
        os.environ.setdefault("FASTVIT_HEAD_DIMS", " ".join(map(str, QUICK)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill new memory with NaN (deterministic mode does that): an element that a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
