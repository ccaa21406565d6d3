"""Runs of ``fastvit train`` that end before their end: killed, stopped, refused, without numbers; and go on."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from training_cases import checkpoint, linear, lines, plain, same_run, some, train, weights

import fastvit
from fastvit import cli
from fastvit.data.datasets import Data, Split
from fastvit.training import build, loop
from fastvit.training.objectives import Batch, Classification, Objective
from fastvit.training.recipes import Recipe
from processes import spawn


class Bad(Classification):
    """Its loss, or its gradient, is no number in the step after ``good``."""

    def __init__(self, good: int, where: str, model: nn.Module | None = None) -> None:
        super().__init__(model or linear(), 10)
        self.good, self.where = good, where

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        found = super().forward(batch)
        if self.training:
            self.good -= 1
            if self.good < 0 and self.where == "loss":
                found["loss"] = found["loss"] * math.nan
            if self.good < 0 and self.where == "gradient":
                found["loss"] = found["loss"] + 0 * torch.sqrt(self.model[1].bias - self.model[1].bias.detach()).sum()
        return found


@pytest.mark.parametrize(("where", "name"), [("loss", "loss"), ("gradient", "grad_norm")])
def test_a_run_without_numbers_stops(where: str, name: str, tmp_path: Path) -> None:
    """The weights are as before that step, and so is the checkpoint."""
    objective = Bad(3, where)
    with pytest.raises(loop.Diverged, match=rf"{name} is nan at step 4, lr .*; the last checkpoint.*checkpoint\.pt"):
        train(tmp_path, plain(), objective=objective, checkpoint_every=2)
    state = checkpoint(tmp_path)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["objective"].values())
    assert all(p.isfinite().all() for p in objective.parameters())
    assert not (tmp_path / "metrics.json").exists()
    with pytest.raises(loop.Diverged, match="there is no checkpoint yet"):
        train(tmp_path / "other", plain(), objective=Bad(0, where))


def test_weights_that_give_no_loss_are_in_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An update is known to be good by the next loss, the last one by the test set's."""
    wild = ["--set", "warmup_steps=0", "batch_size=16", "lr=1e20", "polyak=0", "weight_decay=0"]
    for steps in ("1", "4"):
        out = tmp_path / steps
        run = ["train", "--data", "digits", "--out", str(out), "--steps", steps, "--checkpoint-every", "1", *wild]
        assert cli.main(run) == 2
        where = "on the test set after step 1" if steps == "1" else "at step 2"
        error = capsys.readouterr().err
        assert where in error and "there is no checkpoint yet" in error
        assert not (out / "checkpoint.pt").exists() and not (out / "model.safetensors").exists()


def test_another_run_starts_from_one_that_is_not_done(tmp_path: Path) -> None:
    """Its checkpoint is a checkpoint as others are: of the averaged weights where there are any."""
    for polyak in (0.0, 0.5):
        out = tmp_path / str(polyak)
        torch.manual_seed(0)
        model = build.model_of("digits", plain(image_size=16), some())
        recipe = plain(image_size=16, polyak=polyak)
        with pytest.raises(loop.Diverged, match=rf"--weights {out} starts another run"):
            loop.train(Bad(4, "loss", model), some(), recipe, out, options=loop.Options(checkpoint_every=3),
                       config=build.describe(model, recipe))  # fmt: skip
        assert sorted(os.listdir(out)) == ["checkpoint.pt", "config.json", "log.jsonl", "run.json", "tensorboard"]
        state = checkpoint(out)
        expected = state["average" if polyak else "objective"]
        for source in (out, out / "checkpoint.pt"):
            again = fastvit.from_checkpoint(source, num_heads=3)
            for name, value in again.state_dict().items():
                assert torch.equal(value, expected[("module." if polyak else "") + f"model.{name}"])
        assert fastvit.from_checkpoint(out).blocks[0].attn.num_heads == 3


class Torn:
    """Reads images, of which one can't be read until it is mended."""

    def __init__(self, split: Split, number: int) -> None:
        self.split, self.number, self.mended = split, number, False

    def __call__(self, number: int) -> Any:
        if number == self.number and not self.mended:
            raise OSError("broken data stream")
        return self.split.read(number)

    def whole(self) -> Split:
        return replace(self.split, read=self)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("where", ["train", "test"])
def test_an_unreadable_image_costs_nothing(where: str, workers: int, tmp_path: Path) -> None:
    """It is named in a line, and what was done before it is kept: the file mended, the run ends as it would have."""
    train(tmp_path / "whole", plain())
    reader = Torn(some().train if where == "train" else some().test, 7)
    data = replace(some(), **{where: reader.whole()})

    def again() -> None:
        options = loop.Options(log_every=1, workers=workers)
        loop.train(Classification(linear(), 10), data, plain(), tmp_path / "cut", options=options)

    with pytest.raises(ValueError, match=r"^digit \d+ can't be read: broken data stream$"):
        again()
    step = checkpoint(tmp_path / "cut")["step"]
    assert step == (6 if where == "test" else len(lines(tmp_path / "cut"))) > 0
    reader.mended = True
    again()
    same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_folder_without_a_checkpoint_is_free(tmp_path: Path) -> None:
    """A run that ended before its first checkpoint leaves the folder free; a checkpoint knows its run."""
    with pytest.raises(loop.Diverged):
        train(tmp_path, plain(lr=0.5), objective=Bad(0, "loss"))
    train(tmp_path, plain())
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"another recipe\.lr"):
        train(tmp_path, plain(lr=0.5))


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "foreign", "log"])
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    train(tmp_path, plain())
    path = tmp_path / "checkpoint.pt"
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "garbage": b"x" * 999}.get(damage, data))
    if damage == "foreign":
        torch.save({"model": torch.ones(3)}, path)
    message = r"checkpoint\.pt is no checkpoint of a run, or is cut short .*; move it away"
    if damage == "log":
        (tmp_path / "log.jsonl").write_text("what is this\n")
        message = r"log\.jsonl is no log of a run"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, plain())


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """A limit of 1 MB on files: PyTorch's own error is of its zip."""
    limited = f"ulimit -f 1000; exec {sys.executable} -m fastvit {' '.join(command(tmp_path))}"
    found = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith(f"fastvit train: {tmp_path / 'checkpoint.pt'} can't be written: ")
    assert not (tmp_path / "checkpoint.part").exists()


def test_other_runs_are_refused(tmp_path: Path) -> None:
    """Of another recipe, model, objective, seed or data; nothing is changed."""
    train(tmp_path, plain())
    before = (tmp_path / "checkpoint.pt").read_bytes()

    class Other(Classification):
        pass

    small = some()
    cut = Data(small.train.subset(range(40)), small.test, 10, 1)
    deep = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 10))
    for objective, data, recipe, seed, message in (
        (Classification(linear(), 10), small, plain(lr=0.5), 0, r"another recipe\.lr \(there 0\.02, now 0\.5\)"),
        (Classification(linear(), 10), small, plain(steps=7), 0, r"recipe\.steps \(there 6, now 7\)"),
        (Classification(deep, 10), small, plain(), 0, "another parameters;"),
        (Other(linear(), 10), small, plain(), 0, "objective .there 'Classification', now 'Other'"),
        (Classification(linear(), 10), cut, plain(), 0, "another labels;"),
        (Classification(linear(), 10), small, plain(), 1, "seed .there 0, now 1"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.train(objective, data, recipe, tmp_path, seed=seed)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_finished_run_says_the_same_again(tmp_path: Path) -> None:
    first = train(tmp_path, plain(polyak=0.5))
    log, metrics = (tmp_path / "log.jsonl").read_text(), (tmp_path / "metrics.json").read_text()
    again = train(tmp_path, plain(polyak=0.5), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert (tmp_path / "metrics.json").read_text() == metrics
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle of writing: the run ends as it would have, started again."""
    train(tmp_path / "whole", plain(optimizer="sgd"), checkpoint_every=2)
    save, calls = torch.save, []

    def filled(state: Any, file: Any) -> None:
        calls.append(state["step"])
        if len(calls) == 2:
            file.write(b"a part")
            raise OSError("No space left on device")
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", filled)
        with pytest.raises(OSError, match="No space"):
            train(tmp_path / "cut", plain(optimizer="sgd"), checkpoint_every=2)
    assert calls == [2, 4]
    with (tmp_path / "cut" / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "spl')
    assert checkpoint(tmp_path / "cut")["step"] == 2
    train(tmp_path / "cut", plain(optimizer="sgd"), checkpoint_every=2)
    same_run(tmp_path / "cut", tmp_path / "whole")


def test_an_objectives_own_parameters_are_trained_and_stay_in_checkpoints_alone(tmp_path: Path) -> None:
    class Scaled(Objective):
        def __init__(self) -> None:
            super().__init__()
            self.model = linear()
            self.scale = nn.Parameter(torch.ones(1, 1))

        def forward(self, batch: Batch) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.model(batch["image"]) * self.scale, batch["label"])}

        def no_weight_decay(self) -> set[str]:
            return {"scale"}

    objective = Scaled()
    optimizer = loop.optimizer_of(objective, plain())
    assert [p is objective.scale for p in optimizer.param_groups[1]["params"]] == [True, False]
    start = copy.deepcopy(objective)
    found = train(tmp_path, plain(), objective=objective)
    assert not torch.equal(objective.scale, start.scale)
    assert set(found) == {"1.weight", "1.bias"}
    assert "scale" in checkpoint(tmp_path)["objective"]


def test_examples_are_what_a_run_learns_from() -> None:
    def run(data: Data, recipe: Recipe, world: int = 1) -> loop.Run:
        place = loop.Place(0, world, torch.device("cpu"))
        return loop.Run(Classification(linear(), 10), data, recipe, Path(), 3, loop.Options(), place)

    found = run(some(), plain(examples=20)).data.train.labels
    assert found.tolist() == some().limit(20, 3).train.labels.tolist()
    with pytest.raises(ValueError, match="examples=49 of 48 training images"):
        run(some(), plain(examples=49))
    with pytest.raises(ValueError, match="the training set has no images"):
        run(replace(some(), train=some().train.subset([])), plain())
    with pytest.raises(ValueError, match="batch_size=16 can't be shared by 3 processes"):
        run(some(), plain(), world=3)


def command(out: Path, *more: str) -> list[str]:
    return [
        "train", "--data", "digits", "--out", str(out), "--steps", "24", "--checkpoint-every", "4", "--set",
        "batch_size=32", "warmup_steps=2", "dropout=0.1", "mixup=0.2", "micro_batch=24", "crop=affine", *more,
    ]  # fmt: skip


def wait(process: subprocess.Popen[Any], done: Callable[[], bool]) -> None:
    """Wait until a process has written something."""
    while not done():
        assert process.poll() is None
        time.sleep(0.01)


def start(*arguments: str, **options: Any) -> subprocess.Popen[Any]:
    """``fastvit`` in a process of its own, with as many threads as this one."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, "-m", "fastvit", *arguments], env=env, **options)


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, averages and the log, bit for bit; with dropout, accumulation, and images that a worker augments."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main(command(whole)) == 0
    process = start(*command(cut, "--workers", "1"), stderr=subprocess.DEVNULL)
    wait(process, lambda: (cut / "checkpoint.pt").exists())
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < checkpoint(cut)["step"] < 24
    assert not (cut / "metrics.json").exists()
    capsys.readouterr()
    assert cli.main(command(cut)) == 0
    accuracy = json.loads((whole / "metrics.json").read_text())["test"]["accuracy"]
    assert capsys.readouterr().out == f"test accuracy: {accuracy:.2%}\n"
    same_run(cut, whole)
    for name in ("metrics.json", "run.json"):
        assert (cut / name).read_text() == (whole / name).read_text()
    assert sorted(os.listdir(cut)) == sorted(os.listdir(whole))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_with_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    """Between two steps; it ends as an uninterrupted one. Ctrl-C reaches the workers too."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ["train", "--data", "digits", "--set", "warmup_steps=2", "--steps", "40"]
    arguments += ["--checkpoint-every", "1000", "--out"]
    assert cli.main([*arguments, str(whole)]) == 0
    process = start(*arguments, str(cut), "--workers", "1", stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait(process, lambda: (cut / "log.jsonl").exists() and bool(lines(cut)))
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == 130
    step = checkpoint(cut)["step"]
    assert 10 <= step < 40
    assert error.splitlines()[-1] == f"fastvit train: stopped after step {step}; the same command goes on from there"
    assert cli.main([*arguments, str(cut)]) == 0
    same_run(cut, whole)


def torchrun(world: int, arguments: list[str]) -> list[str]:
    """Return the command line of torchrun."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return [*run, "-m", "fastvit", *arguments]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The loss of every tenth step to 1e-5, and the accuracy; gradients accumulated too; copied and sharded."""
    more = ("--set", "dropout=0", "mixup=0", "micro_batch=10", "optimizer=sgd", "lr=0.2", "crop=none", "--steps", "60")
    subprocess.run(torchrun(1, command(tmp_path / "one", *more)), check=True)
    one = lines(tmp_path / "one")
    assert len(one) == 6
    assert (
        max(line["loss"] for line in one) - min(line["loss"] for line in one) > 0.1
    )  # or the comparison proves nothing
    for name, fsdp in (("copied", ()), ("sharded", ("--fsdp",))):
        out = tmp_path / name
        subprocess.run(torchrun(2, command(out, *more, *fsdp)), check=True)
        for a, b in zip(one, lines(out), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        tests = [lines(run, "test")[0] for run in (tmp_path / "one", out)]
        assert tests[0]["loss"] == pytest.approx(tests[1]["loss"], abs=1e-5)
        assert tests[0]["accuracy"] == tests[1]["accuracy"]
        for key, value in weights(tmp_path / "one").items():
            torch.testing.assert_close(weights(out)[key], value, rtol=1e-3, atol=1e-4)


def evaluated(out: Path, fsdp: bool) -> dict[str, float]:
    """Return the test scalars of an untrained model on one image, in one process or in each of several."""
    torch.manual_seed(0)
    data = some()
    data = Data(data.train, data.test.subset([3]), data.classes, data.channels)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    place = loop.Place(rank, world, torch.device("cpu"))
    model = build.model_of("digits", plain(), data)
    return loop.Run(Classification(model, 10), data, plain(), out, 0, loop.Options(fsdp=fsdp), place).evaluate()


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_fewer_test_images_than_processes(fsdp: bool, tmp_path: Path) -> None:
    found = spawn(2, tmp_path / "found", {"test": (evaluated, (tmp_path, fsdp))})["test"]
    assert found == pytest.approx(evaluated(tmp_path, False), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_sharded_run_ends_as_an_uninterrupted_one(how: signal.Signals, tmp_path: Path) -> None:
    """Both of its processes killed or stopped; Adam's moments, averages and dropout go on in each."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(torchrun(2, command(whole, "--fsdp")), check=True)
    process = subprocess.Popen(torchrun(2, command(cut, "--fsdp")), start_new_session=True)
    wait(process, lambda: (cut / "checkpoint.pt").exists())
    os.killpg(process.pid, how) if how == signal.SIGKILL else process.send_signal(how)
    process.wait()
    assert 0 < checkpoint(cut)["step"] < 24
    subprocess.run(torchrun(2, command(cut, "--fsdp")), check=True)
    same_run(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_digits(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The defaults reach 98% of the 360 test images, in less than 200 seconds of CPU."""
    began = time.process_time()
    assert cli.main(["train", "--data", "digits", "--out", str(tmp_path), "--seed", str(seed)]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["accuracy"] >= 0.98
    assert time.process_time() - began < 200
