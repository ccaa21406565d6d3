"""``fastvit train``: recipes, the loop, its checkpoints; killed runs, other runs in the same folder, lost runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FAST = ["--set", "batch_size=32", "warmup_steps=2", "dropout=0.1", "micro_batch=24"]


def command(out: Path, *more: str, steps: int = 30) -> list[str]:
    return [
        *(sys.executable, "-m", "fastvit", "train", "--data", "digits", "--out", str(out), "--steps", str(steps)),
        *(*FAST, "--checkpoint-every", "5", *more),
    ]


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments, **options), capture_output=True, text=True)


def killed(arguments: list[str], out: Path) -> None:
    """Start a run, and kill it as soon as it has a checkpoint."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """Weights, averages and the log, bit for bit; with dropout, accumulation, and images that workers augment."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run(whole)
    assert done.returncode == 0, done.stderr
    killed(command(cut, "--workers", "1"), cut)
    step = torch.load(cut / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < step < 30
    again = run(cut)
    assert again.returncode == 0, again.stderr
    assert f"goes on after step {step}" in again.stderr
    for name in ("model.safetensors",):
        expected, found = load_file(whole / name), load_file(cut / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert (cut / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    assert json.loads((cut / "metrics.json").read_text()) == json.loads((whole / "metrics.json").read_text())
    assert os.listdir(cut).sort() == os.listdir(whole).sort()
    assert not list(cut.glob("*.part"))
