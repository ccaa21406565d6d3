"""Gradients of ``linear_forward``: to its input (the forward's own GEMM, W read the other way) and its parameters.

With y = x W^T + b and out = row_scale * gamma * y (plus the residual, whose gradient is dout itself):

    dx     = (row_scale * gamma * dout) @ W
    G      = (row_scale * dout)^T @ x                    (N, K), summed over the M rows in float32
    dW     = gamma * G
    dbias  = gamma * colsum(row_scale * dout)
    dgamma = rowsum(W * G) + bias * colsum(row_scale * dout)

so nothing has to be kept for gamma: y itself never appears. G has few tiles and a long sum, so the rows are
split over programs when that fills the device better; the partial sums go through memory and are added in
one order, always the same (no atomics). The column sums ride in the same kernel, as one more product with ones.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit import activations
from fastvit.triton import tiles
from fastvit.triton.activations import activation_gradient, row_blocks
from fastvit.triton.launch import (
    architecture,
    dot,
    launch,
    multiprocessors,
    precision,
    rows_contiguous,
    rows_per_image,
    store,
)
from fastvit.triton.linear import choose, forms, matmul, tile_origin

_MAX_SPLITS = 16


@triton.jit(do_not_specialize=["rows_per_image"])
def linear_scale_rows_kernel(
    x_ptr,  # (M, N), rows contiguous
    row_scale_ptr,  # (B,) float32 or None: row m is scaled by entry m // rows_per_image
    out_ptr,  # (M, N)
    N,
    stride_x,
    rows_per_image,
    BLOCK: tl.constexpr,
):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + cols, mask=cols < N).to(tl.float32)
    if row_scale_ptr is not None:
        x *= tl.load(row_scale_ptr + row // rows_per_image)
    store(out_ptr + row * N + cols, x, cols < N)


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def linear_weight_gradient_kernel(
    dout_ptr,  # (M, N), rows contiguous
    x_ptr,  # (M, K), rows contiguous
    out_ptr,  # (splits, N, K): G of each split
    sums_ptr,  # (splits, N) float32 or None: the column sums of dout
    M,
    N,
    K,
    stride_dout,
    stride_x,
    rows_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows summed in one step
    PRECISION: tl.constexpr,
):
    n, k = tile_origin(tl.program_id(0), N, K, BLOCK_N, BLOCK_K)
    split = tl.program_id(1)
    start = split * rows_per_split
    stop = tl.minimum(start + rows_per_split, M)
    ms, ns, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_n, in_k = n + ns < N, k + ks < K
    dout_ptr += start.to(tl.int64) * stride_dout + n  # 64 bits lead to a tile, 32 lead through it
    x_ptr += start.to(tl.int64) * stride_x + k
    dout_offsets = ms[:, None] * stride_dout + ns[None, :]
    x_offsets = ms[:, None] * stride_x + ks[None, :]
    ones = tl.full((BLOCK_M, 16), 1, tl.float32).to(x_ptr.dtype.element_ty)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sums = tl.zeros((BLOCK_N, 16), tl.float32)
    for m in range(start, stop, BLOCK_M):
        in_m = m + ms < stop
        dout = tl.load(dout_ptr + dout_offsets, mask=in_m[:, None] & in_n[None, :], other=0).T
        x = tl.load(x_ptr + x_offsets, mask=in_m[:, None] & in_k[None, :], other=0)
        acc = dot(dout, x, acc, PRECISION)
        if sums_ptr is not None and k == 0:  # every program of a row of tiles would find the same sums
            sums = dot(dout, ones, sums, PRECISION)
        dout_ptr += BLOCK_M * stride_dout
        x_ptr += BLOCK_M * stride_x
    corner = (split * N + n).to(tl.int64) * K + k
    offsets = corner + (ns[:, None] * K + ks[None, :])
    store(out_ptr + offsets, acc, in_n[:, None] & in_k[None, :])
    if sums_ptr is not None and k == 0:
        tl.store(sums_ptr + split * N + n + ns, tl.max(sums, 1), mask=in_n)


@triton.jit(do_not_specialize=["splits"])
def linear_weight_reduction_kernel(
    partial_ptr,  # (splits, N, K) float32
    partial_sums_ptr,  # (splits, N) float32 or None
    weight_ptr,  # (N, K), rows contiguous, or None: read for dgamma only
    bias_ptr,  # (N,) or None: read for dgamma only
    gamma_ptr,  # (N,) or None
    dweight_ptr,  # (N, K)
    dbias_ptr,  # (N,) float32 or None
    dgamma_ptr,  # (N,) float32 or None
    N,
    K,
    splits,
    stride_weight,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ns, ks = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_n, rows = ns < N, ns.to(tl.int64)[:, None]
    scale = tl.full((BLOCK_N,), 1, tl.float32)
    if gamma_ptr is not None:
        scale = tl.load(gamma_ptr + ns, mask=in_n).to(tl.float32)
    dgamma = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask = in_n[:, None] & (k + ks < K)[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for split in range(splits):
            total += tl.load(partial_ptr + (split * N + rows) * K + (k + ks)[None, :], mask=mask, other=0)
        if dgamma_ptr is not None:
            weight = tl.load(weight_ptr + rows * stride_weight + (k + ks)[None, :], mask=mask, other=0)
            dgamma += tl.sum(total * weight.to(tl.float32), 1)
        store(dweight_ptr + rows * K + (k + ks)[None, :], total * scale[:, None], mask)
    if partial_sums_ptr is not None:
        column_sum = tl.zeros((BLOCK_N,), tl.float32)
        for split in range(splits):
            column_sum += tl.load(partial_sums_ptr + split * N + ns, mask=in_n, other=0)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + ns, column_sum * scale, mask=in_n)
        if dgamma_ptr is not None and bias_ptr is not None:
            dgamma += column_sum * tl.load(bias_ptr + ns, mask=in_n, other=0).to(tl.float32)
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + ns, dgamma, mask=in_n)


def scale_rows(x: Tensor, dtype: torch.dtype, row_scale: Tensor | None = None) -> Tensor:
    """Return row_scale * x (M, N) in ``dtype``; x itself if that changes nothing. Row m takes entry m // (M // B).

    Both gradients of a linear can share the result (then without a row_scale of theirs): the tiles then go
    from memory to the tensor cores with no detour through registers.
    """
    x = rows_contiguous(x)
    if x.dtype == dtype and row_scale is None:
        return x
    out = x.new_empty(x.shape, dtype=dtype)
    block, columns = row_blocks(x.shape[1])
    args = {
        "x_ptr": x,
        "row_scale_ptr": row_scale,
        "out_ptr": out,
        "N": x.shape[1],
        "stride_x": x.stride(0),
        "rows_per_image": rows_per_image(x.shape[0], row_scale),
        "BLOCK": block,
    }
    launch(linear_scale_rows_kernel, (x.shape[0], columns), args)
    return out


def linear_input_gradient(
    dout: Tensor,
    weight: Tensor,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    preact: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    tile: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute (row_scale * gamma * dout) @ W and go back through the activation before the linear, in one GEMM.

    Args:
        dout: (M, N), float32, float16 or bfloat16; rounded to ``weight``'s dtype for the product, after gamma.
        weight: (N, K), float32, float16 or bfloat16.
        gamma: (N,), float32 or ``weight``'s dtype.
        row_scale: (B,) float32; row m takes entry m // (M // B).
        preact: (M, K), or (M, 2K) for a gated one; the activation's input. It goes with ``activation``.
        activation: a name in :mod:`fastvit.activations`; a gated one takes one more launch.
        out_dtype: the gradient's dtype, ``weight``'s by default; with a gated activation it is ``preact``'s.
        tile: in place of the table's, as for ``linear_forward``.

    Returns:
        dx, with the shape (M, K), or (M, 2K) with a gated activation; and act(preact) (M, K) in ``preact``'s
        dtype, or None.

    Raises:
        ValueError: unknown activation, preact without activation or the reverse, or B does not divide M.
    """
    if (preact is None) != (activation is None):
        raise ValueError("preact and activation go together")
    activations.check(activation, gated=True)
    dout, weight = rows_contiguous(dout), rows_contiguous(weight)
    fused = activation in activations.ACTIVATIONS
    dx = weight.new_empty(dout.shape[0], weight.shape[1], dtype=out_dtype)
    hidden = torch.empty_like(dx, dtype=preact.dtype) if fused and preact is not None else None
    matmul(
        dout, weight, dx, backward=True, a_scale=gamma, row_scale=row_scale, hidden=hidden, tile=tile,
        preact=preact.contiguous() if fused and preact is not None else None,
        activation=activation if fused else None,
    )  # fmt: skip
    if activation in activations.GATED and preact is not None:
        return activation_gradient(dx, preact, activation)
    return dx, hidden


def _splits(m: int, blocks: int, tile: dict[str, Any], programs: int) -> int:
    """Return the number of parts of the M rows with the least predicted time.

    A part costs its rows, in whole waves of ``programs``; every split costs a write and a read of float32 G,
    for which a GPU of this generation could have done about 180 operations a byte.
    """
    area = tile["block_m"] * tile["block_n"]

    def cost(splits: int) -> float:
        waves = triton.cdiv(blocks * splits, programs)
        product = waves * triton.cdiv(m, splits) * 2 * area
        traffic = 0 if splits == 1 else splits * blocks * area * 8 * 180 / programs
        return product + traffic

    return min(range(1, max(1, min(_MAX_SPLITS, m // (4 * tile["block_k"]))) + 1), key=cost)


def linear_weight_gradient(
    dout: Tensor,
    x: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    need_bias: bool = True,
    tile: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of weight, bias and LayerScale: the equations at the top of this file, deterministic.

    Args:
        dout: (M, N), float32, float16 or bfloat16; ``scale_rows`` first, where that changes it.
        x: (M, K), float32, float16 or bfloat16.
        weight: (N, K), needed with gamma.
        bias: (N,), the forward's, if it had one; needed with gamma only.
        gamma: (N,), float32 or x's dtype.
        row_scale: (B,) float32; row m takes entry m // (M // B).
        need_bias: whether to compute dbias.
        tile: in place of the table's, as for ``linear_forward``, and ``splits``; m, n and k are those of the
            product (N, M) @ (M, K).

    Returns:
        dweight (N, K) in x's dtype, dbias (N,) float32 or None, dgamma (N,) float32 or None.

    Raises:
        ValueError: gamma without weight, or B does not divide M.
    """
    if gamma is None:
        weight = bias = None  # gamma's gradient alone reads them
    elif weight is None:
        raise ValueError("the gradient of gamma needs the weight")
    else:
        weight = rows_contiguous(weight)
    dout, x = scale_rows(dout, x.dtype, row_scale), rows_contiguous(x)
    (m, n), k = dout.shape, x.shape[1]
    suited = forms(n, k, dout.stride(0), x.stride(0))
    tile = tile or tiles.choose(
        "linear", x, x.dtype, m, lambda: choose("weight", architecture(x), x.dtype, n, k, m, suited),
        op="weight", allows=suited[0], activation=None, scaled=False, residual=False, n=n, k=k,
    )  # fmt: skip
    blocks = triton.cdiv(n, tile["block_m"]) * triton.cdiv(k, tile["block_n"])
    splits = tile.get("splits") or _splits(m, blocks, tile, multiprocessors(x))
    rows = triton.cdiv(triton.cdiv(m, splits), tile["block_k"]) * tile["block_k"]
    reduce = splits > 1 or gamma is not None
    need_sums = need_bias or bias is not None

    dweight = x.new_empty(n, k)
    dbias = x.new_empty(n, dtype=torch.float32) if need_bias else None
    dgamma = x.new_empty(n, dtype=torch.float32) if gamma is not None else None
    partial = x.new_empty(splits, n, k, dtype=torch.float32) if reduce else dweight
    sums = x.new_empty(splits, n, dtype=torch.float32) if reduce and need_sums else dbias
    args = {
        "dout_ptr": dout,
        "x_ptr": x,
        "out_ptr": partial,
        "sums_ptr": sums,
        "M": m,
        "N": n,
        "K": k,
        "stride_dout": dout.stride(0),
        "stride_x": x.stride(0),
        "rows_per_split": rows,
        "BLOCK_N": tile["block_m"],
        "BLOCK_K": tile["block_n"],
        "BLOCK_M": tile["block_k"],
        "PRECISION": precision(x.dtype),
    }
    launch(linear_weight_gradient_kernel, (blocks, splits), args, tile=tile, hot=x.element_size() == 2)
    if reduce:
        block_k = min(triton.next_power_of_2(max(k, 1)), 512)
        block_n = 2048 // block_k  # 16 values a lane
        args = {
            "partial_ptr": partial,
            "partial_sums_ptr": sums,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "gamma_ptr": gamma,
            "dweight_ptr": dweight,
            "dbias_ptr": dbias,
            "dgamma_ptr": dgamma,
            "N": n,
            "K": k,
            "splits": splits,
            "stride_weight": 0 if weight is None else weight.stride(0),
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        }
        launch(linear_weight_reduction_kernel, (triton.cdiv(n, block_n),), args)
    return dweight, dbias, dgamma
