"""``make test-oldest``: the CUDA extension, built with the PyTorch here, imported under the oldest one supported.

Its wheel is installed into an empty environment with that PyTorch. What pip brings of it is for an older CUDA, so the
extension's own CUDA runtime comes beside it, which an install on a GPU never needs: CUDA's major versions agree there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "2.10.0"  # pyproject.toml's torch>=2.10
PROOF = """\
import torch, fastvit
from fastvit import _C, ops
from fastvit.cuda import extension
assert torch.__version__.startswith(OLDEST), torch.__version__
assert extension.MISSING is None, extension.MISSING
registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastvit_cuda::")]
assert registered, "the extension was loaded and registered nothing"
q, k, v = torch.randn(3, 1, 5, 2, 32)
expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
torch.testing.assert_close(ops.attention(q, k, v), expected)
model = fastvit.create_model("vit_tiny_patch16_224", depth=1).eval()
assert model(torch.randn(1, 3, 224, 224)).isfinite().all()
print(f"torch {torch.__version__}: {len(registered)} CUDA ops for {_C.ARCHITECTURES} registered; the CPU's run")
"""


def run(*command: str | Path, **environment: str) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, **environment})


def main() -> None:
    major = (torch.version.cuda or "").partition(".")[0]
    quiet = ["--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(prefix="fastvit-oldest-") as scratch:
        wheels, environment = Path(scratch, "wheels"), Path(scratch, "venv")
        build = [sys.executable, "-m", "pip", "wheel", *quiet, "--no-build-isolation", "--no-deps"]
        run(*build, "-w", wheels, ROOT, FASTVIT_BUILD_CUDA="1")
        (wheel,) = wheels.glob("fastvit-*.whl")
        if "-cp311-abi3-" not in wheel.name:
            raise SystemExit(f"{wheel.name} is no wheel for every Python from 3.11")
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        run(python, "-m", "pip", "install", *quiet, f"torch=={OLDEST}", f"nvidia-cuda-runtime=={major}.*", wheel)
        (runtime,) = environment.rglob(f"libcudart.so.{major}")
        # -P: not this clone's fastvit, which would be found first
        run(python, "-P", "-c", PROOF.replace("OLDEST", repr(OLDEST)), LD_LIBRARY_PATH=str(runtime.parent))


if __name__ == "__main__":
    main()
