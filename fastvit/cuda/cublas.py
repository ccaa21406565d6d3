"""The linear layer's products by cuBLASLt, through PyTorch: for problems whose table row names the library.

Each function stands for the kernel of its name in :mod:`fastvit.cuda.linear`, which calls it. Epilogues are cuBLASLt's
where PyTorch reaches them (``addmm``: the bias, or beta * C; ``_addmm_activation``: tanh GELU); the rest runs in
PyTorch's elementwise kernels, which round in between as eager PyTorch does. On CPU tensors, in the tests, the same
calls are the CPU's products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit import reference


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    save_preact: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return (out, preact or None) as :func:`fastvit.cuda.linear.linear_forward`; float32 too. No gated activation."""
    bias = None if bias is None else bias.to(x.dtype)
    scaled = gamma is not None or row_scale is not None
    bare = bias is None and activation is None and not scaled and not save_preact
    if bare and residual is not None and residual.dtype == x.dtype:
        return torch.addmm(residual, x, weight.mT), None  # beta * C; beside a bias PyTorch has no place for it
    if bias is not None and activation == "gelu_tanh" and not save_preact and x.is_cuda:  # on a CPU it is GELU by erf
        y, preact = torch._addmm_activation(bias, x, weight.mT, use_gelu=True), None
    else:
        preact = x @ weight.mT if bias is None else torch.addmm(bias, x, weight.mT)
        y = reference.activate(preact, activation)
    if residual is not None or scaled:
        if row_scale is not None:
            row_scale = row_scale.repeat_interleave(len(x) // max(len(row_scale), 1))
        y = reference.merge(y, y.new_zeros(1) if residual is None else residual, gamma, row_scale)
    return y, preact if save_preact else None


def linear_input_gradient(dout: Tensor, weight: Tensor, gamma: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return (gamma * dout) weight in ``dtype``: dout (M, N), weight (N, K), gamma (N,) or None."""
    return _product(dout if gamma is None else (dout * gamma).to(weight.dtype), weight, dtype)


def linear_weight_gradient(dout: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dout^T x in ``dtype``: dout (M, N), x (M, K)."""
    return _product(dout.mT, x, dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b, summed in float32 and rounded once, to ``dtype``: that of the operands or float32."""
    if dtype == a.dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)
