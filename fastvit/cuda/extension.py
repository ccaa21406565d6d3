"""The compiled CUDA kernels (``csrc/``): the extension, loaded, and what every launcher of this folder shares.

Where ``fastvit/_C.abi3.so`` is absent, or was built for another PyTorch, :data:`MISSING` says so and nothing else
happens. The tests load the same sources compiled for the CPU with :func:`emulate`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Maybe = TypeVar("Maybe", Tensor, Tensor | None)
_PACKAGE = Path(__file__).parent.parent
library: Any = None  # torch.ops.fastvit_cuda, or fastvit_emulated in the tests
EMULATED = False

MAX_WIDTH = 8192  # of a row that LayerNorm normalises
MAX_HEAD_DIM = 128
HALF = (torch.float16, torch.bfloat16)


def _load() -> str | None:
    """Load the extension, or return the reason against it."""
    global library
    found = sorted(_PACKAGE.glob("_C*.so"))
    if not found:
        return "the CUDA extension is not built; FASTVIT_BUILD_CUDA=1 pip install --no-build-isolation . builds it"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = str(error).splitlines()[0]
        return f"the CUDA extension does not match torch {torch.__version__}; install fastvit again ({reason})"
    library = torch.ops.fastvit_cuda
    return None


MISSING = _load()


def emulate(path: str | Path) -> None:
    """Launch on CPU tensors from now on, in this process, by a library that ``tests/emulator`` built.

    :func:`fastvit.ops.library.implement_on_cpu` lets the ops take such tensors too.
    """
    global library, EMULATED, MISSING
    torch.ops.load_library(str(path))
    library, EMULATED, MISSING = torch.ops.fastvit_emulated, True, None


class _NoLibrary:
    """In place of the extension: each function does nothing and returns 1, the count where it counts."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 1


@contextmanager
def no_launches() -> Iterator[None]:
    """Launch nothing inside: launchers take meta tensors, and look up their tiles as usual."""
    global library, MISSING
    before, library, MISSING = (library, MISSING), _NoLibrary(), None
    try:
        yield
    finally:
        library, MISSING = before


@cache
def built_for(capability: tuple[int, int]) -> bool:
    """Return whether the extension has code, or PTX, for GPUs of this compute capability."""
    for name in importlib.import_module("fastvit._C").ARCHITECTURES.split():
        major, minor = map(int, name.removesuffix("+PTX").rstrip("a").split("."))
        if (major == capability[0] and minor <= capability[1]) or (
            name.endswith("+PTX") and (major, minor) <= capability
        ):
            return True
    return False


@torch.compiler.assume_constant_result
def _refuse_device(device: torch.device) -> str | None:
    """Return the reason against a GPU. Dynamo calls this and does not trace it."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU is older than compute capability 8.0: it has {major}.{minor}"
    if not built_for((major, minor)):
        return f"the CUDA extension has no code for compute capability {major}.{minor}"
    return None


def refuse(op: str, x: Tensor, *, weights: Iterable[Tensor] = (), needs_grad: bool = False) -> str | None:
    """Return why the CUDA kernels can't run ``op`` on ``x``, with the ``weights`` of its products, or None."""
    if MISSING:
        return MISSING
    if x.device.type not in ("cuda", "meta", "cpu" if EMULATED else "cuda"):
        return f"the tensors are on {x.device}; cuda takes CUDA tensors"
    if x.is_cuda and (refusal := _refuse_device(x.device)):
        return refusal
    if x.dtype not in (torch.float32, *HALF):
        return f"dtype {x.dtype} is not supported; accepted: float32, float16, bfloat16"
    if op == "layer_norm":
        if x.shape[-1] > MAX_WIDTH:
            return f"a width of {x.shape[-1]} is not supported; accepted: up to {MAX_WIDTH}"
    else:
        autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # meta has none
        for operand in weights or (x,):
            dtype = operand.dtype
            if autocast and dtype != torch.float64:
                dtype = torch.get_autocast_dtype(x.device.type)
            if dtype not in HALF:
                return f"dtype {dtype} is not supported; accepted: float16, bfloat16"
    if op.startswith("attention") and (x.shape[-1] % 8 or not 32 <= x.shape[-1] <= MAX_HEAD_DIM):
        return f"head dim {x.shape[-1]} is not supported; accepted: multiples of 8 from 32 to {MAX_HEAD_DIM}"
    if op == "rotate" and x.shape[-1] % 8:
        return f"head dim {x.shape[-1]} is not supported; accepted: multiples of 8"
    for weight in weights:
        widths = weight.shape if weight.ndim == 2 else weight.shape[:1]  # of patches any
        if any(width % 8 for width in widths):
            return f"a weight of {tuple(weight.shape)} is not supported; accepted: widths that are multiples of 8"
    return None


def set_architecture(architecture: int) -> None:
    """Choose kernels and tiles as on this architecture (80, 90, ...) from now on, under :func:`emulate`."""
    library.assume(torch.empty(0), architecture)


def aligned(t: Maybe) -> Maybe:
    """Return t if 16-byte loads can read its rows, else a copy.

    They can where the last stride is 1, the others are multiples of 16 bytes, and no row lies over another.
    """
    if t is None:
        return t
    unit = 16 // t.element_size()
    free = [s for s, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1]
    fits = (
        (t.stride(-1) == 1 or t.shape[-1] == 1)
        and not any(s % unit or s < t.shape[-1] for s in free)
        and t.data_ptr() % 16 == 0
    )
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def unit_rows(t: Maybe) -> Maybe:
    """Return t (M, N) or (N,) with a unit last stride; a copy only where it has another."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def check_scale(rows: int, row_scale: Tensor | None) -> None:
    """Check that each entry of row_scale is for as many of the rows."""
    if row_scale is not None and (row_scale.shape[0] == 0 or rows % row_scale.shape[0]) and rows:
        raise ValueError(f"row_scale has {row_scale.shape[0]} entries, which do not divide the {rows} rows")
