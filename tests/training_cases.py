"""Helpers of the training tests: a few steps on a few digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastvit.data.datasets import Data, open_data
from fastvit.training import loop
from fastvit.training.objectives import Classification
from fastvit.training.recipes import Recipe


def plain(**changes: Any) -> Recipe:
    """Return a recipe for a few steps on small images, in which only the order is random."""
    fields: dict[str, Any] = {
        "steps": 6, "batch_size": 16, "lr": 0.02, "warmup_steps": 2, "crop": "none", "flip": False, "image_size": 8,
        "precision": "float32",
    }  # fmt: skip
    return Recipe(**fields | changes)


def some() -> Data:
    """Return 48 digits, and 20 to test on."""
    data = open_data("digits")
    return Data(data.train.subset(range(48)), data.test.subset(range(20)), 10, 1)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def lines(out: Path, split: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def train(out: Path, recipe: Recipe, model: nn.Module | None = None, **options: Any) -> dict[str, Tensor]:
    """Train a linear model, or another, and return its weights."""
    objective = options.pop("objective", None) or Classification(model or linear(), 10)
    loop.train(objective, some(), recipe, out, options=loop.Options(log_every=1, **options))
    return weights(out)


def same_run(one: Path, other: Path) -> None:
    """Assert that two runs end with the same weights and the same log, bit for bit."""
    expected = weights(other)
    assert all(torch.equal(value, expected[name]) for name, value in weights(one).items())
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()


def checkpoint(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return state
