"""Every script of examples/ runs as its first line says, in a few steps, and learns something where it trains."""

from __future__ import annotations

import csv
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Script: its argument (epochs, or steps), and what its last line says more than.
TRAINING = {
    "train.py": ("12", 55),
    "with_accelerate.py": ("8", 20),
    "with_lightning.py": ("4", 20),
    "with_timm.py": ("4", 20),
    "with_transformers.py": ("8", 20),
}


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, cwd=EXAMPLES.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_all_are_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        *TRAINING,
        "from_timm.py",
        "digits.py",
        "pretrain_digits.py",
        "accuracy_against_compute.py",
    }


def test_from_timm() -> None:
    found = re.fullmatch(r"vit_tiny_patch16_224: logits of timm and fastvit differ by at most (\S+)",
                         run("from_timm.py", "vit_tiny_patch16_224"))  # fmt: skip
    assert found is not None
    assert float(found[1]) < 1e-4


@pytest.mark.parametrize("script", TRAINING)
def test_training(script: str) -> None:
    argument, chance = TRAINING[script]
    found = re.fullmatch(r"(?:test accuracy|accuracy on new crops): ([\d.]+)%", run(script, argument))
    assert found is not None
    assert float(found[1]) > chance


@pytest.mark.slow
@pytest.mark.parametrize(("scratch", "pretrained"), [("scratch", "masked"), ("scratch_beit", "beit")])
def test_pre_training_beats_learning_from_scratch(scratch: str, pretrained: str) -> None:
    """The mean of three seeds, as in docs/explanation/pretraining.md; ten minutes each."""
    found = []
    for start in (scratch, pretrained):
        line = re.fullmatch(rf"{start} +lr 0.003: ([\d.]+) ± .*", run("pretrain_digits.py", "--start", start))
        assert line is not None
        found.append(float(line[1]))
    assert found[1] > found[0] + 1


def test_accuracy_against_compute(tmp_path: Path) -> None:
    """Every family, a batch or two each; the table has a row, and the plot a line, for each model."""
    last = run("accuracy_against_compute.py", "--out", str(tmp_path), "--epochs", "0.1", "0.2", "--warmup", "1")
    assert last == f"saved {tmp_path / 'compute.csv'} and compute.png"
    with (tmp_path / "compute.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["family"] for row in rows] == ["ViT"] * 4 + ["hybrid"] * 4 + ["ResNet"] * 4
    for row, twice in itertools.pairwise(rows):
        if row["model"] == twice["model"]:
            assert float(twice["TFLOP"]) == pytest.approx(2 * float(row["TFLOP"]))
    assert all(0 <= float(row["accuracy (%), seed 0"]) <= 100 for row in rows)
    assert np.asarray(Image.open(tmp_path / "compute.png")).std() > 10
