"""``make dist``: build the sdist, the wheel from it, and prove both.

The sdist holds every source; the wheel holds the package, with ``fastvit.triton`` and its tables, and nothing that only
a clone can run (``csrc``, ``tests``, ``benchmarks``). Nothing named ``kernels`` is installed, and the wheel runs an op
in an empty environment.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"

PROOF = """\
import importlib.util, torch, fastvit
from fastvit import ops
q, k, v = torch.randn(3, 1, 5, 2, 32)
out = ops.attention(q, k, v)
expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
torch.testing.assert_close(out, expected)
assert importlib.util.find_spec("kernels") is None, "something named kernels was installed"
import fastvit.triton.attention
print("ops.attention ran from", fastvit.__file__)
"""


def run(*command: str | Path, **options: str | Path) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def sources(*patterns: str) -> set[str]:
    """Files of the working tree, relative to it."""
    found = (path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def demand(archive: Path, expected: set[str], inside: set[str]) -> None:
    missing = sorted(expected - inside)
    if missing:
        raise SystemExit(f"{archive.name} lacks: {', '.join(missing)}")
    print(f"{archive.name}: all {len(expected)} files that must be inside are")


def check_contents(sdist: Path, wheel: Path) -> None:
    kernels, tables = sources("kernels/triton/**/*.py"), sources("kernels/triton/tables/**/*.json")
    if not kernels or not tables:
        raise SystemExit("the working tree has no Triton kernels or no tuning tables: nothing to ship")
    with tarfile.open(sdist) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    package = sources("fastvit/**/*.py", "fastvit/py.typed")
    build = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", "constraints.txt"}
    demand(
        sdist, kernels | tables | package | build | sources("csrc/**/*", "tests/**/*.py", "benchmarks/**/*.py"), inside
    )

    with zipfile.ZipFile(wheel) as zipped:
        inside = set(zipped.namelist())
    installed = {name.replace("kernels/triton/", "fastvit/triton/", 1) for name in kernels | tables}
    demand(wheel, installed | package, inside)
    built = {"fastvit/_build.txt", "fastvit/_C.abi3.so"}
    strays = sorted(name for name in inside - installed - package - built if not name.startswith("fastvit-"))
    if strays:
        raise SystemExit(f"{wheel.name} would install what only a clone can run: {', '.join(strays)}")


def main() -> None:
    for old in DIST.glob("fastvit-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)  # the wheel from the sdist, both isolated
    (sdist,), (wheel,) = DIST.glob("fastvit-*.tar.gz"), DIST.glob("fastvit-*.whl")
    check_contents(sdist, wheel)
    with tempfile.TemporaryDirectory(prefix="fastvit-dist-") as scratch:
        venv.create(scratch, with_pip=True)
        python = Path(scratch) / "bin" / "python"
        quiet = ["--quiet", "--disable-pip-version-check"]
        run(python, "-m", "pip", "install", *quiet, "-c", ROOT / "constraints.txt", wheel)
        (Path(scratch) / "proof.py").write_text(PROOF)
        run(python, "proof.py", cwd=scratch)
        run(python, "-m", "fastvit", "env", cwd=scratch)
    print(f"{DIST.name}/: sdist and wheel are complete, and the wheel runs in an empty environment")


if __name__ == "__main__":
    main()
