"""Argument checks shared by the ops. Messages name the value that was wrong and what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.reference import Norm


def same_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Every tensor is on x's device."""
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"ops.{op}: {name} is on {t.device}, x is on {x.device}; all must be on one device")


def floating(op: str, **tensors: Tensor | None) -> None:
    """Every tensor is real floating point."""
    for name, t in tensors.items():
        if t is not None and not t.is_floating_point():
            raise ValueError(f"ops.{op}: {name} has dtype {t.dtype}; accepted: float32, float16, bfloat16 or float64")


def shape(op: str, name: str, t: Tensor | None, expected: tuple[int, ...]) -> None:
    """t is None or has exactly the expected shape."""
    if t is not None and tuple(t.shape) != expected:
        raise ValueError(f"ops.{op}: {name} has shape {tuple(t.shape)}, expected {tuple(expected)}")


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """All tensors share one dtype."""
    given = {name: t.dtype for name, t in tensors.items() if t is not None}
    if len(set(given.values())) > 1:
        said = ", ".join(f"{name} {dtype}" for name, dtype in given.items())
        raise ValueError(f"ops.{op}: dtypes differ: {said}; they must share one")


def norm(op: str, given: Norm | None, width: int) -> None:
    """norm is None or (weight (D,), bias (D,) or None, eps)."""
    if given is None:
        return
    if not isinstance(given, tuple) or len(given) != 3:
        raise ValueError(f"ops.{op}: norm must be (weight, bias, eps), got {given!r}")
    shape(op, "norm weight", given[0], (width,))
    shape(op, "norm bias", given[1], (width,))


def merging(
    op: str, batch: torch.Size, width: int, residual: Tensor | None, gamma: Tensor | None, row_scale: Tensor | None
) -> None:
    """residual (*batch, width); gamma (width,) and row_scale, (batch[0],) or one for each row, need a residual."""
    if residual is None:
        if gamma is not None or row_scale is not None:
            raise ValueError(f"ops.{op}: gamma and row_scale scale what is added to a residual; give residual too")
        return
    shape(op, "residual", residual, (*batch, width))
    shape(op, "gamma", gamma, (width,))
    if row_scale is not None:
        if not batch:
            raise ValueError(f"ops.{op}: row_scale needs a leading batch dimension")
        if tuple(row_scale.shape) != (batch.numel(),):
            shape(op, "row_scale", row_scale, (batch[0],))
        if row_scale.requires_grad:
            raise ValueError(f"ops.{op}: row_scale (drop-path) has no gradient; detach it")
