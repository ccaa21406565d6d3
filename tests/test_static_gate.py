"""``python -m benchmarks static``: what it writes, its limits, and the gate against the committed baseline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks.suites import static as gate
from benchmarks.suites import static_counts as counts
from fastvit import layers, ops
from fastvit.triton import launch

FILES = ("static.json", "static.csv", "static.png")


def _quick_run(folder: Path) -> int:
    return command.main(["static", "--quick", "--out", str(folder)])


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """The exit status and the folder of one quick run: all that is derived for ViT-B/16, its kernels for sm_90."""
    folder = tmp_path_factory.mktemp("quick")
    return _quick_run(folder), folder


@pytest.fixture(scope="module")
def found(quick: tuple[int, Path]) -> dict[str, Any]:
    return json.loads((quick[1] / "static.json").read_text())


def test_a_quick_run_passes(quick: tuple[int, Path], found: dict[str, Any]) -> None:
    status, folder = quick
    assert status == 0
    assert found["launches_per_block"] == 7
    assert 0.3 < found["saved_bytes_ratio_to_timm"] <= 0.63
    names = [row["name"] for row in found["kernels"]]
    assert len(names) > 20
    assert names == sorted(names)
    for row in found["kernels"]:
        assert {"name", "target", "registers", "spill_bytes", "shared_bytes", "hot", "constants"} <= row.keys()
        assert row["target"] == "sm_90"
        assert 0 < row["registers"] <= 255
    assert (folder / "static.csv").read_text().count("\n") == 1 + len(found["kernels"])
    assert (folder / "static.png").read_bytes().startswith(b"\x89PNG")


def test_two_runs_write_the_same_bytes(quick: tuple[int, Path], tmp_path: Path) -> None:
    """In another process, whose sets and dictionaries of strings are in another order."""
    arguments = [sys.executable, "-m", "benchmarks", "static", "--quick", "--out", str(tmp_path)]
    subprocess.run(arguments, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (quick[1] / name).read_bytes(), name


def test_the_committed_baseline_holds() -> None:
    """Launches, bytes and memory for backward of every model. (The kernels: in a complete run, and above for sm_90.)"""
    now = gate.figures({**counts.launches_and_bytes(counts.MODELS), **counts.saved(counts.MODELS), "kernels": []})
    kept = gate.figures(json.loads(gate.BASELINE.read_text()))
    worse, _ = gate.compare(now, {key: kept[key] for key in kept if not key.startswith("sm_")}, complete=True)
    assert not worse


def test_the_baseline_has_every_architecture() -> None:
    kept = gate.figures(json.loads(gate.BASELINE.read_text()))
    targets = {key.split()[0] for key in kept if key.startswith("sm_")}
    assert targets == {f"sm_{arch}" for arch in launch.ARCHITECTURES}
    assert all(value == 0 for key, value in kept.items() if key.endswith("linear_tma_kernel spill_bytes"))


def _one_more(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def with_a_norm(self: Any, x: Tensor, **options: Any) -> Tensor:
        return ops.layer_norm(forward(self, x, **options), self.norm1.weight, self.norm1.bias)

    return with_a_norm


def test_one_launch_more_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(layers.Block, "forward", _one_more(layers.Block.forward))
    assert _quick_run(tmp_path) == 1
    failed = capsys.readouterr().out.split("Failed:\n")[1]
    assert "launches_per_block: 8, at most 7 allowed" in failed
    assert "launches_per_block: 8, baseline 7" in failed
    assert "launches_per_model vit_base_patch16_224: " in failed
    assert "bytes_per_block forward plain: " in failed


def test_one_aten_op_more_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = layers.Block.forward
    monkeypatch.setattr(layers.Block, "forward", lambda self, x, **options: forward(self, x, **options) * 2)
    assert counts.launches_and_bytes(())["launches_per_block"] == 8


def test_one_tensor_more_kept_for_backward_is_caught(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> None:
    forward = layers.Block.forward
    monkeypatch.setattr(layers.Block, "forward", lambda self, x, **options: forward(self, x, **options).square())
    now = {**found, **counts.saved(())}
    assert any(line.startswith("saved_bytes_ratio_to_timm: 0.68") for line in gate.limits(now))
    assert any("saved_bytes_per_image block plain" in line for line in _worse(now))


def _worse(found: dict[str, Any]) -> list[str]:
    return gate.compare(gate.figures(found), gate.figures(json.loads(gate.BASELINE.read_text())), complete=False)[0]


def test_a_spill_is_caught_where_it_is_hot(found: dict[str, Any]) -> None:
    assert gate.limits(found) == []
    index = next(i for i, row in enumerate(found["kernels"]) if row["name"] == "linear_tma_kernel")
    kernels = [dict(row) for row in found["kernels"]]
    kernels[index]["spill_bytes"] = 88
    spilled = {**found, "kernels": kernels}
    (line,) = gate.limits(spilled)
    assert line.startswith("linear_tma_kernel on sm_90 spills 88 bytes: ")
    assert "sm_90 linear_tma_kernel spill_bytes: 88, baseline 0" in _worse(spilled)
    kernels[index]["hot"] = False
    assert gate.limits(spilled) == []


def test_compare() -> None:
    kept = {"same": 3, "more": 3, "less": 3, "gone": 3}
    held = {"same": 3, "more": 4, "less": 2, "new": 1}
    worse, better = gate.compare(held, kept, complete=True)
    assert worse == ["gone: in the baseline only", "more: 4, baseline 3", "new: in the run only"]
    assert better == ["less: 2, baseline 3"]
    assert gate.compare(held, kept, complete=False) == (["more: 4, baseline 3"], [])


def test_other_tritons_kernels_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept = {**json.loads(gate.BASELINE.read_text()), "versions": {"triton": "3.0"}}
    (tmp_path / "static.json").write_text(json.dumps(kept))
    monkeypatch.setattr(gate, "BASELINE", tmp_path / "static.json")
    now = {**gate.figures(kept), "launches_per_block": 8, "sm_90 linear_tma_kernel spill_bytes": 4}
    launch_line, spill_line = "launches_per_block: 8, baseline 7", "sm_90 linear_tma_kernel spill_bytes: 4, baseline 0"
    assert gate.against_baseline(now, "3.6.0", complete=True) == ([launch_line], [])
    assert "is for triton 3.0" in capsys.readouterr().out
    assert gate.against_baseline(now, "3.0", complete=True) == ([launch_line, spill_line], [])


def test_a_quick_run_is_no_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["static", "--quick", "--accept"])
    assert "--accept: not allowed with argument --quick" in capsys.readouterr().err


# --- what is counted -------------------------------------------------------------------------------------------


def test_fusions_end_at_our_block_and_pass_timms(found: dict[str, Any]) -> None:
    """Fused one after the other, they lead from ATen's own ops to ours; with attention alone, we are where timm is."""
    for name in counts.SCALES:
        steps, timms = found["waterfall"][name], found["timm_eager"][name]
        sizes = [step["bytes"] for step in steps]
        assert sizes == sorted(sizes, reverse=True)
        assert steps[-1]["launches"] == 7
        assert steps[-1]["bytes"] == found["bytes_per_block"]["forward"][name]
        assert steps[1]["launches"] == timms["launches"] == (10 if name == "plain" else 12)
        assert steps[1]["bytes"] == pytest.approx(timms["bytes"], rel=1e-3)  # statistics in other dtypes
    model = found["waterfall"]["model"]
    assert model[-1]["launches"] == found["launches_per_model"]["vit_base_patch16_224"]
    assert model[-2]["launches"] <= 12 * 7 + 3


def test_table_6() -> None:
    """Three rows of it; how far they are from the paper's is printed, and no test's business."""
    table = counts.table6([row for row in counts.TABLE6 if row[0] in ("ViT-B/32", "ViT-B/16", "R50x1+ViT-B/16")])
    b32, b16, hybrid = table
    assert b32["deviation"] == 0
    assert b32["exaflops"] == pytest.approx(3 * 8.818e9 * 7 * 303e6 / 1e18, abs=0.1)
    assert b16["exaflops"] / b32["exaflops"] == pytest.approx(35.128 / 8.818, abs=0.01)
    theirs = timm.create_model("vit_base_r50_s16_224", num_classes=1000).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(torch.empty(1, 3, 224, 224, device="meta"))
    assert hybrid["exaflops"] == pytest.approx(3 * counter.get_total_flops() * 7 * 303e6 / 1e18, rel=0.001)


@pytest.mark.slow
def test_a_complete_run_passes(tmp_path: Path) -> None:
    """Every configuration for six architectures, against the whole baseline."""
    assert command.main(["static", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "static.json").read_text())
    assert {row["target"] for row in found["kernels"]} == {f"sm_{arch}" for arch in launch.ARCHITECTURES}
    assert len(found["table6"]) == len(counts.TABLE6)
    assert torch.__version__ in found["versions"].values()
