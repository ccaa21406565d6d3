"""Linear layers on the CUDA kernels (``csrc/sm80/linear_sm80.cu``, ``csrc/sm90/linear_sm90.cu``), float16 and bfloat16.

The measured tables (:mod:`fastvit.triton.tiles`, family "cuda") choose the implementation of a product: the kernel, as
where nothing was measured, or cuBLASLt (:mod:`fastvit.cuda.cublas`). cuBLASLt computes products in float32, which
``fastvit tune`` alone compares with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit import activations
from fastvit.cuda import cublas, extension
from fastvit.cuda.elementwise import activation_gradient, gated_forward, scale_rows, sum_partials
from fastvit.cuda.extension import aligned, check_scale, unit_rows
from fastvit.cuda.layer_norm import layer_norm_forward
from fastvit.triton import MISSING

KERNEL = {"run": "kernel"}


def _run(
    tile: dict[str, Any] | None,
    op: str,
    on: Tensor,
    size: int,
    n: int,
    k: int,
    *,
    activation: str | None = None,
    scaled: bool = False,
    residual: Tensor | None = None,
    saves: bool = False,
) -> str:
    """Return the implementation of a product: "kernel", "library" or, for ``op`` "normed", "folded".

    Args:
        tile: in place of the table's row: {"run": one of these}.
        op: "forward", "input" or "weight", as the tables for Triton have them, or "normed".
        on: an operand of the product.
        size, n, k: the rows, and the widths of the result and of the sum; of the weight's gradient N and K.
        activation, scaled, residual: of the epilogue; ``scaled`` by gamma or row_scale.
        saves: whether the forward saves its pre-activation, or the weight's gradient the bias's sums.
    """
    if tile is not None or MISSING:  # without Triton nothing was measured: fastvit tune needs it
        return (tile or KERNEL)["run"]
    from fastvit.triton import tiles

    wide = None if residual is None else tiles.kind(residual.dtype)
    tile = tiles.choose(
        "cuda", on, on.dtype, size, lambda: KERNEL,
        op=op, activation=activation, scaled=scaled, residual=wide, saves=saves, n=n, k=k,
    )  # fmt: skip
    run: str = tile["run"]
    return run


def _by_library(tile: dict[str, Any] | None, op: str, on: Tensor, size: int, n: int, k: int, **key: Any) -> bool:
    return on.dtype == torch.float32 or _run(tile, op, on, size, n, k, **key) == "library"


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    save_preact: bool = False,
    tile: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return (out, preact or None) as :func:`fastvit.triton.linear.linear_forward`; sizes K and N are multiples of 8.

    ``tile``, here and below, is {"run": "kernel"} or {"run": "library"} in place of the table's.
    """
    activations.check(activation, gated=True)
    gated = activation in activations.GATED
    if gated and (residual is not None or gamma is not None or row_scale is not None):
        raise ValueError(f"{activation} takes no residual, gamma or row_scale")
    (m, k), n = x.shape, weight.shape[0]
    check_scale(m, row_scale)
    scaled, fused = gamma is not None or row_scale is not None, None if gated else activation
    key = {"activation": activation, "scaled": scaled, "residual": residual, "saves": save_preact}
    if _by_library(tile, "forward", x, m, n, k, **key):
        out, preact = cublas.linear_forward(
            x, weight, bias, activation=fused, residual=residual, gamma=gamma, row_scale=row_scale,
            save_preact=save_preact and not gated,
        )  # fmt: skip
    else:
        x, weight, residual = aligned(x), aligned(weight.contiguous()), aligned(residual)
        bias, gamma, row_scale = map(unit_rows, (bias, gamma, row_scale))
        out = torch.empty(m, n, dtype=(x if residual is None else residual).dtype, device=x.device)
        preact = torch.empty(m, n, dtype=x.dtype, device=x.device) if save_preact and not gated else None
        extension.library.linear_forward(x, x, weight, bias, fused or "", residual, gamma, row_scale, out, preact)
    if activation is not None and gated:
        return gated_forward(out, activation), out if save_preact else None
    return out, preact


def fold_norm(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply a LayerNorm's weight g and bias b into the weight W (N, K) after it.

    Returns:
        g * W (N, K), rounded once; (N,) float32, the sums of its rows as rounded; (N,) float32, W b + bias.
    """
    weight = aligned(weight.contiguous())
    norm_weight, norm_bias = aligned(norm_weight), aligned(norm_bias)
    folded = torch.empty_like(weight)
    sums, offsets = (torch.empty(len(weight), dtype=torch.float32, device=weight.device) for _ in range(2))
    extension.library.fold_norm(weight, weight, unit_rows(bias), norm_weight, norm_bias, folded, sums, offsets)
    return folded, sums, offsets


def linear_folded_forward(
    x: Tensor,
    norm: tuple[Tensor | None, Tensor | None, float],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, mean, rstd) of act(LN(x) W^T + b) by a product with x itself: LN(x) is never written.

    LN(x) W^T + b = rstd * (x (g W)^T - mean * sums) + offsets, by :func:`fold_norm`. The statistics are those that
    :func:`layer_norm_forward` computes. The difference is taken of float32 sums, so it loses what mean / deviation of a
    row is more than 1 (docs/explanation/cuda.md says where that matters).

    Args:
        x: (M, K) float16 or bfloat16, the weight's dtype. norm: (weight (K,), bias (K,), eps) of the LayerNorm.
        weight, bias, activation: of the linear layer, as for :func:`linear_forward`.
    """
    m, n = x.shape[0], weight.shape[0]
    norm_weight, norm_bias, eps = norm
    x, (folded, sums, offsets) = aligned(x), fold_norm(weight, bias, norm_weight, norm_bias)
    mean, rstd = (torch.empty(m, dtype=torch.float32, device=x.device) for _ in range(2))
    extension.library.layer_norm_forward(x, x, None, None, eps, None, None, None, None, None, mean, rstd)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    gated = activation in activations.GATED
    fused = "" if activation is None or gated else activation
    extension.library.linear_folded_forward(x, x, folded, sums, offsets, mean, rstd, fused, out)
    return gated_forward(out, activation) if activation is not None and gated else out, mean, rstd


def linear_normed_forward(
    x: Tensor,
    norm: tuple[Tensor | None, Tensor | None, float],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    tile: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, mean, rstd) of act(LN(x) W^T + b), for inference: by two kernels, or folded into one by its table.

    Arguments are :func:`linear_folded_forward`'s, but x may have any dtype; in another one than the weight's, as the
    float32 stream of autocast, it is never folded: that would round x before its mean is taken off. ``tile`` is
    {"run": "kernel"} or {"run": "folded"} in place of the table's.
    """
    (m, k), n = x.shape, weight.shape[0]
    if x.dtype == weight.dtype != torch.float32 and _run(tile, "normed", x, m, n, k, activation=activation) == "folded":
        return linear_folded_forward(x, norm, weight, bias, activation=activation)
    rows, _, mean, rstd = layer_norm_forward(x, *norm, out_dtype=weight.dtype)
    out, _ = linear_forward(rows, weight, bias, activation=activation)
    return out, mean, rstd


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
    """Return (dx, hidden or None) as :func:`fastvit.triton.linear_backward.linear_input_gradient`."""
    if (preact is None) != (activation is None):
        raise ValueError("preact and activation go together")
    activations.check(activation, gated=True)
    dout, (n, k) = scale_rows(dout, weight.dtype, row_scale), weight.shape
    if _by_library(tile, "input", dout, dout.shape[0], k, n, activation=activation, scaled=gamma is not None):
        dx = cublas.linear_input_gradient(dout, weight, gamma, out_dtype or weight.dtype)
        return (dx, None) if preact is None or activation is None else activation_gradient(dx, preact, activation)
    dout, weight = aligned(dout), aligned(weight.contiguous())
    fused = activation in activations.ACTIVATIONS
    dx = torch.empty(dout.shape[0], k, dtype=out_dtype or weight.dtype, device=dout.device)
    hidden = torch.empty_like(dx, dtype=preact.dtype) if fused and preact is not None else None
    inside = aligned(preact.contiguous()) if fused and preact is not None else None
    extension.library.linear_input_gradient(
        dout, dout, weight, unit_rows(gamma), inside, activation if fused else "", dx, hidden
    )
    if activation in activations.GATED and preact is not None:
        return activation_gradient(dx, preact, activation)
    return dx, hidden


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
    """Return (dweight, dbias, dgamma) as :func:`fastvit.triton.linear_backward.linear_weight_gradient`."""
    if gamma is not None and weight is None:
        raise ValueError("the gradient of gamma needs the weight")
    dout = scale_rows(dout, x.dtype, row_scale)
    (m, n), k = dout.shape, x.shape[1]
    need_sums = need_bias or (gamma is not None and bias is not None)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    if _by_library(tile, "weight", x, m, n, k, scaled=gamma is not None, saves=need_sums):
        sums = dout.sum(0, dtype=torch.float32) if need_sums else None
        gradient = cublas.linear_weight_gradient(dout, x, x.dtype if gamma is None else torch.float32)
        if gamma is None:
            return gradient, sums, None
    else:
        dout, x = aligned(dout), aligned(x)
        splits = extension.library.linear_weight_gradient_splits(x, m, n, k)
        partials = empty(splits, n, k)
        bias_partials = empty(splits, n) if need_sums else None
        extension.library.linear_weight_gradient(x, dout, x, partials, bias_partials)
        gradient = partials[0] if splits == 1 else sum_partials(partials)
        sums = None if bias_partials is None else sum_partials(bias_partials)
    dweight = empty(n, k, dtype=x.dtype)
    dgamma = None if gamma is None else empty(n)
    if gamma is None:
        weight = bias = None  # gamma's gradient alone reads them
    else:
        weight = weight.contiguous() if weight is not None else None
    extension.library.finish_weight_gradient(
        x, gradient, sums, weight, unit_rows(bias), unit_rows(gamma), dweight, dgamma
    )
    return dweight, sums if need_bias else None, dgamma
