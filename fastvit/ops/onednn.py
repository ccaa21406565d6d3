"""Fused linears on CPUs: oneDNN's kernels on weights packed once into its own layout. Inference only.

Bias, GELU and the residual add run in the matrix product's own epilogue. The packed copies live beside the
parameters, never in a state_dict, and are made again whenever a weight has changed in any way.

A CPU without bfloat16 instructions multiplies bfloat16 in software, several times slower than float32: there the
packed copy of a bfloat16 weight is in float32, and so are the product and its epilogue, rounded once at the end. Under
torch.compile, which packs and fuses by itself, that is all that is done here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastvit import reference
from fastvit.activations import ACTIVATIONS
from fastvit.ops.tracing import exporting
from fastvit.reference import Norm

AVAILABLE = torch.backends.mkldnn.is_available()
BFLOAT16_INSTRUCTIONS = AVAILABLE and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # of this CPU

_SMALLEST = 1 << 23  # multiply-adds; below, the packed product's own overhead (tens of us) is more than it saves
# Outputs, rows: below both, AMX's packed product can leave a core idle, and plain weights are 1.4x as fast. Without AMX
# packed ones are the faster ones everywhere.
_NARROW = (1024, 1280)
_AMX = torch.cpu._is_amx_tile_supported()


def refuse(op: str, x: Tensor, *, weights: Iterable[Tensor] = (), needs_grad: bool = False) -> str | None:
    """Return why oneDNN can't run an op on ``x``, or None."""
    if torch.compiler.is_compiling() and (exporting() or x.dtype != torch.bfloat16 or BFLOAT16_INSTRUCTIONS):
        return "it is for eager mode; torch.compile fuses the reference itself"
    if not AVAILABLE:
        return "this build of PyTorch has no oneDNN"
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}; onednn takes CPU tensors"
    if needs_grad:
        return "a gradient is needed; onednn is for inference (torch.no_grad)"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on; onednn takes weights as they are"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {x.dtype} is not supported; accepted: float32, bfloat16"
    return None


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of products with weights of ``dtype`` on this CPU."""
    return torch.float32 if dtype == torch.bfloat16 and not BFLOAT16_INSTRUCTIONS else dtype


class _Packed(NamedTuple):
    stamp: tuple[int, int, int]
    weight: Tensor


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter (N, K) -> _Packed, gone with the parameter


# Words of 8 bytes taken together. Odd, so that a sign changed throughout shows (the halves of 2^64 would cancel in
# pairs); prime, so that rows don't line up; and so few that rows of 192 bfloat16 values hold a whole one.
_STRETCH = 23


@cache
def _multipliers(count: int) -> Tensor:
    """Return odd numbers without a pattern, (count,) int64: the factor of each stretch."""
    return torch.randint(-(1 << 62), 1 << 62, (count,), generator=torch.Generator().manual_seed(0), device="cpu") | 1


def _stamp(weight: Tensor) -> tuple[int, int, int]:
    """Return a value that changes whenever the weight does, through ``.data`` too, which its version misses.

    The bits of each stretch are summed as integers, in which any one change shows, and each sum counts by its place, so
    that rows or columns moved about are seen as well. One pass over the weight, at the speed of memory.
    """
    flat = weight.detach().view(-1)
    size = flat.element_size()
    aligned = (flat.numel() * size) % 8 == 0 == (flat.storage_offset() * size) % 8
    words = flat.view(torch.int64 if aligned else torch.int16)
    stretches = words.numel() // _STRETCH
    whole = stretches * _STRETCH
    sums = words[:whole].view(stretches, _STRETCH).sum(1)
    total = (sums * _multipliers(stretches)).sum() + words[whole:].sum()
    return weight.data_ptr(), weight._version, int(total)


def _pack(weight: Tensor, rows: int) -> Tensor | None:
    """Return a parameter packed for products of ``rows`` rows, or itself where plain is faster.

    None where only the reference makes sense (a view, a temporary).
    """
    if type(weight) is not nn.Parameter or not weight.is_contiguous() or weight.is_inference():
        return None
    narrow = weight.shape[0] < _NARROW[0] and rows < _NARROW[1]
    if _AMX and narrow and weight.dtype == torch.bfloat16:
        return weight.detach()
    stamp = _stamp(weight)
    known = _packed.get(weight)
    if known is None or known.stamp != stamp:
        values = weight.detach().to(product_dtype(weight.dtype))
        known = _Packed(stamp, torch.ops.mkldnn._reorder_linear_weight(values))
        _packed[weight] = known
    return known.weight


def drop(parameters: Iterable[Tensor]) -> None:
    """Forget the packed copies of these parameters (a model in training needs none)."""
    for parameter in parameters:
        _packed.pop(parameter, None)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`fastvit.ops.linear`. ``out_dtype``, of a result without a residual: the weight's, or its product's."""
    wide = product_dtype(weight.dtype)
    worth = wide != weight.dtype or x.numel() * weight.shape[0] >= _SMALLEST
    compiling = torch.compiler.is_compiling()
    packed = _pack(weight, x.numel() // weight.shape[1]) if worth and not compiling else None
    if packed is None and wide == weight.dtype:
        return reference.linear(
            x, weight, bias, norm=norm, activation=activation, residual=residual, gamma=gamma, row_scale=row_scale
        )
    if norm is not None:
        x = reference.normalise(x, *norm, weight.dtype)
    x, bias = x.to(wide), None if bias is None else bias.to(wide)
    plain_add = residual is not None and gamma is None and row_scale is None and residual.dtype == weight.dtype
    if packed is None:
        y = reference.activate(F.linear(x, weight.to(wide), bias), activation)
    elif residual is not None and plain_add and activation is None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual.to(wide), packed, bias, "add").to(weight.dtype)
    else:
        epilogue = ACTIVATIONS[activation].onednn if activation in ACTIVATIONS else None
        name, algorithm = epilogue or ("none", "")
        y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)
        if epilogue is None:
            y = reference.activate(y, activation)
    return y.to(out_dtype or weight.dtype) if residual is None else reference.merge(y, residual, gamma, row_scale)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    norm: Norm | None = None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """See :func:`fastvit.ops.mlp`."""
    wide = product_dtype(fc1_weight.dtype)
    hidden = linear(x, fc1_weight, fc1_bias, norm=norm, activation=activation, out_dtype=wide)
    return linear(hidden, fc2_weight, fc2_bias, residual=residual, gamma=gamma, row_scale=row_scale)
