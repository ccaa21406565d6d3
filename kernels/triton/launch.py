"""Launching, and the parts that kernels share: dots, rounding, layouts, the architecture.

A launcher allocates its outputs and calls :func:`launch`. Under :func:`record` nothing runs: the
launches are collected instead, on meta tensors and for any architecture. So the compile gates and
the launch counts look at exactly what ships.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETING = tl.constexpr(INTERPRETING)

ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # compute capability, major * 10 + minor


@dataclass(frozen=True)
class Launch:
    """A kernel launch, ``kernel[grid](**args, **options)``."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    hot: bool = True  # hot kernels must not spill; the others are small or rare


_assumed_arch: int | None = None
_recorded: list[Launch] | None = None


@contextmanager
def assume(arch: int) -> Iterator[None]:
    """Choose configurations as on ``arch``, whatever the device (the interpreter runs any of them)."""
    global _assumed_arch
    before, _assumed_arch = _assumed_arch, arch
    try:
        yield
    finally:
        _assumed_arch = before


@contextmanager
def record(arch: int) -> Iterator[list[Launch]]:
    """Collect the launches made inside, for ``arch``, instead of running them. Takes meta tensors."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        with assume(arch):
            yield _recorded
    finally:
        _recorded = before


def architecture(tensor: torch.Tensor) -> int:
    """Return the compute capability (90 for Hopper) whose configurations a launch on ``tensor`` uses."""
    if _assumed_arch is not None:
        return _assumed_arch
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return major * 10 + minor
    return 80  # the interpreter


@cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def device_name(tensor: torch.Tensor) -> str | None:
    """Return the GPU whose measured tiles a launch on ``tensor`` may use, None for an assumed architecture."""
    if _assumed_arch is not None or tensor.is_meta:
        return None
    return _name(tensor.get_device()) if tensor.is_cuda else "interpreter"


def multiprocessors(tensor: torch.Tensor) -> int:
    """Return how many persistent programs fill the device; small in the interpreter, so that they loop."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 132 if tensor.is_meta else 3


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: dict[str, Any],
    *,
    tile: dict[str, Any] | None = None,
    num_warps: int = 4,
    hot: bool = True,
) -> None:
    """Run ``kernel`` over ``grid`` on the device and current stream of its tensors (or record it).

    A tile gives the numbers of warps and of stages.

    Triton compiles again for every new constexpr, and for every integer that turns out to be 1 or a multiple of 16.
    So what grows with the batch is never a constexpr, and is named in a kernel's ``do_not_specialize``, as is every
    size that no address depends on; strides and widths stay specialised: they let 16 bytes be loaded at once.
    """
    options = {"num_warps": tile["warps"] if tile else num_warps, "num_stages": tile["stages"] if tile else 2}
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, options, hot))
        return
    if 0 in grid:
        return
    device = next(a.device for a in args.values() if isinstance(a, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**args, **options)


def precision(dtype: torch.dtype) -> str:
    """Return the dot precision for ``dtype``: float32 is IEEE unless PyTorch's ``allow_tf32`` is set."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """Return x (M, N) or (N,), copied unless its rows are contiguous and near enough for 32 bits inside a tile."""
    return x if x.stride(-1) == 1 and x.stride(0) < 2**23 else x.contiguous()


def rows_per_image(m: int, row_scale: torch.Tensor | None) -> int:
    """Return how many of M rows share one entry of row_scale (B,)."""
    if row_scale is None:
        return 1
    rows = m // max(row_scale.shape[0], 1)
    if rows * row_scale.shape[0] != m:
        raise ValueError(f"row_scale has {row_scale.shape[0]} entries, which do not divide the {m} rows")
    return max(rows, 1)


@triton.constexpr_function
def before(pieces, i):
    """Return where piece ``i`` starts when ``pieces`` are laid end to end."""
    return sum(pieces[:i])


def pieces(length: int, smallest: int = 16, largest: int = 128) -> tuple[int, ...]:
    """Cut ``length`` (rounded up to ``smallest``) into descending powers of two: 208 -> 128, 64, 16.

    Triton's tiles must be powers of two; unrolled over pieces they fit any multiple of 16.
    """
    rest = max(triton.cdiv(length, smallest), 1) * smallest
    out = []
    while rest:
        piece = largest
        while piece > rest:
            piece //= 2
        out.append(piece)
        rest -= piece
    return tuple(out)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b in float32. The interpreter multiplies bf16 as raw bits, so it gets float32 operands."""
    if _INTERPRETING:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Return float32 x in ``dtype``, rounded to nearest even. The interpreter truncates bf16: it gets rounded bits."""
    if _INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # NaN stays as it is
    return x.to(dtype)


@triton.jit
def store(pointers, x, mask):
    """Store float32 x, rounded to the pointers' dtype."""
    tl.store(pointers, narrow(x, pointers.dtype.element_ty), mask=mask)
