"""Activations: the jit helpers that the GEMMs' epilogues call, and the elementwise kernels for the rest.

Every activation here is x * g(x) with a gate g between 0 and 1, so one table of gates gives both the
value x g and the slope g + x g'. "gelu" is the exact (erf) form, "gelu_tanh" its tanh approximation
(Hendrycks and Gimpel, arXiv:1606.08415), "quick_gelu" CLIP's x sigmoid(1.702 x), "silu" the gate of
"swiglu" (Shazeer, arXiv:2002.05202).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.triton.launch import launch, rows_contiguous, store

EPILOGUE_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")  # "swiglu" pairs distant columns: a kernel of its own


@triton.jit
def gate(x, ACTIVATION: tl.constexpr):
    """g(x) and g'(x) in float32. A caller that drops g' does not pay for it."""
    if ACTIVATION == "gelu":
        g = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 = sigmoid(2u)
        g = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        slope = g * (1 - g) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACTIVATION == "quick_gelu":
        g = tl.sigmoid(1.702 * x)
        slope = 1.702 * g * (1 - g)
    else:
        tl.static_assert(ACTIVATION == "silu")
        g = tl.sigmoid(x)
        slope = g * (1 - g)
    return g, slope


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    g, _ = gate(x, ACTIVATION)
    return x * g


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x)."""
    g, slope = gate(x, ACTIVATION)
    return x * g, g + x * slope


@triton.jit
def swiglu_forward_kernel(
    x_ptr,  # (M, 2N): gates, then values
    out_ptr,  # (M, N)
    N,
    BLOCK: tl.constexpr,
):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    x_ptrs = x_ptr + row * 2 * N + cols
    gates = tl.load(x_ptrs, mask=mask).to(tl.float32)
    values = tl.load(x_ptrs + N, mask=mask).to(tl.float32)
    store(out_ptr + row * N + cols, activate(gates, "silu") * values, mask)


@triton.jit
def activation_gradient_kernel(
    dout_ptr,  # (M, N)
    x_ptr,  # (M, N), or (M, 2N) for swiglu: what the activation was applied to
    dx_ptr,  # like x
    hidden_ptr,  # (M, N): the activation's output, recomputed
    N,
    stride_dout,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    dout = tl.load(dout_ptr + row * stride_dout + cols, mask=mask).to(tl.float32)
    if ACTIVATION == "swiglu":
        offsets = row * 2 * N + cols
        gates = tl.load(x_ptr + offsets, mask=mask).to(tl.float32)
        values = tl.load(x_ptr + offsets + N, mask=mask).to(tl.float32)
        hidden, slope = activate_with_slope(gates, "silu")
        store(dx_ptr + offsets, dout * values * slope, mask)
        store(dx_ptr + offsets + N, dout * hidden, mask)
        hidden *= values
    else:
        offsets = row * N + cols
        hidden, slope = activate_with_slope(tl.load(x_ptr + offsets, mask=mask).to(tl.float32), ACTIVATION)
        store(dx_ptr + offsets, dout * slope, mask)
    store(hidden_ptr + row * N + cols, hidden, mask)


def row_blocks(width: int) -> tuple[int, int]:
    """Elements of a row that one program takes, and programs in a row, for the elementwise kernels."""
    block = min(triton.next_power_of_2(max(width, 1)), 1024)
    return block, triton.cdiv(width, block)


def swiglu_forward(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension: x (M, 2N) float32, float16 or bfloat16 -> (M, N)."""
    x = x.contiguous()
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    block, columns = row_blocks(out.shape[1])
    args = {"x_ptr": x, "out_ptr": out, "N": out.shape[1], "BLOCK": block}
    launch(swiglu_forward_kernel, (out.shape[0], columns), args)
    return out


def activation_gradient(dout: Tensor, preact: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Differentiate an activation and recompute its output, in one pass.

    Args:
        dout: (M, N), float32, float16 or bfloat16; a row stride is kept, other layouts are made contiguous.
        preact: (M, N), or (M, 2N) for "swiglu"; same dtypes; made contiguous.
        activation: "gelu", "gelu_tanh", "quick_gelu" or "swiglu".

    Returns:
        The gradient, with the shape and dtype of ``preact``, and act(preact) (M, N) in that dtype.

    Raises:
        ValueError: unknown activation, or shapes that do not belong together.
    """
    if activation not in (*EPILOGUE_ACTIVATIONS, "swiglu"):
        raise ValueError(f"unknown activation {activation!r}")
    halves = 2 if activation == "swiglu" else 1
    if tuple(preact.shape) != (dout.shape[0], halves * dout.shape[1]):
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
        "ACTIVATION": activation,
        "BLOCK": block,
    }
    launch(activation_gradient_kernel, (dout.shape[0], columns), args)
    return dx, hidden
