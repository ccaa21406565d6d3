"""Compiles the kernels for a CPU: every source of csrc with g++ and the host layer of this folder, into one library.

``python tests/emulator/build.py`` builds what changed and prints where the library is. Kernels are compiled with
``-fsanitize=thread,alignment,bounds``, which makes each memory access a call, and linked to the detector of this folder
instead of the sanitizers' own libraries.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

EMULATOR = Path(__file__).resolve().parent
ROOT = EMULATOR.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulated"
LIBRARY = BUILD / "fastvit_emulated.so"

# -O1: compiling is most of the time that these tests take, and with the detector in every access little is lost.
KERNEL = "-x c++ -O1 -fsanitize=thread,alignment,bounds -fno-tree-vectorize"


def head_dims() -> str:
    """The extension's own flag for the head dims of attention, which are chosen for it and for this library alike."""
    spec = importlib.util.spec_from_file_location("fastvit_csrc_build", CSRC / "build.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flag: str = module.head_dims()
    return flag


def torch_folder() -> Path:
    """Where PyTorch is installed, found without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("PyTorch is not installed: the library registers its operators with it")
    return Path(spec.origin).parent


def cuda_include() -> Path:
    """A folder with CUDA's headers for 16-bit types: beside PyTorch, which brings them, or in a toolkit."""
    nvcc = shutil.which("nvcc")
    tried = [
        *sorted(torch_folder().parent.glob("nvidia/cu*/include")),
        torch_folder().parent / "nvidia/cuda_runtime/include",
        *([Path(os.environ["CUDA_HOME"]) / "include"] if "CUDA_HOME" in os.environ else []),
        *([Path(nvcc).resolve().parent.parent / "include"] if nvcc else []),
        Path("/usr/local/cuda/include"),
    ]
    for folder in tried:
        if (folder / "cuda_fp16.h").exists() and (folder / "vector_types.h").exists():
            return folder
    raise RuntimeError(f"no CUDA headers (cuda_fp16.h) in {', '.join(map(str, tried))}")


def rules() -> str:
    """build.ninja."""
    torch, cuda = torch_folder(), cuda_include()
    cxx = os.environ.get("CXX", "g++")
    common = (
        "-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wall -Wno-unknown-pragmas "
        f"-Wno-strict-aliasing -DFASTVIT_HOST -DFASTVIT_SM90 -I{CSRC}/include -I{EMULATOR} "
        f"-isystem {cuda} -idirafter {EMULATOR}/cuda"
    )
    libtorch = (
        f"-isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include "
        "-DTORCH_TARGET_VERSION=0x020a000000000000"
    )
    # Inline functions of the standard library come from the first object that has them: the host layer's, not watched.
    sources = [
        *sorted(EMULATOR.glob("*.cpp")), CSRC / "dispatch.cpp", CSRC / "library.cpp",
        *sorted(EMULATOR.glob("*.cu")), *sorted(CSRC.glob("*/*.cu")),
    ]  # fmt: skip
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {BUILD}",
        "rule compile",
        f"  command = {cxx} {common} $flags -MD -MF $out.d -MT $out -c $in -o $out.new && mv $out.new $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
        "rule link",
        f"  command = {cxx} -shared -o $out.new $in -L{torch}/lib -ltorch -ltorch_cpu -lc10 -ldl "
        f"-Wl,-rpath,{torch}/lib -Wl,-z,defs && mv $out.new $out",
        "  description = $out",
    ]
    kernel, objects = f"{KERNEL} {head_dims()}", []
    for source in sources:
        objects.append(BUILD / f"{source.parent.name}_{source.name}.o")
        flags = kernel if source.suffix == ".cu" else libtorch if source.name == "library.cpp" else "-O3"
        lines += [f"build {objects[-1]}: compile {source}", f"  flags = {flags}"]
    lines += [f"build {LIBRARY}: link {' '.join(map(str, objects))}", f"default {LIBRARY}", ""]
    return "\n".join(lines)


def ninja() -> str:
    """Ninja's program: on the path or from its PyPI package."""
    beside = Path(sys.executable).parent / "ninja"
    found = shutil.which("ninja") or (str(beside) if beside.exists() else None)
    if found is None:
        raise RuntimeError("ninja is not installed: pip install ninja")
    return found


def build(*, jobs: int | None = None) -> Path:
    """The library, brought up to date. One process builds, others wait for it.

    Raises:
        RuntimeError: a tool is missing, or a source does not compile (with what the compiler said).
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        script, text = BUILD / "build.ninja", rules()
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        command = [ninja(), "-f", str(script), *(["-j", str(jobs)] if jobs else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"csrc does not compile for the CPU:\n{done.stdout}")
    return LIBRARY


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-j", "--jobs", type=int, help="compilers at a time")
    options = parser.parse_args()
    try:
        print(build(jobs=options.jobs))
    except RuntimeError as error:
        sys.exit(str(error))
