"""``fastvit tune`` from problem to measured table and back, on interpreted kernels: only the times mean nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastvit
from fastvit import cli, reference
from fastvit.triton import tiles
from fastvit.triton.linear import linear_forward
from fastvit.triton.tiles import Problem
from fastvit.tuning import candidates, tune
from numerics import assert_as_right_as_eager

CPU = torch.device("cpu")
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "SECONDS", 0)
    monkeypatch.setattr(tune, "FINALISTS", 1)
    tiles.reload()
    yield
    tiles.reload()


@pytest.fixture(scope="module")
def problems() -> tune.Problems:
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 16}
    model = fastvit.ViT(**options, device="meta", dtype=DTYPE)
    images = torch.empty(2, 3, 8, 8, device="meta", dtype=DTYPE, requires_grad=True)
    found = candidates.find_problems(model, images, 80, training=True)
    return {problem: (DTYPE, tile) for problem, tile in found.items()}


def one_of_each(problems: tune.Problems) -> tune.Problems:
    """The first problem of every kernel."""
    found: dict[tuple[object, ...], Problem] = {}
    for problem in problems:
        found.setdefault((problem.family, problem.key[0]), problem)
    return {problem: problems[problem] for problem in found.values()}


def test_every_kernel_has_a_call_and_passes_its_check(problems: tune.Problems) -> None:
    """The derived tile passes its own check, and so does the last candidate: the calls are sound."""
    some = one_of_each(problems)
    assert len(some) == 9  # three of linear, of attention and of patch embedding
    for problem, (dtype, derived) in some.items():
        assert candidates.is_reproducible(problem, dtype, 80)
        check = tune.AccuracyCheck(candidates.launcher_call(problem, dtype, CPU), derived)
        assert check.failure(candidates.candidate_configs(problem, 80, 3)[-1]) is None, str(problem)


def test_a_run_writes_resumes_and_is_used(problems: tune.Problems) -> None:
    table = tune.Table.open(tune.table_path(None, "interpreter"), "interpreter", 80, "fastvit tune")
    linear = {p: v for p, v in problems.items() if p.family == "linear" and p.key[0] in ("forward", "weight")}
    first, second = list(linear)[:2]

    assert tune.tune({first: linear[first]}, table, CPU, most=2, budget=0) == 1  # nothing is begun
    assert not table.path.exists()
    assert tune.tune({first: linear[first]}, table, CPU, most=2) == 0
    before = json.loads(table.path.read_text())
    ((row,),) = before["rows"]["linear"].values()
    assert row["timed"] == 2
    assert row["us"] > 0 and row["derived_us"] >= row["us"] and row["dtype"] == "bfloat16"
    assert before["versions"]["torch"] == torch.__version__

    resumed = tune.Table.open(table.path, "interpreter", 80)
    assert tune.tune({p: linear[p] for p in (first, second)}, resumed, CPU, most=2) == 0
    after = json.loads(table.path.read_text())
    assert sum(len(rows) for rows in after["rows"]["linear"].values()) == 2
    assert row in after["rows"]["linear"]["half"]  # it was not measured again
    assert not list(table.path.parent.glob("*.[0-9]*"))  # nothing unfinished is left
    assert tune.render(linear, resumed).count("\n") == 2


def test_a_launch_takes_the_measured_tile() -> None:
    """A table says 32 x 64, which no derived row does; the op runs with it and is right."""
    x, weight, bias = torch.randn(20, 32).to(DTYPE), torch.randn(48, 32).to(DTYPE), torch.randn(48).to(DTYPE)
    with tiles.record_problems() as derived:
        linear_forward(x, weight, bias)
    ((problem, before),) = derived.items()
    tile = {"form": "pointer", "block_m": 32, "block_n": 64, "block_k": 16, "parts": 2, "warps": 4, "stages": 2}
    assert before["block_m"] != 32
    table = tune.Table(tune.table_path(None, "interpreter"), "interpreter", 80)
    row = {"size": problem.size, "key": problem.fields, "tile": tile, "us": 1.0, "derived": before, "derived_us": 2.0}
    table.add(problem, row)
    with tiles.record_problems() as measured:
        out, _ = linear_forward(x, weight, bias)
    assert measured == {problem: tile}
    exact = reference.linear(x.double(), weight.double(), bias.double())
    assert_as_right_as_eager(out, reference.linear(x, weight, bias), exact)


def test_the_command_says_what_is_left(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--models", "vit_tiny_patch16_224", "--batch", "1", "--inference", "--budget", "0"]
    assert cli.main(["tune", *arguments, "--out", str(tmp_path / "mine.json")]) == 1
    out = capsys.readouterr().out
    assert f"{tmp_path / 'mine.json'}: 0 problems;" in out and "left: run the same again" in out
