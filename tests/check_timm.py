"""``make test-peers``: timm's own tests/test_models.py, unchanged, on fastvit's models in timm's registry.

The file is in timm's source distribution, which is fetched for it. Arguments are passed on to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

# Which tests of which models (pytest's -k). One test prunes a model at every depth, which is slow: the smallest has it.
# No TorchScript: it is deprecated in PyTorch, and cannot express the choice of a backend.
SMALLEST, OTHERS = "vit_tiny_patch16_224_fastvit", "(vit_small_patch32_224_fastvit or vit_base_patch32_224_fastvit)"
TESTS = f"not torchscript and ({SMALLEST} or {OTHERS} and not prune_intermediate_layers_contract)"

CONFTEST = """
from timm.models import _registry

from fastvit.timm_registry import register

# timm's feature tests pick models by the module that registered them: ours are tested with its ViTs.
_registry._module_to_models["vision_transformer"].update(register())
"""


def fetch(folder: Path) -> Path:
    """timm's source distribution, of the version that is installed, unpacked into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", f"timm=={timm.__version__}", "--dest", str(folder)]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("timm-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "tests"


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        tests = fetch(Path(scratch))
        # A folder that holds this file alone: beside timm's sources they would be imported, not the installed ones.
        alone = Path(scratch) / "alone"
        alone.mkdir()
        (tests / "test_models.py").rename(alone / "test_models.py")
        (alone / "conftest.py").write_text(CONFTEST)
        (alone / "pytest.ini").write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "8", "-q", "-W", "ignore"]
        command += ["-k", TESTS, "test_models.py", *sys.argv[1:]]
        return subprocess.run(command, cwd=alone, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
