"""``make gpu``: its list, its limits, and that it goes on where it was."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import stages
from benchmarks.stages import Stage
from fastvit import cli

SCRIPT = str(Path(stages.__file__))


def test_the_list_needs_nothing_but_python() -> None:
    bare = [sys.executable, "-I", "-S", SCRIPT, "--dry-run"]  # no PyTorch, no package at all
    shown = subprocess.run(bare, capture_output=True, text=True, check=True).stdout
    for number, stage in enumerate(stages.STAGES, 1):
        assert f"{number:2}. {stage.name} (at most {stage.limit} s): {stage.about}\n" in shown
        assert f"    python {stage.command}\n" in shown
    only = subprocess.run([*bare, "--only", "tests", "report"], capture_output=True, text=True, check=True).stdout
    assert only.count("at most") == 3


def test_every_stage_is_a_command_that_exists() -> None:
    for group in (stages.STAGES, stages.TUNING):
        assert len({stage.name for stage in group}) == len(group)
    for stage in (*stages.STAGES, *stages.TUNING):
        assert 0 < stage.limit < 480
        for line in (stage.command, stage.rehearsal.format(out="x")):
            words = shlex.split(line)
            if words[1] == "benchmarks":
                arguments = command.parser().parse_args(words[2:])
                if suite := getattr(arguments, "suite", None):
                    assert arguments.keep == (line == stage.command)
                    assert suite.measurements(command.options(arguments, arguments.device))  # every name in it exists
            elif words[1] == "fastvit":
                cli.parser().parse_args(words[2:])
            else:
                assert words[1] in ("pip", "pytest")


def test_a_stage_past_its_limit_ends_with_all_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    begun = time.monotonic()
    status, _ = stages.run([sys.executable, "-c", code], 1.5, tmp_path / "log")
    assert status == 124
    assert time.monotonic() - begun < 10
    child = int((tmp_path / "log").read_text())
    for _ in range(50):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        pytest.fail("a process of the stage is still there")


def test_finished_stages_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = f"-c \"open(r'{tmp_path}/ran', 'a').write('x')\""
    fail = "-c \"import sys; print('no luck'); sys.exit(5)\""
    monkeypatch.setattr(stages, "STAGES", (Stage("good", "", "", count), Stage("bad", "", "", fail)))
    rehearse = ["--rehearse", str(tmp_path / "out")]
    assert stages.main(rehearse) == 1
    said = capsys.readouterr().out
    assert "no luck" in said
    assert "exit status 5" in said
    assert said.endswith("not finished: bad\n")
    assert (tmp_path / "out" / "logs" / "bad.log").read_text() == "no luck\n"
    assert stages.main(rehearse) == 1
    assert (tmp_path / "ran").read_text() == "x"
    monkeypatch.setattr("benchmarks.measurements.code", lambda: "another")
    assert stages.main([*rehearse, "--only", "good"]) == 0
    assert (tmp_path / "ran").read_text() == "xx"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert run.returncode == 1
    assert "PyTorch sees no CUDA device" in run.stderr
    assert "DRY=1" in run.stderr


def test_what_has_to_run_each_time_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = f"-c \"open(r'{tmp_path}/ran', 'a').write('x')\""
    monkeypatch.setattr(stages, "STAGES", (Stage("again", "", "", count, always=True),))
    for _ in range(2):
        assert stages.main(["--rehearse", str(tmp_path)]) == 0
    assert (tmp_path / "ran").read_text() == "xx"
    assert {stage.name for stage in (*stages.STAGES, stages.INSTALL) if stage.always} == {"again", "install"}
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(SystemExit, match=r"stages\.json is damaged"):
        stages.main(["--rehearse", str(tmp_path)])


def test_nothing_runs_where_the_package_can_not_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = Stage("install", "", "", '-c "import sys; sys.exit(1)"', always=True)
    after = Stage("after", "", "", f"-c \"open(r'{tmp_path}/ran', 'a')\"")
    monkeypatch.setattr(stages, "INSTALL", install)
    monkeypatch.setattr(stages, "STAGES", (install, after))
    assert stages.main(["--rehearse", str(tmp_path)]) == 1
    assert not (tmp_path / "ran").exists()
