"""Activations: one function for each, which the GEMMs' epilogues inline, and the elementwise kernels for the rest.

A function of this file that is marked ``@formula`` is the activation of its name in :mod:`fastvit.activations`: it
returns the value and the slope, in float32. A caller that drops the slope does not pay for it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit import activations
from fastvit.triton.launch import launch, rows_contiguous, store

FORMULAS: dict[str | None, Any] = {None: None}  # by name: what kernels take as ACTIVATION


def formula(function: Any) -> Any:
    """Compile ``function`` as the activation of its name."""
    FORMULAS[function.__name__] = triton.jit(function)
    return FORMULAS[function.__name__]


@formula
def gelu(x):
    g = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return x * g, g + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))


@formula
def gelu_tanh(x):
    g = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))  # (1 + tanh u) / 2 = sigmoid(2u)
    return x * g, g + x * (g * (1 - g) * 1.5957691216057308 * (1 + 0.134145 * x * x))


@formula
def quick_gelu(x):
    g = tl.sigmoid(1.702 * x)
    return x * g, g + x * (1.702 * g * (1 - g))


@formula
def relu(x):
    return tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)  # NaN stays NaN


@formula
def relu_squared(x):
    positive = tl.where(x < 0, 0.0, x)
    return positive * positive, 2 * positive


@formula
def silu(x):
    g = tl.sigmoid(x)
    return x * g, g + x * (g * (1 - g))


@triton.jit
def gated_forward_kernel(
    x_ptr,  # (M, 2N): gates, then values
    out_ptr,  # (M, N)
    N,
    ACTIVATION: tl.constexpr,  # of the gates
    BLOCK: tl.constexpr,
):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    x_ptrs = x_ptr + row * 2 * N + cols
    gates, _ = ACTIVATION(tl.load(x_ptrs, mask=mask).to(tl.float32))
    values = tl.load(x_ptrs + N, mask=mask).to(tl.float32)
    store(out_ptr + row * N + cols, gates * values, mask)


@triton.jit
def activation_gradient_kernel(
    dout_ptr,  # (M, N)
    x_ptr,  # (M, N), or (M, 2N) with a gate: the activation's input
    dx_ptr,  # like x
    hidden_ptr,  # (M, N): the activation's output, recomputed
    N,
    stride_dout,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    dout = tl.load(dout_ptr + row * stride_dout + cols, mask=mask).to(tl.float32)
    offsets = row * (2 * N if GATED else N) + cols
    hidden, slope = ACTIVATION(tl.load(x_ptr + offsets, mask=mask).to(tl.float32))
    if GATED:
        values = tl.load(x_ptr + offsets + N, mask=mask).to(tl.float32)
        store(dx_ptr + offsets + N, dout * hidden, mask)
        dout *= values
        hidden *= values
    store(dx_ptr + offsets, dout * slope, mask)
    store(hidden_ptr + row * N + cols, hidden, mask)


def row_blocks(width: int) -> tuple[int, int]:
    """Return the elements of a row that one program takes, and the programs of a row, for elementwise kernels."""
    block = min(triton.next_power_of_2(max(width, 1)), 1024)
    return block, triton.cdiv(width, block)


def gated_forward(x: Tensor, activation: str) -> Tensor:
    """Return act(first half) * second half of the last dimension: x (M, 2N) float32, float16 or bfloat16 -> (M, N)."""
    x = x.contiguous()
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    block, columns = row_blocks(out.shape[1])
    act = FORMULAS[activations.GATED[activation]]
    args = {"x_ptr": x, "out_ptr": out, "N": out.shape[1], "ACTIVATION": act, "BLOCK": block}
    launch(gated_forward_kernel, (out.shape[0], columns), args)
    return out


def activation_gradient(dout: Tensor, preact: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Differentiate an activation and recompute its output, in one pass.

    Args:
        dout: (M, N), float32, float16 or bfloat16; a row stride is kept, other layouts are made contiguous.
        preact: (M, N), or (M, 2N) for a gated activation; same dtypes; made contiguous.
        activation: a name in :mod:`fastvit.activations`.

    Returns:
        The gradient, with the shape and dtype of ``preact``, and act(preact) (M, N) in that dtype.

    Raises:
        ValueError: unknown activation, or shapes that do not belong together.
    """
    activations.check(activation, gated=True, optional=False)
    if tuple(preact.shape) != (dout.shape[0], activations.columns(activation) * dout.shape[1]):
        raise ValueError(f"{activation}: dout {tuple(dout.shape)} does not fit preact {tuple(preact.shape)}")
    dout, preact = rows_contiguous(dout), preact.contiguous()
    dx, hidden = torch.empty_like(preact), preact.new_empty(dout.shape)
    block, columns = row_blocks(dout.shape[1])
    args = {
        "dout_ptr": dout,
        "x_ptr": preact,
        "dx_ptr": dx,
        "hidden_ptr": hidden,
        "N": dout.shape[1],
        "stride_dout": dout.stride(0),
        "ACTIVATION": FORMULAS[activations.GATED.get(activation, activation)],
        "GATED": activation in activations.GATED,
        "BLOCK": block,
    }
    launch(activation_gradient_kernel, (dout.shape[0], columns), args)
    return dx, hidden
