"""Elementwise operations and sums of partial sums on the CUDA kernels (``csrc/common/elementwise.cu``), float32 too."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit import activations
from fastvit.cuda import extension
from fastvit.cuda.extension import check_scale, unit_rows


def sum_partials(partials: Tensor) -> Tensor:
    """Return the sum (...) float32 of ``partials`` (S, ...) over S, bit-equal from run to run."""
    partials = partials.contiguous()
    sums = torch.empty(partials.shape[1:], dtype=torch.float32, device=partials.device)
    if partials.shape[0] == 0:
        return sums.zero_()
    extension.library.sum_partials(partials, partials, sums)
    return sums


def sum_groups(partials: Tensor) -> tuple[Tensor, ...]:
    """Return the G sums of ``partials`` (S, G, ...), none a view."""
    return tuple(one.clone() for one in sum_partials(partials))


def scale_rows(x: Tensor, dtype: torch.dtype, row_scale: Tensor | None = None) -> Tensor:
    """Return row_scale * x (M, N) in ``dtype``; x itself if that changes nothing."""
    x = unit_rows(x)
    if x.dtype == dtype and row_scale is None:
        return x
    check_scale(x.shape[0], row_scale)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    extension.library.scale_rows(x, x, row_scale, out)
    return out


def gated_forward(x: Tensor, activation: str) -> Tensor:
    """Return act(first half) * second half of the last dimension: x (M, 2N) -> (M, N)."""
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    extension.library.gated_forward(x, unit_rows(x), activations.GATED[activation], out)
    return out


def activation_gradient(dout: Tensor, preact: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradient to ``preact`` and act(preact), as :func:`fastvit.triton.activations.activation_gradient`."""
    activations.check(activation, gated=True, optional=False)
    if tuple(preact.shape) != (dout.shape[0], activations.columns(activation) * dout.shape[1]):
        raise ValueError(f"{activation}: dout {tuple(dout.shape)} does not fit preact {tuple(preact.shape)}")
    dpreact = torch.empty(preact.shape, dtype=preact.dtype, device=preact.device)
    hidden = torch.empty(dout.shape, dtype=preact.dtype, device=preact.device)
    name = activations.GATED.get(activation, activation)
    extension.library.activation_gradient(dout, unit_rows(dout), unit_rows(preact), name, dpreact, hidden)
    return dpreact, hidden
