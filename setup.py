"""Maps the kernel folders into the package and builds the CUDA extension; everything else is in pyproject.toml.

The top-level ``kernels/`` is no package (Hugging Face's library has that import name): only its ``triton/`` folder is
installed, as ``fastvit.triton``.

An install needs neither PyTorch nor nvcc nor a GPU. ``FASTVIT_BUILD_CUDA`` says whether ``fastvit._C`` is built:

- unset: where PyTorch, nvcc and a GPU are found, for that GPU; elsewhere the install has no extension, and says why;
- 1: always, for ``TORCH_CUDA_ARCH_LIST`` or else for 8.0 and 9.0a; what is missing is an error;
- 0: never.

``pip install`` builds in an environment of its own, which has no PyTorch, unless it is given ``--no-build-isolation``.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

SWITCH = os.environ.get("FASTVIT_BUILD_CUDA", "")

_spec = importlib.util.spec_from_file_location("fastvit_csrc_build", Path(__file__).parent / "csrc" / "build.py")
build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = build
_spec.loader.exec_module(build)


def visible_gpus() -> tuple[str, ...]:
    """The architectures of the GPUs that PyTorch sees."""
    build.find_torch()
    import torch

    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if not gpus:
        raise build.Missing("PyTorch sees no GPU")
    return tuple(sorted({build.nearest(*capability) for capability in gpus}, key=build.ARCHITECTURES.index))


def plan() -> "tuple[build.Build | None, str]":
    """The build of the extension, or None for an install without it; and which it is, and why, in words."""
    try:
        if SWITCH == "0":
            raise build.Missing("FASTVIT_BUILD_CUDA=0")
        if SWITCH not in ("", "1"):
            raise SystemExit(f"FASTVIT_BUILD_CUDA={SWITCH}: accepted are 0, 1 and nothing")
        found = build.DEFAULT if SWITCH == "1" else visible_gpus()
        if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
            found = build.architectures(wanted)
        planned = build.Build.find(found)
    except build.Missing as missing:
        if SWITCH == "1":
            raise SystemExit(f"FASTVIT_BUILD_CUDA=1, but the CUDA extension can't be built: {missing}") from None
        return None, f"pure-Python build (Triton kernels and the reference; no CUDA extension: {missing})"
    except ValueError as wrong:
        if SWITCH == "1":
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {wrong}") from None
        return None, f"pure-Python build (no CUDA extension: TORCH_CUDA_ARCH_LIST: {wrong})"
    return planned, (
        f"build with the CUDA extension for {' '.join(planned.archs)} "
        f"(CUDA {planned.toolkit.version}, PyTorch {planned.torch.version})"
    )


class BuildPython(build_py):
    """Leaves in the package what kind of build it is, for ``fastvit env``: pip shows what is printed with -v only."""

    def run(self) -> None:
        super().run()
        package = Path(__file__).parent / "fastvit" if self.editable_mode else Path(self.build_lib, "fastvit")
        if self.editable_mode and not planned:
            for stale in package.glob("_C.*so"):
                stale.unlink()
        (package / "_build.txt").write_text(kind + "\n")


class BuildKernels(build_ext):
    """Has csrc/build.py compile and link, since every source is compiled for architectures of its own."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        package = Path(__file__).parent / "fastvit" if self.editable_mode else target.parent
        for stale in {*package.glob("_C.*so"), *target.parent.glob("_C.*so")}:
            stale.unlink()
        try:
            planned.link(target)
        except build.CompileError as error:
            (package / "_build.txt").write_text(f"build in which the CUDA extension did not compile: {error}")
            raise CompileError(str(error)) from None


planned, kind = plan()
print(f"fastvit: {kind}")
commands, extension = {"build_py": BuildPython}, {}
if planned:
    # Not asked for by name, it is optional: where compiling fails, setuptools warns and installs without it.
    kernels = Extension("fastvit._C", ["csrc/library.cpp"], py_limited_api=True, optional=SWITCH != "1")
    commands["build_ext"] = BuildKernels
    extension = {"ext_modules": [kernels], "options": {"bdist_wheel": {"py_limited_api": "cp311"}}}

setup(
    packages=[*find_packages(include=["fastvit", "fastvit.*"]), "fastvit.triton"],
    package_dir={"fastvit.triton": "kernels/triton"},
    package_data={"fastvit": ["py.typed"], "fastvit.triton": ["tables/*.json", "tables/measured/*.json"]},
    cmdclass=commands,
    **extension,
)
