"""LayerNorm on the CUDA kernels (``csrc/common/layer_norm.cu``), float32 too."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.cuda import extension
from fastvit.cuda.elementwise import sum_groups
from fastvit.cuda.extension import MAX_WIDTH, check_scale, unit_rows


def layer_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return (y, stream, mean, rstd) as :func:`fastvit.triton.layer_norm.layer_norm_forward`."""
    rows, width = x.shape
    if width > MAX_WIDTH:
        raise ValueError(f"layer_norm: the CUDA kernels hold a row in registers, so D <= {MAX_WIDTH}; got {width}")
    check_scale(rows, row_scale)
    x, residual, gamma = unit_rows(x), unit_rows(residual), unit_rows(gamma)
    row_scale, weight, bias = unit_rows(row_scale), unit_rows(weight), unit_rows(bias)
    stream = None if residual is None else torch.empty(rows, width, dtype=residual.dtype, device=x.device)
    y = torch.empty(rows, width, dtype=out_dtype or (x if stream is None else stream).dtype, device=x.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    extension.library.layer_norm_forward(x, x, weight, bias, eps, residual, gamma, row_scale, y, stream, mean, rstd)
    return y, stream, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    dstream: Tensor | None,
    normalised: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    need_params: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, dresidual, dweight, dbias, dgamma) as :func:`fastvit.triton.layer_norm.layer_norm_backward`."""
    rows, width = normalised.shape
    dy, dstream, normalised, branch = unit_rows(dy), unit_rows(dstream), unit_rows(normalised), unit_rows(branch)
    weight, gamma = unit_rows(weight), unit_rows(gamma)
    row_scale = None if branch is None else unit_rows(row_scale)  # without a branch the caller scales its gradient
    dx = torch.empty(rows, width, dtype=(normalised if branch is None else branch).dtype, device=dy.device)
    dresidual = None if branch is None else torch.empty_like(dx, dtype=normalised.dtype)
    partials = None
    if need_params:
        programs = extension.library.layer_norm_programs(dy, rows, width)
        shape = (programs, 2 if gamma is None else 3, width)
        partials = torch.empty(shape, dtype=torch.float32, device=dy.device)
    extension.library.layer_norm_backward(
        dy, dy, dstream, normalised, weight, mean, rstd, branch, gamma, row_scale, dx, dresidual, partials
    )
    if partials is None:
        return dx, dresidual, None, None, None
    dweight, dbias, *dgamma = sum_groups(partials)
    return dx, dresidual, dweight, dbias, dgamma[0] if dgamma else None
