"""The ``fastvit`` command."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch

import fastvit
from fastvit import cli, env
from fastvit.ops import backends


def test_env_prints_device_versions_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and platform.python_version() in out
    for op, reasons in backends.availability().items():
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [op]]
        named = [name.split()[0] for name in line.split(None, 1)[1].split(", ")]
        assert named == [name for name, reason in reasons.items() if reason is None]
        for reason in filter(None, reasons.values()):
            assert reason in out


def test_env_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"] == backends.availability()
    assert found["ops"]["attention"]["reference"] is None
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"]["type"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["backend"] == fastvit.ops.backends.setting()


def test_env_shows_the_setting_the_fallbacks_and_what_is_not_installed() -> None:
    with fastvit.backend("reference"):
        found = env.report()
    assert found["backend"] == "reference"
    found["fallbacks"] = ["ops.mlp runs on the reference: because"]
    found["versions"]["xformers"] = None
    assert "fallback    ops.mlp runs on the reference: because" in env.render(found)
    assert "not installed: xformers" in env.render(found)


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    everything = capsys.readouterr().out.split()
    assert everything == fastvit.list_models()
    assert cli.main(["models", "base_patch16"]) == 0
    some = capsys.readouterr().out.split()
    assert some and set(some) < set(everything) and all("base_patch16" in name for name in some)
    assert cli.main(["models", "no such model"]) == 1


def test_help_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "env" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["envv"])
    assert stopped.value.code == 2
    assert "envv" in capsys.readouterr().err


def test_module_and_command_are_the_same() -> None:
    run = subprocess.run([sys.executable, "-m", "fastvit", "env"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "attention_qkvpacked" in run.stdout
