"""Registration of the kernel ops: one schema, one implementation, one fake function, one autograd rule each.

The rule is registered with the op, not an autograd.Function around it: so opcheck sees it, AOTAutograd traces through
it without looking at our Python, and a backward op, which is registered like any other, can refuse its own derivative.
What such rules can't do is torch.func; there :mod:`fastvit.ops.backends` takes the reference.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastvit.ops.backends import INTERPRETING
from fastvit.ops.launchers import Launchers

LIBRARY = torch.library.Library("fastvit", "FRAGMENT")
KERNELS: dict[Any, Callable[..., Any]] = {}  # torch.ops.fastvit.<name>.default -> its implementation
_devices = ["CUDA", "CPU"] if INTERPRETING else ["CUDA"]


def _refuse_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError(
        "fastvit: the kernels have no second derivatives; "
        'compute this under fastvit.backend("reference"), which has them'
    )


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[[Any], Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """Define ``torch.ops.fastvit.<name>`` and return it. Without ``backward`` its derivative is refused.

    ``fake``, and ``kernel`` where it has a parameter ``a`` alone, take the schema's arguments as one namespace.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    if list(inspect.signature(kernel).parameters) == ["a"]:
        kernel = _by_name(schema, kernel)
    for device in _devices:
        LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"fastvit::{name}", _by_name(schema, fake), lib=LIBRARY)
    rule = backward or _refuse_second_derivative
    torch.library.register_autograd(f"fastvit::{name}", rule, setup_context=setup_context, lib=LIBRARY)
    op = getattr(torch.ops.fastvit, name).default
    KERNELS[op] = kernel
    return op


def _by_name(schema: str, function: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return ``function`` of one namespace as a function of a schema's arguments: the schema alone lists them."""
    names = re.findall(r"\w+ (\w+)", schema[: schema.index(" -> ")].replace("?", "").replace("[]", ""))

    def call(*args: Any) -> Any:
        return function(SimpleNamespace(**dict(zip(names, args, strict=True))))

    return call


def implement_on_cpu() -> None:
    """Let the kernel ops take CPU tensors too, as their kernels do when the tests emulate CUDA."""
    if "CPU" not in _devices:
        _devices.append("CPU")
        for op, kernel in KERNELS.items():
            LIBRARY.impl(op.name().removeprefix("fastvit::"), kernel, "CPU")


def launchers(backend: str) -> Launchers:
    """Return the launchers of a backend, "triton" or "cuda"."""
    if backend == "cuda":
        from fastvit.cuda import launchers as cuda

        return cuda
    from fastvit.triton import launchers as triton

    return triton


def needs_grad(*tensors: Tensor | None) -> bool:
    """Return whether autograd will run a backward for these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def unit_stride(t: Tensor) -> Tensor:
    """Return t with a contiguous last dimension; a copy only where strides demand it."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """Return x (..., D) as (M, D) with the last dimension contiguous; a copy only where strides demand it."""
    x = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def dense(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return parameters contiguous, as the kernels read them; copies only where strides demand it."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def none_if_empty(t: Tensor) -> Tensor | None:
    """Return None for a tensor of shape (0,), an op's absent result."""
    return None if t.shape == (0,) else t


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """Return a tensor of shape (0,) for None, an absent result."""
    return like.new_empty(0) if t is None else t


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of matrix products under autocast on ``device``, or None where autocast is off."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)  # meta has no autocast
    return torch.get_autocast_dtype(device.type) if on else None


def cast_for_autocast(dtype: torch.dtype | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return matmul operands in autocast's ``dtype``, as autocast treats the ops that these replace."""
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def cast_gradients(*pairs: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the gradient of each (gradient, parameter) in its parameter's dtype, None where either is absent."""
    return tuple(None if g is None or p is None else g.to(p.dtype) for g, p in pairs)
