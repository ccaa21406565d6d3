"""What is installed, under which names, and what an installation must not need."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HIDE = "import sys; sys.modules['{0}'] = None; "


def python(code: str, cwd: Path = ROOT) -> str:
    """What a fresh interpreter in ``cwd`` prints."""
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_hugging_face_kernels_is_importable_from_the_repository_root() -> None:
    found = python("import kernels; print(kernels.__file__, callable(kernels.get_kernel))").split()
    assert ROOT / "kernels" not in Path(found[0]).parents
    assert found[1] == "True"


def test_triton_kernels_are_fastvit_triton() -> None:
    where = python("import fastvit.triton.launch as m; print(m.__name__, m.__file__)").split()
    assert where[0] == "fastvit.triton.launch"
    assert Path(where[1]).name == "launch.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built where neither torch nor Triton nor nvcc can be found."""
    tree = tmp_path_factory.mktemp("build") / "tree"
    tree.mkdir()
    for name in ("fastvit", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    code = HIDE.format("torch") + "sys.modules['triton'] = None; import os; os.environ['PATH'] = ''; "
    said = python(code + "from setuptools import build_meta; build_meta.build_wheel('.')", cwd=tree)
    assert "pure-Python build" in said
    (built,) = tree.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_that_only_a_clone_can_run(wheel: Path) -> None:
    """``csrc``, ``tests`` and ``benchmarks`` stay in the clone; nothing named ``kernels`` is installed."""
    with zipfile.ZipFile(wheel) as zipped:
        names = {name for name in zipped.namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fastvit/**/*.py")}
    triton = [path for pattern in ("*.py", "tables/**/*.json") for path in ROOT.glob(f"kernels/triton/{pattern}")]
    installed = {f"fastvit/triton/{path.relative_to(ROOT / 'kernels/triton').as_posix()}" for path in triton}
    assert {"fastvit/triton/attention.py", "fastvit/triton/tables/attention.json"} <= installed
    assert any(name.startswith("fastvit/models/families/") for name in package)
    assert names == package | installed | {"fastvit/py.typed", "fastvit/_build.txt"}


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as zipped:
        (name,) = [name for name in zipped.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = zipped.read(name).decode()
        assert any(name.endswith("licenses/LICENSE") for name in zipped.namelist())
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert re.search(r"Requires-Dist: triton>=3.6; platform_system == ['\"]Linux['\"]", metadata)


def test_every_dependency_has_one_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *[r for extra in project["optional-dependencies"].values() for r in extra]]
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in wanted} - {"fastvit"}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.match(r"[\w-]+==[\d.]+", line) for line in lines)
    pinned = [line.partition("==")[0] for line in lines]
    assert len(pinned) == len(set(pinned))
    assert names <= set(pinned)


def test_without_triton_fastvit_runs_and_says_why_it_is_absent() -> None:
    said = python(
        HIDE.format("triton") + "import torch, fastvit; from fastvit.cli import main; main(['env']); "
        "q = torch.ones(1, 3, 2, 32); print(fastvit.ops.attention(q, q, q).shape)"
    )
    assert re.search(r"^triton +every op: .*not installed", said, re.MULTILINE)
    assert "torch.Size([1, 3, 2, 32])" in said


def test_without_triton_the_launchers_of_cuda_are_there() -> None:
    python(HIDE.format("triton") + "import fastvit.cuda.launchers")


def test_without_triton_importing_says_nothing() -> None:
    run = subprocess.run(
        [sys.executable, "-c", HIDE.format("triton") + "import fastvit"], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_without_triton_asking_for_it_is_an_error_that_says_why() -> None:
    said = python(
        HIDE.format("triton")
        + """
import torch, fastvit
q = torch.ones(1, 3, 2, 32)
with fastvit.backend("triton"):
    try:
        fastvit.ops.attention(q, q, q)
    except fastvit.BackendUnavailable as error:
        print(error)
"""
    )
    assert "not installed" in said


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    """The peers and the plots are extras: ``import fastvit`` must not need them."""
    said = python(
        "import sys, fastvit; print(*{'timm', 'torchvision', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    assert said.strip() == ""
