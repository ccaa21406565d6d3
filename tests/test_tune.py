"""Measured tables: their order, refused tables, candidate configs, and the command without a GPU."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import cli, env
from fastvit.triton import launch, tiles
from fastvit.triton.tiles import Problem
from fastvit.tuning import candidates, compile_report, tune
from fastvit.tuning.candidates import LauncherCall

# A CPU tensor stands for a GPU of this name, as in the interpreter.
GPU = "interpreter"
KEY = {"op": "forward", "allows": "tma", "activation": "gelu", "scaled": False, "residual": False, "n": 3072, "k": 768}
TILE = {"form": "pointer", "block_m": 64, "block_n": 64, "block_k": 64, "parts": 1, "warps": 4, "stages": 3}
SPILLING = TILE | {"block_m": 128, "block_n": 128, "block_k": 32}
DERIVED = {"tile": "derived"}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """Empty folders in place of the user's cache and of the shipped tables."""
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path / "shipped")
    tiles.reload()
    yield {"user": tmp_path / "cache" / "tiles", "shipped": tmp_path / "shipped"}
    tiles.reload()


def make_problem(size: int = 1024, **changes: Any) -> Problem:
    return Problem("linear", "half", size, tuple((KEY | changes).values()))


def row(size: int = 1024, tile: dict[str, Any] = TILE) -> dict[str, Any]:
    return {"size": size, "key": KEY, "tile": tile, "us": 1.0, "derived": TILE, "derived_us": 2.0}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    table = tune.Table(folder / f"{GPU}.json", GPU, 80)
    for one in rows:
        table.add(make_problem(one["size"]), one)
    return table.path


def choose(size: int = 1024, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> dict[str, Any]:
    return tiles.choose("linear", torch.empty(1), dtype, size, lambda: DERIVED, **(KEY | changes))


# --- lookup --------------------------------------------------------------------------------------------------


def test_a_measured_row_serves_its_problem_and_batches_near_it(folders: dict[str, Path]) -> None:
    write(folders["user"], row(1024), row(4096, TILE | {"stages": 4}))
    assert choose() == TILE
    assert choose(512) == choose(2047) == TILE  # the nearer of the two
    assert choose(2049)["stages"] == choose(8192)["stages"] == 4
    assert choose(511) is choose(8193) is DERIVED


@pytest.mark.parametrize(
    "change", [{"n": 3071}, {"k": 512}, {"op": "input"}, {"activation": None}, {"allows": "pointer"}]
)
def test_a_measured_row_serves_no_other_problem(folders: dict[str, Path], change: dict[str, Any]) -> None:
    write(folders["user"], row())
    assert choose(**change) is DERIVED
    assert choose(dtype=torch.float32) is DERIVED
    assert choose(dtype=torch.float16) == TILE  # both 16-bit types


def test_the_users_table_goes_before_the_shipped_one(folders: dict[str, Path]) -> None:
    write(folders["shipped"], row(1024), row(8192))
    assert choose() == TILE
    write(folders["user"], row(1024, TILE | {"stages": 2}))
    assert choose()["stages"] == 2
    assert choose(8192) == TILE  # not in the user's


def test_another_architecture_takes_derived_tiles_only(folders: dict[str, Path]) -> None:
    write(folders["user"], row())
    with launch.assume(90):
        assert choose() is DERIVED
    meta = torch.empty(1, device="meta")
    assert tiles.choose("linear", meta, torch.bfloat16, 1024, lambda: DERIVED, **KEY) is DERIVED
    assert choose(0) is DERIVED  # an empty batch


def test_where_the_table_goes(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune.table_path(None, "NVIDIA H200") == folders["user"] / "nvidia-h200.json"
    assert tune.table_path("tables", "NVIDIA H200") == Path("tables/nvidia-h200.json")
    assert tune.table_path("mine.json", "NVIDIA H200") == Path("mine.json")
    monkeypatch.setenv("FASTVIT_CACHE", "/here")
    assert tiles.cache_folder() == Path("/here/tiles")
    monkeypatch.delenv("FASTVIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert tiles.cache_folder() == Path("/xdg/fastvit/tiles")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert tiles.cache_folder() == Path("/home/someone/.cache/fastvit/tiles")
    assert tiles.slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"


def _set(**changes: Any) -> Callable[[dict[str, Any]], str]:
    return lambda table: json.dumps(table | changes)


def _in_row(**changes: Any) -> Callable[[dict[str, Any]], str]:
    def change(table: dict[str, Any]) -> str:
        table["rows"]["linear"]["half"][0].update(changes)
        return json.dumps(table)

    return change


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda table: json.dumps(table)[:-40], "JSONDecodeError"),
        (lambda table: "[]", "TypeError"),
        (_set(format=0), "format 0"),
        (_set(gpu="NVIDIA H200"), "NVIDIA H200"),
        (_set(versions={"triton": "2.1.0"}), "Triton 2.1"),
        (_set(rows={"linear": {"double": [row()]}}), "double"),
        (_in_row(size=0), "size 0"),
        (_in_row(size="many"), "TypeError"),
        (_in_row(key={}), "op"),
        (_in_row(tile=TILE | {"warps": -4}), "-4"),
        (_in_row(tile={"form": "tma"}), "block_m"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_once_and_shown(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture, damage: Callable[[dict[str, Any]], str], word: str
) -> None:
    path = write(folders["user"], row())
    path.write_text(damage(json.loads(path.read_text())))
    tiles.reload()
    with caplog.at_level(logging.WARNING, "fastvit"):
        assert choose() is DERIVED
        assert choose(2048) is DERIVED
    (message,) = caplog.messages
    assert str(path) in message
    assert word in message
    assert message in tiles.sources(GPU)
    assert "tiles       " + message in env.render(env.report() | {"tiles": tiles.sources(GPU)})


@pytest.mark.parametrize(("op", "run"), [("forward", "folded"), ("normed", "library"), ("input", "quickly")])
def test_a_run_that_an_op_does_not_have_is_refused(folders: dict[str, Path], op: str, run: str) -> None:
    key = dict.fromkeys(tiles.KEYS["cuda"], 8) | {"op": op, "activation": None, "residual": None}
    problem = Problem("cuda", "half", 8, tuple(key.values()))
    table = tune.Table(folders["user"] / f"{GPU}.json", GPU, 80)
    table.add(problem, {"size": 8, "key": key, "tile": {"run": tiles.RUNS[op][1]}})
    assert tiles.read(table.path, GPU)
    table.add(problem, {"size": 8, "key": key, "tile": {"run": run}})
    with pytest.raises(tiles.TableError, match=run):
        tiles.read(table.path, GPU)


def test_sources_count_what_was_measured(folders: dict[str, Path]) -> None:
    assert len(tiles.sources(GPU)) == 1  # derived
    path = write(folders["user"], row(1), row(2))
    assert f"2 problems: {path}" in tiles.sources(GPU)[0]


def test_the_file_is_continued_or_set_aside(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folders["user"], row(1), row(2))
    assert set(tune.Table.open(path, GPU, 80).rows) == {make_problem(1), make_problem(2)}
    assert tune.Table.open(path.with_name("none.json"), GPU, 80).rows == {}
    path.write_text("{")
    assert tune.Table.open(path, GPU, 80).rows == {}
    assert path.with_suffix(".refused").read_text() == "{"
    assert "JSONDecodeError" in capsys.readouterr().err
    assert not path.exists()


# --- problems and candidates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "workload", [*compile_report.WORKLOADS, compile_report.VARIATIONS[0], compile_report.VARIATIONS[2]], ids=str
)
def test_every_problem_of_a_model_has_a_call(workload: compile_report.Workload, arch: int) -> None:
    with tiles.record_problems() as problems:
        compile_report.launches(workload, arch)
    assert {p.family for p in problems} == set(tiles.KEYS) - {"cuda"}
    assert [str(p) for p in problems if not candidates.is_reproducible(p, workload.dtype, arch)] == []


def test_backend_cuda_looks_up_each_product_of_a_model() -> None:
    """Without the extension: qkv and fc1 behind a norm in inference, and every product of a training step."""
    models = ["vit_base_patch16_224"]
    inference = tune.problems_of(models, [256], [torch.bfloat16], [False], 90, "cuda")
    rows = 256 * 197
    assert {(p.fields["op"], p.size, p.fields["n"], p.fields["k"]) for p in inference} >= {
        ("normed", rows, 2304, 768),
        ("forward", rows, 2304, 768),
        ("forward", rows, 768, 768),
        ("normed", rows, 3072, 768),
        ("forward", rows, 768, 3072),
    }
    training = tune.problems_of(models, [256], [torch.bfloat16], [True], 90, "cuda")
    assert {p.fields["op"] for p in training} == {"forward", "input", "weight"}
    for problem, (dtype, derived) in {**inference, **training}.items():
        assert derived == {"run": "kernel"}
        assert candidates.is_reproducible(problem, dtype, 90), str(problem)
        assert candidates.rejection(problem, dtype, {"run": "library"}, 90) is None


def _problems(arch: int, dtype: torch.dtype = torch.bfloat16) -> tune.Problems:
    return tune.problems_of(["vit_base_patch16_224"], [256], [dtype], [True], arch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", launch.ARCHITECTURES)
def test_candidates_are_tiles_of_their_kernels(arch: int, dtype: torch.dtype) -> None:
    for problem, (_, derived) in _problems(arch, dtype).items():
        tried = candidates.candidate_configs(problem, arch, 132)
        assert 3 <= len(tried) <= 64, str(problem)
        assert len({json.dumps(tile) for tile in tried}) == len(tried)
        for tile in tried:
            assert set(tile) == set(tiles.TILES[problem.family]) <= set(derived)
            if problem.family == "linear":
                allows = problem.fields["allows"]
                assert tile["form"] in (("tma", "pointer") if allows == "tma" else (allows,))


def test_every_launcher_takes_its_tile_argument() -> None:
    for problem, (dtype, _) in _problems(90).items():
        tried = candidates.candidate_configs(problem, 90, 132)
        configurations = set()
        for tile in tried:
            with launch.record(90) as launches:
                candidates.launcher_call(problem, dtype, "meta").run(tile)
            configurations.add(compile_report.configuration(launches[0]))
        # Few rows or a short sum make some tiles of attention equal: a program owns no more rows than there are.
        few = problem.family == "attention" and 1 in problem.key
        assert len(configurations) > len(tried) // 2 if few else len(configurations) == len(tried), str(problem)


def test_a_candidate_that_spills_or_does_not_fit_is_rejected() -> None:
    pointer = make_problem(4096, allows="pointer")
    assert candidates.rejection(pointer, torch.bfloat16, TILE, 80) is None
    spilling = candidates.rejection(pointer, torch.bfloat16, SPILLING, 80)
    assert re.match(r"spills \d+ bytes", str(spilling))
    large = candidates.rejection(pointer, torch.bfloat16, TILE | {"block_k": 256, "stages": 4}, 86)
    assert re.match(r"overflows shared memory with \d+ bytes", str(large))
    assert candidates.rejection(pointer, torch.bfloat16, TILE | {"block_m": 48}, 80) is not None  # no power of two


def gate(path: Path) -> None:
    """Every row of a measured table compiles without spills for the architecture that it was measured on."""
    table = json.loads(path.read_text())
    assert path.stem == tiles.slug(table["gpu"])
    measured = tiles.read(path, table["gpu"])
    assert measured
    for problem, one in measured.items():
        dtype = torch.float32 if problem.dtype == "float32" else torch.bfloat16
        reason = candidates.rejection(problem, dtype, one["tile"], table["arch"])
        # A kernel that is not hot may spill: there the derived tile, compiled elsewhere, may be the best.
        assert reason is None or one["tile"] == one["derived"], f"{path.name}, {problem}: {reason}"


def test_every_shipped_table_passes_its_gate() -> None:
    for path in sorted((Path(tiles.__file__).parent / "tables" / "measured").glob("*.json")):
        gate(path)


def test_the_gate_of_shipped_tables_sees_a_spill(folders: dict[str, Path]) -> None:
    gate(write(folders["shipped"], row()))
    with pytest.raises(AssertionError, match="spills"):
        gate(write(folders["shipped"], row(tile=SPILLING)))


# --- right and fast -------------------------------------------------------------------------------------------


def _launcher(x: Tensor, tile: dict[str, Any] | None) -> Tensor:
    """Double x; how well depends on the tile. New memory holds the right result, as memory used before may."""
    out = torch.empty_like(x)
    out = out if out.isnan().all() else 2 * x
    end = -1 if tile == {"how": "unfinished"} else None
    out[:end] = 2 * x[:end]
    return out * 1.01 if tile == {"how": "wrong"} else out * 1.001 if tile == {"how": "rough"} else out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_wrong_or_unwritten_result_fails(dtype: torch.dtype) -> None:
    check = tune.AccuracyCheck(LauncherCall(_launcher, {"x": torch.randn(1000).to(dtype)}), {"how": "derived"})
    assert check.failure({"how": "derived"}) is None
    for how in ("wrong", "unfinished"):
        assert "wrong by" in str(check.failure({"how": how}))
    if dtype == torch.float32:
        assert "wrong by" in str(check.failure({"how": "rough"}))


def test_an_argument_that_is_not_fully_written_fails() -> None:
    def write_half(out: Tensor, tile: dict[str, Any] | None) -> None:
        out[: None if tile == {} else 2] = 1

    check = tune.AccuracyCheck(LauncherCall(write_half, {"out": torch.zeros(4)}, ("out",)), {})
    assert check.failure({}) is None
    assert "wrong by" in str(check.failure({"how": "half"}))


def test_a_gain_must_be_larger_than_the_noise() -> None:
    steady = [1.0, 1.001, 0.999, 1.0, 1.0]
    assert tune.is_faster([0.9 * t for t in steady], steady)
    assert not tune.is_faster([0.985 * t for t in steady], steady)  # under GAIN
    assert not tune.is_faster([1.1 * t for t in steady], steady)
    scattered = [0.8, 1.0, 1.2, 0.7, 1.3]
    assert not tune.is_faster([0.9 * t for t in scattered], scattered)


def test_interleaved_takes_turns() -> None:
    order: list[int] = []

    def clock(i: int) -> Callable[[], float]:
        return lambda: order.append(i) or 0.25  # type: ignore[func-returns-value]

    samples = tune.interleaved([clock(0), clock(1)], seconds=2.0)
    assert [len(s) for s in samples] == [4, 4]
    assert order[2:] == [0, 1, 1, 0, 0, 1, 1, 0]


# --- the command ----------------------------------------------------------------------------------------------


def test_dry_run_lists_problems_and_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--dry-run", "--arch", "90", "--batch", "256", "--training", "--most", "5"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert any("attention key_value_gradient" in line for line in lines)
    assert sum(int(line.split()[0]) for line in lines) == int(total.split()[0])
    assert f"{len(lines)} problems on sm_90" in total
    assert max(int(line.split()[0]) for line in lines) == 5


def test_dry_run_of_backend_cuda_needs_no_extension(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tune", "--backend", "cuda", "--dry-run", "--arch", "80", "--batch", "256", "--inference"]
    assert cli.main(arguments) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert any("cuda normed gelu" in line for line in lines)
    assert all(line.split()[:2] == ["2", "cuda"] for line in lines)
    assert f"{len(lines)} problems on sm_80" in total


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tuning_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--arch", "90"], "--dry-run"),
        (["--arch", "91", "--dry-run"], "80, 86"),
        (["--models", "vit_none", "--dry-run", "--arch", "90"], "vit_none"),
        (["--models", "resnetv2_50x1_bit", "--dry-run", "--arch", "90"], "no Vision Transformer"),
        (["--backend", "cuda", "--dtype", "float32", "--dry-run", "--arch", "90"], "float16 and bfloat16"),
    ],
)
def test_mistakes_name_what_is_accepted(capsys: pytest.CaptureFixture[str], arguments: list[str], word: str) -> None:
    assert cli.main(["tune", *arguments]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(folders: dict[str, Path]) -> None:
    """One problem of every kernel: compiled ahead, held against float32, timed in CUDA graphs, and then used."""
    device = torch.device("cuda")
    probe = torch.empty(0, device=device)
    arch, gpu = launch.architecture(probe), launch.device_name(probe)
    assert gpu is not None
    some: dict[tuple[str, Any], Problem] = {}
    everything = tune.problems_of(["vit_tiny_patch16_224"], [8], [torch.bfloat16], [True], arch)
    for problem in everything:
        some.setdefault((problem.family, problem.key[0]), problem)
    table = tune.Table.open(tune.table_path(None, gpu), gpu, arch)
    assert tune.tune({problem: everything[problem] for problem in some.values()}, table, device, most=3) == 0
    for problem, one in tiles.read(table.path, gpu).items():  # type: ignore[union-attr]
        assert one["timed"] >= 1, one["refused"]
        assert set(one["refused"]) <= {"spills", "overflows"}, str(problem)
        assert 0 < one["us"] <= one["derived_us"]
        call = candidates.launcher_call(problem, torch.bfloat16, device)
        with tiles.record_problems() as taken:
            call.run()
        assert one["tile"] in taken.values()
