"""LayerNorm, with the residual add, LayerScale and drop-path before it: one pass over memory.

A program holds its rows whole in registers, so that the variance is the mean of squared deviations
(no cancellation, unlike the mean of squares minus the squared mean) and nothing is read twice. The
backward pass is persistent: each program walks over its share of the rows, keeps its sums for the
parameters in registers and writes them once; :func:`sum_groups` adds them up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.triton.launch import launch, multiprocessors, narrow, rows_contiguous, rows_per_image, store
from fastvit.triton.reduce import sum_groups

MAX_WIDTH = 8192
_PROGRAMS_PER_SM = 4  # of the backward pass: 16 warps hide the loads, and the partial rows stay few


@triton.jit
def _scales(row_scale_ptr, rows, row_mask, rows_per_image):
    """Return row_scale (B,) spread over the rows of its images: (ROWS, 1)."""
    return tl.load(row_scale_ptr + rows // rows_per_image, row_mask, other=0.0)[:, None]


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def layer_norm_forward_kernel(
    x_ptr,  # (M, D), row stride stride_x
    residual_ptr,  # (M, D) or None, row stride stride_residual
    gamma_ptr,  # (D,) or None
    row_scale_ptr,  # (B,) float32 or None
    weight_ptr,  # (D,) or None
    bias_ptr,  # (D,) or None
    y_ptr,  # (M, D)
    stream_ptr,  # (M, D) in the residual's dtype, or None without one
    mean_ptr,  # (M,) float32
    rstd_ptr,  # (M,) float32
    M,
    D,
    rows_per_image,
    stride_x,
    stride_residual,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    row_mask, column_mask = rows < M, columns < D
    mask = row_mask[:, None] & column_mask[None, :]
    at = rows[:, None] * D + columns[None, :]

    x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows[:, None] * stride_residual + columns[None, :], mask, other=0.0)
        if gamma_ptr is not None:
            x *= tl.load(gamma_ptr + columns, column_mask, other=0.0).to(tl.float32)[None, :]
        if row_scale_ptr is not None:
            x *= _scales(row_scale_ptr, rows, row_mask, rows_per_image)
        stream = narrow(residual.to(tl.float32) + x, stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + at, stream, mask)
        x = stream.to(tl.float32)  # the statistics are those of what backward will read

    mean = tl.sum(x, 1) / D
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    tl.store(mean_ptr + rows, mean, row_mask)
    tl.store(rstd_ptr + rows, rstd, row_mask)

    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + columns, column_mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, column_mask, other=0.0).to(tl.float32)[None, :]
    store(y_ptr + at, y, mask)


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def layer_norm_backward_kernel(
    dy_ptr,  # (M, D), row stride stride_dy
    dstream_ptr,  # (M, D) or None, row stride stride_dstream
    normalised_ptr,  # (M, D), row stride stride_normalised
    branch_ptr,  # (M, D), row stride stride_branch, or None: read for dgamma only
    gamma_ptr,  # (D,) or None
    row_scale_ptr,  # (B,) float32 or None
    weight_ptr,  # (D,) or None
    mean_ptr,  # (M,) float32
    rstd_ptr,  # (M,) float32
    dx_ptr,  # (M, D)
    dresidual_ptr,  # (M, D), or None without a branch
    partials_ptr,  # (programs, 3 or 2, D) float32: dweight, dbias and, with gamma, dgamma; or None
    M,
    D,
    rows_per_image,
    stride_dy,
    stride_dstream,
    stride_normalised,
    stride_branch,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    column_mask = columns < D
    if partials_ptr is not None:
        dweight = tl.zeros((ROWS, BLOCK), tl.float32)
        dbias = tl.zeros((ROWS, BLOCK), tl.float32)
        dgamma = tl.zeros((ROWS, BLOCK), tl.float32)

    for tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows < M
        mask = row_mask[:, None] & column_mask[None, :]
        at = rows[:, None] * D + columns[None, :]
        x = tl.load(normalised_ptr + rows[:, None] * stride_normalised + columns[None, :], mask, other=0.0)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dy + columns[None, :], mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, row_mask, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, row_mask, other=0.0)[:, None]
        xhat = (x.to(tl.float32) - mean) * rstd  # past the edge it only meets dy = 0
        if partials_ptr is not None:
            dweight += dy * xhat
            dbias += dy

        if weight_ptr is not None:
            dy *= tl.load(weight_ptr + columns, column_mask, other=0.0).to(tl.float32)[None, :]
        along_one = tl.sum(dy, 1) / D
        along_xhat = tl.sum(dy * xhat, 1) / D
        total = (dy - along_one[:, None] - xhat * along_xhat[:, None]) * rstd
        if dstream_ptr is not None:
            dstream = tl.load(dstream_ptr + rows[:, None] * stride_dstream + columns[None, :], mask, other=0.0)
            total += dstream.to(tl.float32)

        if dresidual_ptr is not None:
            store(dresidual_ptr + at, total, mask)
            if row_scale_ptr is not None:
                total *= _scales(row_scale_ptr, rows, row_mask, rows_per_image)
            if gamma_ptr is not None:
                if partials_ptr is not None:
                    branch = tl.load(branch_ptr + rows[:, None] * stride_branch + columns[None, :], mask, other=0.0)
                    dgamma += total * branch.to(tl.float32)
                total *= tl.load(gamma_ptr + columns, column_mask, other=0.0).to(tl.float32)[None, :]
        store(dx_ptr + at, total, mask)

    if partials_ptr is not None:
        sums = 2 if gamma_ptr is None else 3
        partial = partials_ptr + tl.program_id(0).to(tl.int64) * sums * D + columns
        tl.store(partial, tl.sum(dweight, 0), column_mask)
        tl.store(partial + D, tl.sum(dbias, 0), column_mask)
        if gamma_ptr is not None:
            tl.store(partial + 2 * D, tl.sum(dgamma, 0), column_mask)


def _shape(width: int, values_per_lane: int) -> tuple[int, int, int]:
    """Return (rows, block, warps) of a program: whole rows, ``values_per_lane`` values in each lane, at least 4 warps.

    The warps lie along D, so the rows of a program share one load of the weights and one barrier. At
    most 32 rows: the addresses of more would take the registers (this leaves lanes idle below D = 64).
    """
    block = triton.next_power_of_2(width)
    warps = max(block // (32 * values_per_lane), 4)
    return min(max(32 * values_per_lane * warps // block, 1), 32), block, warps


def _readable(x: Tensor | None) -> Tensor | None:
    return None if x is None else rows_contiguous(x)


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


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
    """Compute y = (s - mean) * rstd * weight + bias with s = x, or s = residual + row_scale * gamma * x.

    x, residual (M, D), D <= 8192, row strides free (any other layout is copied once); weight, bias,
    gamma (D,); row_scale (B,) float32 where row m takes row_scale[m // (M // B)]. All floating, dtypes
    may differ. Ba et al. 2016, equations 3 and 4; LayerScale: Touvron et al. 2021, equation 7.

    Returns y (M, D) in ``out_dtype`` (default: that of s), s in the residual's dtype or None without
    a residual, and s's mean and rstd (M,) float32, taken of s as rounded to its dtype.
    """
    rows, width = x.shape
    if width > MAX_WIDTH:
        raise ValueError(f"layer_norm: the Triton kernels hold a row in registers, so D <= {MAX_WIDTH}; got {width}")
    x, residual, gamma, row_scale, weight, bias = map(_readable, (x, residual, gamma, row_scale, weight, bias))
    stream = None if residual is None else torch.empty((rows, width), dtype=residual.dtype, device=x.device)
    y = torch.empty((rows, width), dtype=out_dtype or (x if stream is None else stream).dtype, device=x.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    tile_rows, block, warps = _shape(width, values_per_lane=32)
    args = {
        "x_ptr": x,
        "residual_ptr": residual,
        "gamma_ptr": gamma,
        "row_scale_ptr": row_scale,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "y_ptr": y,
        "stream_ptr": stream,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "M": rows,
        "D": width,
        "rows_per_image": rows_per_image(rows, row_scale),
        "stride_x": _row_stride(x),
        "stride_residual": _row_stride(residual),
        "eps": float(eps),
        "ROWS": tile_rows,
        "BLOCK": block,
    }
    launch(layer_norm_forward_kernel, (triton.cdiv(rows, tile_rows),), args, num_warps=warps)
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
    """Return the gradients of :func:`layer_norm_forward`, (dx, dresidual, dweight, dbias, dgamma).

    normalised (M, D) is the norm's input (x, or the stream); dstream (M, D) is any further gradient
    that arrives there; branch (M, D) is the x that was merged into the stream. With
    xhat = (normalised - mean) * rstd and g = dy * weight,

        total = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dstream

    Without a branch dx = total and dresidual is None; with one dresidual = total in normalised's
    dtype and dx = row_scale * gamma * total in the branch's. dweight = sum dy * xhat, dbias = sum dy
    and dgamma = sum row_scale * branch * total are (D,) float32, bit-equal from run to run; dgamma is
    None without a gamma, and all three are with ``need_params=False``.
    """
    rows, width = normalised.shape
    dy, dstream, normalised, branch = map(_readable, (dy, dstream, normalised, branch))
    weight, gamma, row_scale = map(_readable, (weight, gamma, row_scale))
    dx = torch.empty((rows, width), dtype=(normalised if branch is None else branch).dtype, device=dy.device)
    dresidual = None if branch is None else torch.empty_like(dx, dtype=normalised.dtype)
    tile_rows, block, warps = _shape(width, values_per_lane=16)
    programs = min(triton.cdiv(rows, tile_rows), _PROGRAMS_PER_SM * multiprocessors(dy))
    sums = 2 if gamma is None else 3
    partials = torch.empty((programs, sums, width), dtype=torch.float32, device=dy.device) if need_params else None
    args = {
        "dy_ptr": dy,
        "dstream_ptr": dstream,
        "normalised_ptr": normalised,
        "branch_ptr": branch,
        "gamma_ptr": gamma,
        "row_scale_ptr": row_scale,
        "weight_ptr": weight,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "dx_ptr": dx,
        "dresidual_ptr": dresidual,
        "partials_ptr": partials,
        "M": rows,
        "D": width,
        "rows_per_image": rows_per_image(rows, row_scale),
        "stride_dy": _row_stride(dy),
        "stride_dstream": _row_stride(dstream),
        "stride_normalised": _row_stride(normalised),
        "stride_branch": _row_stride(branch),
        "ROWS": tile_rows,
        "BLOCK": block,
    }
    # Five float32 values a column stay in registers; at 8192 columns a few bytes of them spill.
    launch(layer_norm_backward_kernel, (programs,), args, num_warps=warps, hot=block <= 4096)
    if partials is None:
        return dx, dresidual, None, None, None
    dweight, dbias, *dgamma = sum_groups(partials)
    return dx, dresidual, dweight, dbias, dgamma[0] if dgamma else None
