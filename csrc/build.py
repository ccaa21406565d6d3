"""Compiles the kernels into the extension ``fastvit._C``: what ``setup.py`` installs and what the gates read.

Only the standard library is imported, and PyTorch where it is looked for: an install must not need it. Every source is
one translation unit; ``sm90/`` is compiled for Hopper alone, the other kernels for every architecture asked for.
Each object is named after a hash of all that went into it (its source, the headers that it includes, the flags, the
compiler), so that whoever builds next, an install or a test, reuses it, in any order and from several processes.
Commands run in this folder and hold no path of the clone: a copy of it makes the same objects.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
CACHE = CSRC.parent / "build" / "cuda"

ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
DEFAULT = ("8.0", "9.0a")  # what is built where no GPU says otherwise
HOPPER = "9.0a"  # wgmma is in sm_90a, not in sm_90; every GPU of capability 9.0 has both

OLDEST_TORCH = (2, 10)  # the stable ABI that library.cpp keeps to: one binary for this release and all later ones
DEFINES = (
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
    "-DUSE_CUDA",  # the CUDA part of PyTorch's C shim
    "-DPy_LIMITED_API=0x030B0000",
)

HEAD_DIMS = tuple(range(32, 129, 8))  # of attention


class Missing(RuntimeError):
    """What a build needs and this machine lacks; the message names it."""


class CompileError(RuntimeError):
    """A compiler refused; the message has its command and what it said."""


def run(command: Sequence[str | Path]) -> str:
    """The output of a command in this folder, both streams; :class:`CompileError` where it fails."""
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=CSRC, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        said = [line[:300] for line in done.stdout.splitlines()]  # nvcc can say thousands of long ones
        raise CompileError("\n".join([f"in {CSRC}: {shlex.join(words)}", *said[:40]]))
    return done.stdout


def architectures(text: str) -> tuple[str, ...]:
    """``TORCH_CUDA_ARCH_LIST``'s form ("8.0 9.0a+PTX", or with semicolons) as names of :data:`ARCHITECTURES`.

    9.0 is 9.0a. "+PTX" keeps its meaning: code of that architecture for GPUs that are newer than all of these.

    Raises:
        ValueError: a name is none of them.
    """
    chosen: dict[str, str] = {}
    for word in re.split(r"[;,\s]+", text.strip(" ;,")):
        name, plus, _ = word.partition("+PTX")
        name = HOPPER if name == "9.0" else name
        if name not in ARCHITECTURES:
            raise ValueError(f"CUDA architecture {word!r}; accepted: {', '.join(ARCHITECTURES)}, each also with +PTX")
        chosen[name] = chosen.get(name) or plus
    return tuple(name + plus for name, plus in chosen.items())


def nearest(major: int, minor: int) -> str:
    """The architecture whose code runs best on a GPU of compute capability ``major.minor``."""
    fits = [a for a in ARCHITECTURES if a.startswith(f"{major}.") and int(a.partition(".")[2].rstrip("a")) <= minor]
    if not fits:
        known = ", ".join(ARCHITECTURES)
        raise Missing(f"the GPU has compute capability {major}.{minor}, and the kernels are for {known}")
    return fits[-1]


def head_dims() -> str:
    """The compiler's flag for the head dims that attention is built for: ``FASTVIT_HEAD_DIMS`` ("64 80"), else all.

    A fraction of the compile time, for those who work on the kernels.

    Raises:
        ValueError: it names another number.
    """
    bits = 0
    for word in os.environ.get("FASTVIT_HEAD_DIMS", "").split() or map(str, HEAD_DIMS):
        if not word.isdecimal() or int(word) not in HEAD_DIMS:
            raise ValueError(f"FASTVIT_HEAD_DIMS: {word!r}; accepted: {', '.join(map(str, HEAD_DIMS))}")
        bits |= 1 << HEAD_DIMS.index(int(word))
    return f"-DFASTVIT_HEAD_DIMS={bits:#x}"


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler with the headers and the runtime library that belong to it."""

    nvcc: Path
    version: str  # "13.0"
    includes: tuple[Path, ...]
    cudart: Path

    def check(self, archs: Sequence[str]) -> None:
        """:class:`Missing` if this nvcc is too old for one of the architectures."""
        known = run([self.nvcc, "--list-gpu-code"]).split()  # sm_90a goes with sm_90
        for arch in archs:
            if f"sm_{number(arch).rstrip('a')}" not in known:
                raise Missing(f"nvcc {self.version} ({self.nvcc}) is too old for the architecture {arch}")


@dataclass(frozen=True)
class Torch:
    """The PyTorch that is linked with."""

    folder: Path
    version: str
    cuda: str


def number(arch: str) -> str:
    """An architecture as nvcc spells it: 90a for "9.0a+PTX"."""
    return arch.removesuffix("+PTX").replace(".", "")


def find_torch() -> Torch:
    """The PyTorch of this environment; :class:`Missing` if there is none that can be built with."""
    try:
        import torch
    except Exception as error:  # a broken install raises anything
        raise Missing(
            f"PyTorch can't be imported where the build runs ({error}); "
            "pip install --no-build-isolation . builds in your own environment"
        ) from error
    if torch.version.cuda is None:
        raise Missing(f"PyTorch {torch.__version__} is a build without CUDA")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise Missing(f"PyTorch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    return Torch(Path(torch.__file__).parent, torch.__version__, torch.version.cuda)


def _pip_folders(major: str) -> list[Path]:
    """Where NVIDIA's wheels put CUDA: nvidia/cu13 in every folder that packages are imported from."""
    return [folder for path in sys.path if (folder := Path(path or ".", "nvidia", f"cu{major}")).is_dir()]


def _candidates(major: str) -> Iterator[Path]:
    """Compilers, best first. One that is named by CUDA_HOME or CUDA_PATH is the only one."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            if not (nvcc := Path(home, "bin", "nvcc")).exists():
                raise Missing(f"no nvcc: {variable}={home} has no bin/nvcc")
            yield nvcc
            return
    if found := shutil.which("nvcc"):
        yield Path(found)
    yield from (nvcc for folder in _pip_folders(major) if (nvcc := folder / "bin" / "nvcc").exists())
    if (nvcc := Path("/usr/local/cuda/bin/nvcc")).exists():
        yield nvcc


def _toolkit(nvcc: Path) -> Toolkit:
    """What belongs to a compiler. It is asked where it really is, since a program of that name may only call it."""
    try:
        where = re.search(r"_HERE_=(.+)", run([nvcc, "--dryrun", "-x", "cu", os.devnull]))
        release = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]))
    except (CompileError, OSError) as error:
        raise Missing(f"{nvcc} does not run: {error}") from error
    if not where or not release:
        raise Missing(f"{nvcc} is no nvcc: it does not say where it is or of which version")
    here, version = Path(where[1].strip()).resolve(), release[1]
    pip = _pip_folders(version.partition(".")[0])
    own = [here.parent, *here.parent.glob("targets/*")]
    # NVIDIA's wheels come apart: headers of the runtime may lie in another folder than the compiler.
    tops = own if any((top / "include" / "cuda_runtime.h").exists() for top in own) else [*own, *pip]
    includes = [path for top in tops for path in (top / "include", top / "include" / "cccl") if path.is_dir()]
    for header in ("cuda_runtime.h", "cuda_fp16.h", "nv/target"):
        if not any((path / header).exists() for path in includes):
            raise Missing(f"{header}, a header of CUDA {version}, is not in {', '.join(map(str, includes)) or tops[0]}")
    libraries = [path for top in [*own, *pip] for lib in ("lib64", "lib") for path in (top / lib).glob("libcudart.so*")]
    if not libraries:
        raise Missing(f"libcudart.so of CUDA {version}, beside {nvcc}")
    return Toolkit(here / "nvcc", version, tuple(dict.fromkeys(includes)), libraries[0])


def find_toolkit(torch_cuda: str) -> Toolkit:
    """A compiler of the major version of PyTorch's CUDA, whose runtime library the extension shares.

    Raises:
        Missing: there is none, or its headers are incomplete.
    """
    major, others = torch_cuda.partition(".")[0], []
    for nvcc in _candidates(major):
        try:
            toolkit = _toolkit(nvcc)
        except Missing as missing:
            others.append(str(missing))
            continue
        if toolkit.version.partition(".")[0] == major:
            return toolkit
        others.append(f"{toolkit.nvcc} is of CUDA {toolkit.version}")
    if others:
        raise Missing(f"no nvcc for PyTorch's CUDA {torch_cuda}: {'; '.join(others)}")
    raise Missing("no nvcc: it is not on PATH, not in CUDA_HOME and not installed by pip (nvidia-cuda-nvcc)")


def host_compiler() -> list[str]:
    """The C++ compiler, and its own arguments: CXX, else c++ or g++."""
    if words := shlex.split(os.environ.get("CXX", "")):
        return words
    for name in ("c++", "g++"):
        if found := shutil.which(name):
            return [found]
    raise Missing("no C++ compiler: neither c++ nor g++ is on PATH, and CXX is not set")


def python_headers() -> Path:
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").exists():
        raise Missing(f"Python's headers: no Python.h in {folder} (Debian: python3-dev)")
    return folder


@dataclass(frozen=True)
class Build:
    """All that a build needs, found; making one says what is missing."""

    torch: Torch
    toolkit: Toolkit
    archs: tuple[str, ...]
    cxx: tuple[str, ...]
    python: Path

    @classmethod
    def find(cls, archs: Sequence[str]) -> Build:
        if sys.platform != "linux":
            raise Missing(f"the kernels are built on Linux only, not on {sys.platform}")
        torch = find_torch()
        cxx = host_compiler()  # first: nvcc calls it too
        toolkit = find_toolkit(torch.cuda)
        toolkit.check(archs)
        return cls(torch, toolkit, tuple(archs), tuple(cxx), python_headers())

    def sources(self) -> list[Path]:
        """Kernels that are for these architectures, then what registers and dispatches them."""
        kernels = sorted(CSRC.glob("*/*.cu"), key=lambda path: -path.stat().st_size)  # the longest compilations first
        if not self._hopper:
            kernels = [path for path in kernels if path.parent.name != "sm90"]
        return [*kernels, *sorted(CSRC.glob("*.cpp"))]

    @functools.cached_property
    def _hopper(self) -> bool:
        return any(arch.startswith(HOPPER) for arch in self.archs)

    def command(self, source: Path) -> list[str]:
        """What compiles a source, less its name and the object's."""
        if source.suffix == ".cu":
            return [
                str(self.toolkit.nvcc),
                *("-c", "-std=c++20", "-O3", "--expt-relaxed-constexpr"),
                *([f"-ccbin={self.cxx[0]}"] if len(self.cxx) == 1 else []),
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                *self._includes(),
                *([head_dims()] if source.stem.startswith("attention") else []),
                *(flag for arch in self._architectures(source) for flag in gencode(arch)),
            ]
        folders = [self.torch.folder / "include", self.torch.folder / "include/torch/csrc/api/include", self.python]
        defines = [*DEFINES, "-DFASTVIT_SM90"] if self._hopper else [*DEFINES]
        defines.append(f'-DFASTVIT_ARCHITECTURES="{" ".join(self.archs)}"')
        defines.append(f'-DFASTVIT_CUDA="{self.toolkit.version}"')
        return [
            *(*self.cxx, "-c", "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden"),
            *defines,
            *self._includes(),
            *(word for folder in folders for word in ("-isystem", str(folder))),
        ]

    def _includes(self) -> list[str]:
        return ["-Iinclude", *(word for path in self.toolkit.includes for word in ("-isystem", str(path)))]

    def _architectures(self, source: Path) -> tuple[str, ...]:
        return (HOPPER,) if source.parent.name == "sm90" else self.archs

    def object(self, source: Path) -> Path:
        """Where a source's object is, or will be."""
        digest = hashlib.sha256()
        for path in closure(source):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        digest.update("\0".join([*self.command(source), self.torch.version]).encode())
        return CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.o"

    def compile(self, sources: Sequence[Path]) -> dict[Path, Path]:
        """Compile what has changed, several sources at a time (MAX_JOBS of them): source to object."""
        objects = {source: self.object(source) for source in sources}
        with lock(), ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(self._compile, objects.items()))
        return objects

    def _compile(self, item: tuple[Path, Path]) -> None:
        source, target = item
        if not target.exists():
            print(f"fastvit: compiling {source.name}", flush=True)
            partial = target.with_suffix(".partial.o")
            said = run([*self.command(source), str(source.relative_to(CSRC)), "-o", partial])
            target.with_suffix(".log").write_text(said)  # warnings; compile_report.py reads them
            partial.replace(target)

    def link(self, target: Path) -> None:
        """Compile, and link the extension. PyTorch has loaded its libraries by the time that it is, hence no rpath."""
        objects = self.compile(self.sources()).values()
        target.parent.mkdir(parents=True, exist_ok=True)
        torch = [f"-L{self.torch.folder / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
        run([*self.cxx, "-shared", "-Wl,--as-needed", *objects, *torch, self.toolkit.cudart, "-o", target])


def gencode(arch: str) -> list[str]:
    """nvcc's flags for an architecture: its machine code and, with +PTX, code for later ones."""
    n = number(arch)
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}"]
    if arch.endswith("+PTX"):
        n = n.rstrip("a")  # no later GPU takes 90a's
        flags.append(f"-gencode=arch=compute_{n},code=compute_{n}")
    return flags


def closure(source: Path) -> list[Path]:
    """A source and the headers of ours that it includes, directly or not."""
    seen: set[Path] = set()
    left = [source]
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            left += [found for folder in (path.parent, CSRC / "include") if (found := folder / name).is_file()]
    return sorted(seen)


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """One process at a time: tests in several ask for the same objects at once."""
    import fcntl  # which Windows, where nothing is built, does not have

    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
