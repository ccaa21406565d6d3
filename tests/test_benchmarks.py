"""The benchmarks: that they measure what they say, and that README shows what was measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import images, measure, report, tables, throughput
from benchmarks.contenders import Contender, contenders, timm_vit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """One small run of the command, its JSON and its folder."""
    folder = tmp_path_factory.mktemp("out")
    arguments = ["throughput", "--quick", "--device", "cpu", "--batch", "1", "--budget", "0.01", "--out", str(folder)]
    assert command.main(arguments) == 0
    return json.loads((folder / "throughput.json").read_text()), folder


def test_document(result: tuple[dict, Path]) -> None:
    found, folder = result
    assert {"device", "versions", "commit", "command", "rows"} <= found.keys()
    assert found["command"].startswith("python -m benchmarks throughput --quick")
    picture = (folder / "throughput.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_rows(result: tuple[dict, Path]) -> None:
    rows = result[0]["rows"]
    for dtype in ("float32", "bfloat16"):
        here = {(row["name"], row["backend"]): row for row in rows if row["dtype"] == dtype}
        assert {"timm", "fastvit", "torchvision", "Hugging Face", "ResNet-50"} == {name for name, _ in here}
        assert ("fastvit", "reference") in here
        baseline = here["timm", "eager"]["images_per_s"]
        for row in here.values():
            assert row["error"] is None
            assert row["batch"] == 1
            assert row["images_per_s"] > 0
            assert row["ratio_to_timm"] == pytest.approx(row["images_per_s"] / baseline)
            slow, fast = row["images_per_s_p20_p80"]
            assert slow <= row["images_per_s"] <= fast
            weights = (25.5e6 if row["name"] == "ResNet-50" else 5.7e6) * (4 if dtype == "float32" else 2)
            assert row["peak_memory_bytes"] > weights
            if row["name"] == "ResNet-50":
                assert row["max_abs_logit_diff"] is None
            else:
                assert dtype != "float32" or row["max_abs_logit_diff"] < 1e-4  # what a loaded model promises
                assert row["max_abs_logit_diff"] is not None


@pytest.mark.gpu
def test_throughput_on_a_gpu(tmp_path: Path) -> None:
    arguments = ["throughput", "--quick", "--device", "cuda", "--budget", "0.1", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    found = json.loads((tmp_path / "throughput.json").read_text())
    assert found["device"]["name"] == torch.cuda.get_device_name()
    assert {"triton", "reference"} <= {row["backend"] for row in found["rows"] if row["name"] == "fastvit"}
    assert all(row["peak_memory_bytes"] > 0 for row in found["rows"])


def test_weights_reach_every_layout() -> None:
    """In float64 they are the same function: no key was swapped, no epsilon differs."""
    source = timm_vit("vit_tiny_patch16_224")
    batch = images.crops(1, 224).double()
    with torch.no_grad():
        expected = copy.deepcopy(source).double()(batch)
        for contender in contenders("vit_tiny_patch16_224"):
            if contender.same_network and contender.backend != "onednn":  # which has no float64
                model = contender.build(source).eval().double()
                with contender.context():
                    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-10, msg=contender.label)


def test_a_contender_that_fails_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: nn.Module) -> nn.Module:
        raise RuntimeError("no such library")

    entries = [contenders("vit_tiny_patch16_224")[0], Contender("broken", "eager", broken)]
    monkeypatch.setattr(throughput, "contenders", lambda model: entries)
    rows = throughput.measure(throughput.Settings("vit_tiny_patch16_224", batch=1, dtypes=("float32",), budget=0.01))
    assert [row.error for row in rows] == [None, "RuntimeError: no such library"]
    assert rows[1].images_per_s is None
    text = report.table(throughput.as_json(rows))
    assert "failed: RuntimeError: no such library" in text


def test_photographs_are_real_and_the_same_each_time() -> None:
    batch = images.crops(3, 32)
    assert batch.shape == (3, 3, 32, 32)
    torch.testing.assert_close(batch, images.crops(3, 32), rtol=0, atol=0)
    assert not torch.equal(batch, images.crops(3, 32, seed=1))
    assert -1 <= batch.min() < -0.5 < 0.5 < batch.max() <= 1
    neighbours = (batch[..., 1:] - batch[..., :-1]).abs().mean()  # a photograph is smooth, noise is not
    assert neighbours < 0.5 * batch.std()


def test_peak_memory_counts_weights_activations_and_what_is_kept() -> None:
    linear, x = nn.Linear(64, 4096, bias=False), torch.randn(32, 64)
    weights, output = 64 * 4096 * 4, 32 * 4096 * 4
    kept: list[torch.Tensor] = []

    def keeps_a_copy() -> torch.Tensor:
        kept.append(linear.weight.detach().clone()) if not kept else None
        return linear(x)

    with torch.no_grad():
        assert measure.peak_memory(linear, lambda: linear(x), CPU) == pytest.approx(weights + output, rel=0.02)
        assert measure.peak_memory(linear, lambda: linear(x).exp(), CPU) == pytest.approx(
            weights + 2 * output, rel=0.02
        )
        assert measure.peak_memory(linear, keeps_a_copy, CPU) == pytest.approx(2 * weights + output, rel=0.02)


def test_contenders_take_turns_and_each_leads() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timed = list(measure.interleaved(runs, CPU, dict.fromkeys("abc", 1), rounds=3))
    assert calls == [name for name, _ in timed] == list("abcbcacab")
    assert all(duration > 0 for _, duration in timed)


def test_plan_keeps_to_the_budget() -> None:
    repeats, rounds = measure.plan({"a": lambda: None}, CPU, budget=0.0, rounds=(3, 50))
    assert rounds == 3
    assert repeats["a"] > 1  # one call is far shorter than a timing should be
    assert measure.plan({"a": lambda: None}, CPU, budget=1e9, rounds=(3, 50))[1] == 50
    assert measure.plan({}, CPU, budget=1.0, rounds=(3, 50))[1] == 0


def test_readme_shows_what_was_measured_and_nothing_else() -> None:
    text = tables.README.read_text()
    assert tables.updated(text) == text, "run `python -m benchmarks tables`"


def test_tables_come_from_the_files(tmp_path: Path, result: tuple[dict, Path]) -> None:
    assert tables.render(tmp_path) == tables.NOTHING
    folder = tmp_path / "some-gpu"
    folder.mkdir()
    (folder / "throughput.json").write_text(json.dumps(result[0]))
    said = tables.render(tmp_path)
    assert tables.NOTHING not in said
    assert result[0]["device"]["name"] in said
    row = result[0]["rows"][0]
    assert f"| {row['name']} | {row['backend']} | {row['dtype']} |" in said
    page = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter"
    assert tables.updated(page, tmp_path) == f"before\n{tables.BEGIN}\n{said}\n{tables.END}\nafter"
    with pytest.raises(ValueError, match="README"):
        tables.updated("no marks", tmp_path)


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["throughput", "--batch", "0"], ["throughput", "--dtypes", "int8"], ["latencyy"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 2
    if not torch.cuda.is_available():
        assert command.main(["throughput", "--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err
