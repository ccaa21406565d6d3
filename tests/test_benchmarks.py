"""The benchmarks' machinery: that measurements are measured as they say, checked first, kept, and resumed."""

from __future__ import annotations

import copy
import csv
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import contenders, images, measure, measurements, networks, subjects
from benchmarks.measurements import Measurement, MeasurementFailed, Store, Unavailable
from benchmarks.race import race
from benchmarks.suite import Bar, locked
from benchmarks.suites import SUITES, throughput
from benchmarks.workers import Worker
from fastvit.integrations import accelerate

CPU = torch.device("cpu")
TINY = ["--models", "vit_tiny_patch16_224", "--sizes", "32", "--batch", "1", "--budget", "0.01", "--device", "cpu"]


def measurement(contender: str, **what: Any) -> Measurement:
    return Measurement(contender, tuple(what.items()))


def test_cpus_of_one_name_are_told_apart_by_their_instructions() -> None:
    old, new = ({"name": "AMD EPYC", "instructions": instructions} for instructions in ("AVX2", "AVX512"))
    assert measurements.slug(measurements.identity(old)) == "amd-epyc-avx2"
    assert measurements.identity(old) != measurements.identity(new)
    assert measurements.slug(measurements.identity({"name": "NVIDIA H200"})) == "nvidia-h200"


# --- a whole command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """One small run of the command, its JSON and its folder."""
    folder = tmp_path_factory.mktemp("out")
    contenders = ["--contenders", "timm", "fastvit", "fastvit-triton", "torchvision", "huggingface", "floor"]
    arguments = ["throughput", *TINY, *contenders, "--modes", "inference", "--dtype", "float32", "--out", str(folder)]
    assert command.main(arguments) == 0
    return json.loads((folder / "throughput.json").read_text()), folder


def test_rows(result: tuple[dict, Path]) -> None:
    rows = {row["contender"]: row for row in result[0]["measurements"]}
    assert list(rows) == ["timm", "fastvit", "fastvit-triton", "torchvision", "huggingface", "floor"]
    refused = rows.pop("fastvit-triton")
    assert refused["status"] == "unavailable"
    assert "triton takes CUDA tensors" in refused["reason"]
    baseline = rows["timm"]["images_per_s"]
    for row in rows.values():
        assert row["status"] == "ok", row
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["median_s"])
        assert row["ratio"] == pytest.approx(row["images_per_s"] / baseline)
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["timings"] >= 3
    for name in ("timm", "fastvit", "torchvision", "huggingface"):
        assert rows[name]["peak_bytes"] > 5.7e6 * 4
        assert 0 < rows[name]["max_abs_logit_error"] < 1e-4  # what a loaded model promises
    assert rows["floor"]["max_abs_logit_error"] is None


def test_files_say_where_they_come_from(result: tuple[dict, Path]) -> None:
    found, folder = result
    run = found["runs"][0]
    assert {"command", "commit", "code", "versions", "device", "started", "tiles"} == run.keys()
    assert run["command"].startswith("python -m benchmarks throughput --models vit_tiny_patch16_224")
    with (folder / "throughput.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["contender"] for line in lines] == [row["contender"] for row in found["measurements"]]
    assert float(lines[0]["images_per_s"]) == found["measurements"][0]["images_per_s"]
    picture = (folder / "throughput-inference.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_a_finished_cell_is_not_run_again(result: tuple[dict, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found, folder = result
    contenders = ["--contenders", "timm", "fastvit", "--modes", "inference", "--dtype", "float32", "--out", str(folder)]
    begun = time.monotonic()
    assert command.main(["throughput", *TINY, *contenders]) == 0
    assert time.monotonic() - begun < 5
    assert json.loads((folder / "throughput.json").read_text()) == found
    assert "2 of 2 measurements are finished" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ["throughput", "latency", "memory", "accuracy"])
def test_a_suite_on_a_gpu(suite: str, tmp_path: Path) -> None:
    sized = TINY[:6] if suite in ("memory", "accuracy") else TINY[:8]
    assert command.main([suite, *sized, "--device", "cuda", "--dtype", "bfloat16", "--out", str(tmp_path)]) in (0, 1)
    found = json.loads((tmp_path / f"{suite}.json").read_text())
    assert found["device"] == torch.cuda.get_device_name()
    ours = [row for row in found["measurements"] if row["contender"] in ("fastvit", "fastvit-triton", "fastvit-graph")]
    assert ours
    assert all(row["status"] == "ok" for row in ours if row.get("mode") != "training"), ours


@pytest.mark.parametrize("suite", ["latency", "memory", "accuracy"])
def test_the_other_suites_run(suite: str, tmp_path: Path) -> None:
    arguments = [suite, "--quick", "--device", "cpu", "--dtype", "float32", "--sizes", "32", "--batch", "1"]
    arguments += {"latency": ["--budget", "0.01"], "memory": ["--limit", "0.05", "--modes", "inference"]}.get(suite, [])
    arguments += ["--contenders", "timm", "fastvit"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / f"{suite}.json").read_text())["measurements"]
    assert [row["contender"] for row in rows] == ["timm", "fastvit"]
    for row in rows:
        if suite == "latency":
            assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
            assert (row["p99_s"] is None) == (row["timings"] < 100)
        if suite == "memory":
            assert row["weights_bytes"] < row["peak_bytes"] <= row["limit_bytes"] == int(0.05 * 2**30)
            assert 1 < row["largest_batch"] < row["too_large_batch"] <= row["largest_batch"] * 1.1 + 1
        if suite == "accuracy":
            assert 0 < row["mean_abs_logit_error"] < row["max_abs_logit_error"] < 1e-4
            assert len(row["block_errors"]) == 12
            assert all(0 < error < 1e-5 for error in row["block_errors"])


def test_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["throughput", "--batch", "0"], ["throughput", "--dtype", "int8"], ["latencyy"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 2
    out = ["--out", str(tmp_path), "--device", "cpu"]
    for arguments, said in (
        (["--models", "vit_bse"], "'vit_bse' is no network"),
        (["--contenders", "tim"], "no contender 'tim'"),
        (["--sizes", "8"], "8 pixels are too few"),
        (["--contenders", "floor", "--models", "resnet50"], "nothing to measure"),
        (["--out", __file__], "File exists"),
    ):
        assert command.main(["throughput", *out, *arguments]) == 2
        assert said in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command.main(["throughput", "--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err


# --- processes ------------------------------------------------------------------------------------------------


class Subject:
    """Something to be measured, whose ways to fail can be chosen."""

    def __init__(self, how: str = "") -> None:
        self.how = how
        if how == "no model":
            raise ImportError("no such library")

    def expected(self) -> float:
        return 1.0

    def prepare(self, expected: float, baseline: dict | None) -> dict:
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "missing":
            raise Unavailable("it is not installed")
        if self.how == "wrong":
            raise MeasurementFailed("wrong logits")
        if self.how == "hangs":
            time.sleep(100)
        return {"expected": expected, "batch": 2}

    def sample(self) -> list[float]:
        if self.how == "dies later":
            os._exit(3)
        return [0.2 if self.how == "slow" else 0.1]


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("no model", MeasurementFailed, "ImportError: no such library"),
        ("dies", MeasurementFailed, r"SIGKILL \(out of memory\?\)"),
        ("missing", Unavailable, "^it is not installed$"),
        ("wrong", MeasurementFailed, "^wrong logits$"),
        ("hangs", MeasurementFailed, "no answer to prepare within 2 s"),
    ],
)
def test_a_process_that_fails_says_why(how: str, error: type[Exception], said: str) -> None:
    with Worker(Subject, how, limit=60.0 if how != "hangs" else 2.0) as worker, pytest.raises(error, match=said):
        if how == "hangs":
            worker.limit = 60.0
            worker.call("expected")  # it is up
            worker.limit = 2.0
        worker.call("prepare", 1.0, None)


def test_contenders_take_turns_and_a_failure_costs_one_cell() -> None:
    entries = [measurement(how) for how in ("fast", "slow", "missing", "wrong", "dies", "dies later")]
    said: list[str] = []

    class Said(Bar):
        def say(self, text: str) -> None:
            said.append(text)

    with Said(0) as bar:
        rows = dict(race(entries, measurement("fast"), lambda one: Worker(Subject, one.contender), 0.0, bar))
    assert {one.contender: row["status"] for one, row in rows.items()} == {
        "fast": "ok",
        "slow": "ok",
        "missing": "unavailable",
        "wrong": "failed",
        "dies": "failed",
        "dies later": "failed",
    }
    assert rows[measurement("slow")]["ratio"] == pytest.approx(0.5)
    assert rows[measurement("slow")]["expected"] == 1.0
    assert "exit status 3" in rows[measurement("dies later")]["reason"]
    turns = [text.partition(",")[0].removeprefix("timing ") for text in said if text.startswith("timing")]
    assert turns == ["fast", "slow", "dies later", "slow", "fast", "fast", "slow"]  # each round led by another


def test_nothing_is_timed_that_has_nothing_to_be_checked_by() -> None:
    with Bar(0) as bar:
        rows = dict(
            race([measurement("fast")], measurement("dies"), lambda one: Worker(Subject, one.contender), 0.1, bar)
        )
    assert rows == {measurement("fast"): {"status": "failed", "reason": "dies, by which it is checked, failed"}}


# --- what is kept ---------------------------------------------------------------------------------------------


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "out"),
        pytest.raises(ValueError, match="another benchmark is running into"),
        locked(tmp_path / "out"),
    ):
        pass
    with locked(tmp_path / "out"):
        pass


def test_store_resumes_replaces_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = measurement("a", size=1), measurement("a", size=2)
    store = Store(tmp_path, "suite", "cpu", "first")
    assert not store.finished(one)
    store.add(one, {"status": "ok", "value": 1})
    store.add(other, {"status": "failed", "value": 2})
    again = Store(tmp_path, "suite", "cpu", "second")
    assert again.finished(one)
    assert again.finished(other)
    assert not again.finished(other, retry=True)
    monkeypatch.setattr(measurements, "code", lambda: "another")
    third = Store(tmp_path, "suite", "cpu", "third")
    assert not third.finished(one)  # measured by other code
    third.add(one, {"status": "ok", "value": 3})
    found = measurements.load(tmp_path / "suite.json")
    assert [(row["size"], row["value"], row["run"]) for row in found["measurements"]] == [(1, 3, 1), (2, 2, 0)]
    assert [run["command"] for run in found["runs"]] == ["first", "third"]
    found["device"] = "another device"
    (tmp_path / "suite.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="another device"):
        Store(tmp_path, "suite", "cpu", "")
    (tmp_path / "suite.json").write_text("{")
    with pytest.raises(ValueError, match="no result file"):
        Store(tmp_path, "suite", "cpu", "")


def test_the_digest_is_of_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fastvit/a.py", "kernels/triton/tables/t.json", "benchmarks/report/page.py", "docs/x.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(measurements, "ROOT", tmp_path)
    before = measurements.code()
    for name, changes in (
        ("fastvit/a.py", True),
        ("kernels/triton/tables/t.json", True),
        ("benchmarks/report/page.py", False),
        ("docs/x.md", False),
    ):
        (tmp_path / name).write_text("2")
        assert (measurements.code() != before) == changes, name
        before = measurements.code()


# --- contenders --------------------------------------------------------------------------------------------


def test_names_of_contenders() -> None:
    found = contenders.find("timm-compile-max")
    assert (found.library.title, found.way.compile) == ("timm", "max-autotune")
    assert contenders.find("fastvit-reference").library.backend == "reference"
    assert contenders.find("timm-xformers").library.how == "xformers attention"
    assert contenders.find("huggingface-accelerated-compile").how == "torch.compile, fastvit.accelerate"
    with pytest.raises(ValueError, match="no contender 'timm-graphs'"):
        contenders.find("timm-graphs")
    for suite in SUITES:
        for options in suite.defaults.values():
            assert suite.measurements(options) or options is suite.defaults["quick"]  # every name that ships exists


def test_weights_reach_every_layout() -> None:
    """In float64 they are the same function: no key was swapped, no epsilon differs."""
    accelerated = ("timm-accelerated", "torchvision-accelerated", "huggingface-accelerated")
    for name, size, libraries in (
        ("vit_tiny_patch16_224", 48, ("timm", "fastvit-reference", "torchvision", "huggingface", *accelerated)),
        ("resnetv2_50x1_bit", 64, ("timm", "fastvit")),
        ("resnet50", 64, ("torchvision",)),
    ):
        network = networks.build(name, size)
        batch = images.crops(1, size).double()
        with torch.no_grad():
            expected = copy.deepcopy(network.source).double()(batch)
            assert expected.std() > 1e-3
            for library in libraries:
                model = contenders.find(library).model(network, torch.float64, CPU, training=False)
                torch.testing.assert_close(model(batch), expected, rtol=1e-9, atol=1e-10, msg=f"{name} {library}")
                assert bool(accelerate.report(model).replaced) == (library in accelerated), library
    import fastvit

    fastvit.backend("auto")  # a contender's process is its own; this one is not


def test_networks() -> None:
    assert [networks.title(name) for name in ("vit_huge_patch14_224", "resnetv2_152x2_bit", "resnet50")] == [
        "ViT-H/14",
        "R152x2",
        "ResNet-50",
    ]
    network = networks.build("vit_tiny_patch16_224", 70)
    assert network.size == 64  # the next smaller one that 16 divides
    again = networks.build("vit_tiny_patch16_224", 70)
    for a, b in zip(network.source.parameters(), again.source.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not (a == 0).all()
    # Compared with a batch norm's initial statistics, those of photographs keep activations in range.
    resnet = networks.build("resnet50", 64).source
    with torch.no_grad():
        assert resnet(images.crops(2, 64)).abs().max() < 1e3


def test_a_model_that_computes_something_else_is_not_timed() -> None:
    one = measurement("fastvit", model="vit_tiny_patch16_224", size=32, mode="training", dtype="float32")
    subject, standard = subjects.ModelSubject(one, "cpu"), subjects.ModelSubject(subjects.baseline(one), "cpu")
    standard.call(1)()  # leaves gradients behind, which don't count
    expected = standard.expected()
    assert standard.check(expected)["max_abs_logit_diff"] == 0
    assert subject.check(expected)["max_abs_logit_error"] > 0
    with torch.no_grad():
        subject.model.get_parameter("blocks.3.mlp.fc2.bias").mul_(1.01)
    with pytest.raises(MeasurementFailed, match="wrong logits: the largest error is"):
        subject.check(expected)


def test_steps_leave_the_weights_alone() -> None:
    one = measurement("timm", model="vit_tiny_patch16_224", size=32, mode="training", dtype="float32")
    subject = subjects.ModelSubject(one, "cpu")
    before = copy.deepcopy(subject.model.state_dict())
    subject.call(2)()
    assert all(torch.equal(before[key], value) for key, value in subject.model.state_dict().items())
    assert all(parameter.grad.abs().sum() > 0 for parameter in subject.model.parameters())


def test_the_best_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {1: 5.0, 2: 10.0, 4: None, 8: 20.0, 16: 30.0, 32: 10.0, 64: 99.0}
    subject = throughput.Throughput.__new__(throughput.Throughput)
    subject.device = torch.device("meta")
    monkeypatch.setattr(subject, "_speed", speeds.__getitem__)
    assert subject._best([8, 16, 32, 64]) == 16  # 64 is not tried: 32 was slower
    assert subject._best([4, 8]) == 8 or subject._best([4, 8]) == 2
    speeds.update({1: None, 2: None})
    subject.network = networks.Network("x", "vit", 224, nn.Identity())
    with pytest.raises(MeasurementFailed, match="out of memory at batch 1"):
        subject._best([4])


# --- how it is measured ---------------------------------------------------------------------------------------


def test_summary() -> None:
    found = measure.summary([float(i) for i in range(1, 102)])
    assert (found["median_s"], found["p20_s"], found["p80_s"], found["p99_s"]) == (51, 21, 81, 100)
    assert found["spread"] == pytest.approx(60 / 51)
    assert measure.summary([1.0])["spread"] == 0
    assert measure.summary([1.0, 2.0])["p99_s"] is None  # two timings have no 99th percentile


def test_memory_counts_peaks_and_what_is_kept() -> None:
    linear, x = nn.Linear(64, 4096, bias=False), torch.randn(32, 64)
    weights, output = 64 * 4096 * 4, 32 * 4096 * 4
    kept: list[torch.Tensor] = []
    assert measure.held_bytes(linear) == weights
    with torch.no_grad():
        assert measure.memory(lambda: linear(x), CPU) == (pytest.approx(output, rel=0.02), 0)
        assert measure.memory(lambda: linear(x).exp(), CPU) == (pytest.approx(2 * output, rel=0.02), 0)
        peak, held = measure.memory(lambda: (kept.append(linear.weight.detach().clone()), linear(x)), CPU)
        assert peak == pytest.approx(weights + output, rel=0.02)
        assert held == pytest.approx(weights, rel=0.02)


def test_photographs_are_real_and_the_same_each_time() -> None:
    batch = images.crops(3, 32)
    assert batch.shape == (3, 3, 32, 32)
    torch.testing.assert_close(batch, images.crops(3, 32), rtol=0, atol=0)
    assert not torch.equal(batch, images.crops(3, 32, seed=1))
    assert -1 <= batch.min() < -0.5 < 0.5 < batch.max() <= 1
    neighbours = (batch[..., 1:] - batch[..., :-1]).abs().mean()  # a photograph is smooth, noise is not
    assert neighbours < 0.5 * batch.std()
    torch.testing.assert_close(images.crops(1, 32), batch[:1], rtol=0, atol=0)  # fewer are the first of more


def test_every_network_is_the_same_in_every_library() -> None:
    """Names and shapes of the weights, on meta tensors: timm has no head for some names by default."""
    import fastvit

    for name in networks.FIGURE_11:
        with torch.device("meta"):
            theirs, _ = networks._create(name, 224)
        ours = fastvit.create_model(name, device="meta")
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (theirs, ours)]
        assert shapes[0] == shapes[1], name
