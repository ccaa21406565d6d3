"""The launchers of the CUDA kernels (``csrc/``): names and arguments of the Triton ones, on the compiled extension.

The extension (``fastvit/_C.abi3.so``) is loaded here. Where it is absent, or was built for another PyTorch,
:data:`MISSING` says so and nothing else happens. The tests load the same sources compiled for the CPU with
:func:`emulate`.

Products take float16 and bfloat16; LayerNorm and what is elementwise take float32 too. Arguments are as the Triton
launchers' unless a docstring says otherwise; layouts that a kernel does not read are copied once.

The linear launchers ask the measured tables (:mod:`fastvit.triton.tiles`, family "cuda") who runs a product: the
kernel, as where nothing was measured, or cuBLASLt (:mod:`fastvit.ops.cublas`). Products in float32, which the judge of
``fastvit tune`` alone asks for, are the library's.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastvit.ops import cublas
from fastvit.packing import Layout

try:
    from fastvit.triton import tiles
except ImportError:  # without Triton nothing was measured either: fastvit tune needs it
    tiles = None

_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)
_PACKAGE = Path(__file__).parent.parent
_library: Any = None  # torch.ops.fastvit_cuda, or fastvit_emulated in the tests
EMULATED = False

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
# Of ops.attention's arguments, those that the kernels take.
ATTENTION_MODIFIERS = ("bias", "rel_pos_table", "key_mask", "cu_seqlens", "dropout_p")
KERNEL = {"run": "kernel"}
MAX_WIDTH = 8192  # of a row that LayerNorm normalises


def _load() -> str | None:
    """Load the extension; the reason where that can't be done."""
    global _library
    found = sorted(_PACKAGE.glob("_C*.so"))
    if not found:
        return "the CUDA extension is not built; FASTVIT_BUILD_CUDA=1 pip install --no-build-isolation . builds it"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = str(error).splitlines()[0]
        return f"the CUDA extension does not match torch {torch.__version__}; install fastvit again ({reason})"
    _library = torch.ops.fastvit_cuda
    return None


MISSING = _load()


def emulate(library: str | Path) -> None:
    """Launch on CPU tensors from now on, in this process, by a library that ``csrc/testing`` built.

    :func:`fastvit.ops.library.implement_on_cpu` lets the ops take such tensors too.
    """
    global _library, EMULATED, MISSING
    torch.ops.load_library(str(library))
    _library, EMULATED, MISSING = torch.ops.fastvit_emulated, True, None


class _Nothing:
    """Stands for the extension: its launchers do nothing, and those that count say 1."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 1


@contextmanager
def rehearse() -> Iterator[None]:
    """Launch nothing inside: launchers take meta tensors, and ask the tables what they would ask."""
    global _library, MISSING
    before, _library, MISSING = (_library, MISSING), _Nothing(), None
    try:
        yield
    finally:
        _library, MISSING = before


@cache
def built_for(capability: tuple[int, int]) -> bool:
    """Whether the extension has code, or PTX, for GPUs of this compute capability."""
    for name in importlib.import_module("fastvit._C").ARCHITECTURES.split():
        major, minor = map(int, name.removesuffix("+PTX").rstrip("a").split("."))
        if (major == capability[0] and minor <= capability[1]) or (
            name.endswith("+PTX") and (major, minor) <= capability
        ):
            return True
    return False


def assume(architecture: int) -> None:
    """Under :func:`emulate`: choose kernels and tiles as on this architecture (80, 90, ...)."""
    _library.assume(torch.empty(0), architecture)


def _aligned(t: _Maybe) -> _Maybe:
    """t if 16-byte loads can read its rows, else a copy.

    They can where the last stride is 1, the others are multiples of 16 bytes, and no row lies over another.
    """
    if t is None:
        return t
    unit = 16 // t.element_size()
    free = [s for s, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1]
    fits = (
        (t.stride(-1) == 1 or t.shape[-1] == 1)
        and not any(s % unit or s < t.shape[-1] for s in free)
        and t.data_ptr() % 16 == 0
    )
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def _rows(t: _Maybe) -> _Maybe:
    """t (M, N) or (N,) with a unit last stride, else a copy."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _check_scale(rows: int, row_scale: Tensor | None) -> None:
    if row_scale is not None and (row_scale.shape[0] == 0 or rows % row_scale.shape[0]) and rows:
        raise ValueError(f"row_scale has {row_scale.shape[0]} entries, which do not divide the {rows} rows")


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
    """Who runs a product: "kernel", "library" or, for ``op`` "normed", "folded".

    Args:
        tile: in place of the table's row: {"run": one of these}.
        op: "forward", "input" or "weight", as the tables for Triton have them, or "normed".
        on: an operand of the product.
        size, n, k: the rows, and the widths of the result and of the sum; of the weight's gradient N and K.
        activation, scaled, residual: of the epilogue; ``scaled`` by gamma or row_scale.
        saves: the forward's pre-activation, or the weight gradient's sums for the bias, are wanted too.
    """
    if tiles is None or tile is not None:
        return (tile or KERNEL)["run"]
    wide = None if residual is None else tiles.kind(residual.dtype)
    tile = tiles.choose(
        "cuda", on, on.dtype, size, lambda: KERNEL,
        op=op, activation=activation, scaled=scaled, residual=wide, saves=saves, n=n, k=k,
    )  # fmt: skip
    run: str = tile["run"]
    return run


def _by_library(tile: dict[str, Any] | None, op: str, on: Tensor, size: int, n: int, k: int, **key: Any) -> bool:
    return on.dtype == torch.float32 or _run(tile, op, on, size, n, k, **key) == "library"


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
    """(y, stream, mean, rstd), as :func:`fastvit.triton.layer_norm.layer_norm_forward`."""
    rows, width = x.shape
    if width > MAX_WIDTH:
        raise ValueError(f"layer_norm: the CUDA kernels hold a row in registers, so D <= {MAX_WIDTH}; got {width}")
    _check_scale(rows, row_scale)
    x, residual, gamma = _rows(x), _rows(residual), _rows(gamma)
    row_scale, weight, bias = _rows(row_scale), _rows(weight), _rows(bias)
    stream = None if residual is None else torch.empty(rows, width, dtype=residual.dtype, device=x.device)
    y = torch.empty(rows, width, dtype=out_dtype or (x if stream is None else stream).dtype, device=x.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    _library.layer_norm_forward(x, x, weight, bias, eps, residual, gamma, row_scale, y, stream, mean, rstd)
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
    """(dx, dresidual, dweight, dbias, dgamma), as :func:`fastvit.triton.layer_norm.layer_norm_backward`."""
    rows, width = normalised.shape
    dy, dstream, normalised, branch = _rows(dy), _rows(dstream), _rows(normalised), _rows(branch)
    weight, gamma = _rows(weight), _rows(gamma)
    row_scale = None if branch is None else _rows(row_scale)  # without a branch the caller scales its gradient
    dx = torch.empty(rows, width, dtype=(normalised if branch is None else branch).dtype, device=dy.device)
    dresidual = None if branch is None else torch.empty_like(dx, dtype=normalised.dtype)
    partials = None
    if need_params:
        programs = _library.layer_norm_programs(dy, rows, width)
        shape = (programs, 2 if gamma is None else 3, width)
        partials = torch.empty(shape, dtype=torch.float32, device=dy.device)
    _library.layer_norm_backward(
        dy, dy, dstream, normalised, weight, mean, rstd, branch, gamma, row_scale, dx, dresidual, partials
    )
    if partials is None:
        return dx, dresidual, None, None, None
    dweight, dbias, *dgamma = sum_groups(partials)
    return dx, dresidual, dweight, dbias, dgamma[0] if dgamma else None


def sum_partials(partials: Tensor) -> Tensor:
    """(...) float32: the sum of ``partials`` (S, ...) over S, bit-equal from run to run."""
    partials = partials.contiguous()
    sums = torch.empty(partials.shape[1:], dtype=torch.float32, device=partials.device)
    if partials.shape[0] == 0:
        return sums.zero_()
    _library.sum_partials(partials, partials, sums)
    return sums


def sum_groups(partials: Tensor) -> tuple[Tensor, ...]:
    """The same for ``partials`` (S, G, ...): G tensors, none a view."""
    return tuple(one.clone() for one in sum_partials(partials))


def scale_rows(x: Tensor, dtype: torch.dtype, row_scale: Tensor | None = None) -> Tensor:
    """row_scale * x (M, N) in ``dtype``; x itself if that changes nothing."""
    x = _rows(x)
    if x.dtype == dtype and row_scale is None:
        return x
    _check_scale(x.shape[0], row_scale)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _library.scale_rows(x, x, row_scale, out)
    return out


def swiglu_forward(x: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension: x (M, 2N) -> (M, N)."""
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    _library.swiglu_forward(x, _rows(x), out)
    return out


def activation_gradient(dout: Tensor, preact: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradient to ``preact`` and act(preact), as :func:`fastvit.triton.activations.activation_gradient`."""
    dpreact = torch.empty(preact.shape, dtype=preact.dtype, device=preact.device)
    hidden = torch.empty(dout.shape, dtype=preact.dtype, device=preact.device)
    _library.activation_gradient(dout, _rows(dout), _rows(preact), activation, dpreact, hidden)
    return dpreact, hidden


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
    """(out, preact or None), as :func:`fastvit.triton.linear.linear_forward`; sizes K and N are multiples of 8.

    ``tile``, here and below, is {"run": "kernel"} or {"run": "library"} in place of what the tables say.
    """
    if activation not in (None, "swiglu", *ACTIVATIONS):
        raise ValueError(f"unknown activation {activation!r}")
    swiglu = activation == "swiglu"
    if swiglu and (residual is not None or gamma is not None or row_scale is not None):
        raise ValueError("swiglu takes no residual, gamma or row_scale")
    (m, k), n = x.shape, weight.shape[0]
    _check_scale(m, row_scale)
    scaled, fused = gamma is not None or row_scale is not None, None if swiglu else activation
    key = {"activation": activation, "scaled": scaled, "residual": residual, "saves": save_preact}
    if _by_library(tile, "forward", x, m, n, k, **key):
        out, preact = cublas.linear_forward(
            x, weight, bias, activation=fused, residual=residual, gamma=gamma, row_scale=row_scale,
            save_preact=save_preact and not swiglu,
        )  # fmt: skip
    else:
        x, weight, residual = _aligned(x), _aligned(weight.contiguous()), _aligned(residual)
        bias, gamma, row_scale = map(_rows, (bias, gamma, row_scale))
        out = torch.empty(m, n, dtype=(x if residual is None else residual).dtype, device=x.device)
        preact = torch.empty(m, n, dtype=x.dtype, device=x.device) if save_preact and not swiglu else None
        _library.linear_forward(x, x, weight, bias, fused or "", residual, gamma, row_scale, out, preact)
    if swiglu:
        return swiglu_forward(out), out if save_preact else None
    return out, preact


def fold_norm(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A LayerNorm's weight g and bias b multiplied into the weight W (N, K) after it.

    Returns:
        g * W (N, K), rounded once; (N,) float32, the sums of its rows as rounded; (N,) float32, W b + bias.
    """
    weight = _aligned(weight.contiguous())
    norm_weight, norm_bias = _aligned(norm_weight), _aligned(norm_bias)
    folded = torch.empty_like(weight)
    sums, offsets = (torch.empty(len(weight), dtype=torch.float32, device=weight.device) for _ in range(2))
    _library.fold_norm(weight, weight, _rows(bias), norm_weight, norm_bias, folded, sums, offsets)
    return folded, sums, offsets


def linear_folded_forward(
    x: Tensor,
    norm: tuple[Tensor | None, Tensor | None, float],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, rstd) of act(LN(x) W^T + b) by a product with x itself: LN(x) is never written.

    LN(x) W^T + b = rstd * (x (g W)^T - mean * sums) + offsets, by :func:`fold_norm`. The statistics are those that
    :func:`layer_norm_forward` computes. The difference is taken of float32 sums, so it loses what mean / deviation of a
    row is more than 1 (docs/cuda.md says where that matters).

    Args:
        x: (M, K) float16 or bfloat16, the weight's dtype. norm: (weight (K,), bias (K,), eps) of the LayerNorm.
        weight, bias, activation: of the linear layer, as for :func:`linear_forward`.
    """
    m, n = x.shape[0], weight.shape[0]
    norm_weight, norm_bias, eps = norm
    x, (folded, sums, offsets) = _aligned(x), fold_norm(weight, bias, norm_weight, norm_bias)
    mean, rstd = (torch.empty(m, dtype=torch.float32, device=x.device) for _ in range(2))
    _library.layer_norm_forward(x, x, None, None, eps, None, None, None, None, None, mean, rstd)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    fused = "" if activation in (None, "swiglu") else activation
    _library.linear_folded_forward(x, x, folded, sums, offsets, mean, rstd, fused, out)
    return swiglu_forward(out) if activation == "swiglu" else out, mean, rstd


def linear_normed_forward(
    x: Tensor,
    norm: tuple[Tensor | None, Tensor | None, float],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    tile: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, rstd) of act(LN(x) W^T + b), for inference: two kernels or, where a table says so, folded into one.

    Arguments are :func:`linear_folded_forward`'s, but x may have any dtype; in another one than the weight's, as the
    float32 stream of autocast, it is never folded: that would round x before its mean is taken off. ``tile`` is
    {"run": "kernel"} or {"run": "folded"} in place of what the tables say.
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
    """(dx, hidden or None), as :func:`fastvit.triton.linear_backward.linear_input_gradient`."""
    if (preact is None) != (activation is None):
        raise ValueError("preact and activation go together")
    if activation not in (None, "swiglu", *ACTIVATIONS):
        raise ValueError(f"unknown activation {activation!r}")
    dout, (n, k) = scale_rows(dout, weight.dtype, row_scale), weight.shape
    if _by_library(tile, "input", dout, dout.shape[0], k, n, activation=activation, scaled=gamma is not None):
        dx = cublas.linear_input_gradient(dout, weight, gamma, out_dtype or weight.dtype)
        return (dx, None) if preact is None or activation is None else activation_gradient(dx, preact, activation)
    dout, weight = _aligned(dout), _aligned(weight.contiguous())
    fused = activation in ACTIVATIONS
    dx = torch.empty(dout.shape[0], k, dtype=out_dtype or weight.dtype, device=dout.device)
    hidden = torch.empty_like(dx, dtype=preact.dtype) if fused and preact is not None else None
    inside = _aligned(preact.contiguous()) if fused and preact is not None else None
    _library.linear_input_gradient(dout, dout, weight, _rows(gamma), inside, activation if fused else "", dx, hidden)
    if activation == "swiglu" and preact is not None:
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
    """(dweight, dbias, dgamma), as :func:`fastvit.triton.linear_backward.linear_weight_gradient`."""
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
        dout, x = _aligned(dout), _aligned(x)
        splits = _library.linear_weight_gradient_splits(x, m, n, k)
        partials = empty(splits, n, k)
        bias_partials = empty(splits, n) if need_sums else None
        _library.linear_weight_gradient(x, dout, x, partials, bias_partials)
        gradient = partials[0] if splits == 1 else sum_partials(partials)
        sums = None if bias_partials is None else sum_partials(bias_partials)
    dweight = empty(n, k, dtype=x.dtype)
    dgamma = None if gamma is None else empty(n)
    if gamma is None:
        weight = bias = None  # gamma's gradient alone reads them
    else:
        weight = weight.contiguous() if weight is not None else None
    _library.finish_weight_gradient(x, gradient, sums, weight, _rows(bias), _rows(gamma), dweight, dgamma)
    return dweight, sums if need_bias else None, dgamma


def _modifiers(
    bias: Tensor | None,
    table: Tensor | None,
    window: tuple[int, int] | None,
    key_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Any, ...]:
    """``AttentionModifiers`` of csrc/include/ops.h, in its order. Of float64, a copy in float32 is read."""
    bias, table = (t.float() if t is not None and t.dtype == torch.float64 else t for t in (bias, table))
    mask = None if key_mask is None else key_mask.view(torch.uint8)
    seed = None if seed is None else seed.reshape(1)
    return bias, table, mask, cu_q, cu_k, seed, *(window or (0, 0)), max_q, max_k, float(dropout_p)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    key_mask: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int = 0,
    max_k: int = 0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse), as :func:`fastvit.triton.attention.attention_forward`; d is a multiple of 8 from 32 to 128."""
    batch, queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if k.shape[1] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    modifiers = _modifiers(bias, table, window, key_mask, cu_q, cu_k, max_q, max_k, dropout_p, seed)
    _library.attention_forward(q, *modifiers, _aligned(q), _aligned(k), _aligned(v), float(scale), out, lse)
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    key_mask: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int = 0,
    max_k: int = 0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dbias: Tensor | None = None,
    dtable: Tensor | None = None,
) -> None:
    """Write dq, dk, dv, and dbias or dtable if given: :func:`fastvit.triton.attention_backward.attention_backward`."""
    if 0 in (q.shape[0], q.shape[1], k.shape[1]):
        for gradient in (dq, dk, dv, dbias, dtable):
            if gradient is not None:
                gradient.zero_()
        return
    dout, q, k, v, out = map(_aligned, (dout, q, k, v, out))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    dlse = None if dlse is None else dlse.contiguous()
    modifiers = _modifiers(bias, table, window, key_mask, cu_q, cu_k, max_q, max_k, dropout_p, seed)
    scale = float(scale)
    _library.attention_query_gradient(q, *modifiers, dout, dlse, q, k, v, out, lse, scale, dq, delta)
    _library.attention_key_value_gradient(q, *modifiers, dout, q, k, v, lse, delta, scale, dk, dv)
    if dbias is not None:
        _library.attention_bias_gradient(q, *modifiers, dout, q, k, v, lse, delta, scale, dbias)
    if dtable is not None:
        _library.attention_table_gradient(q, *modifiers, dout, q, k, v, lse, delta, scale, dtable)


def attention_rows(
    q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, scale: float, *, bias: Tensor | None = None
) -> Tensor:
    """(B, H, R, Tk), as :func:`fastvit.triton.attention_rows.attention_rows`; d is a multiple of 8 from 32 to 128."""
    shape = (q.shape[0], q.shape[2], rows.shape[0], k.shape[1])
    out = torch.empty(shape, dtype=torch.float32, device=q.device)
    _library.attention_rows(q, _aligned(q), _aligned(k), lse, rows, bias, float(scale), out)
    return out


def attention_distance(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, grid: Sequence[int], patch_size: Sequence[float]
) -> Tensor:
    """(B, H), as :func:`fastvit.triton.attention_rows.attention_distance`."""
    blocks = _library.attention_distance_blocks(q, grid[0] * grid[1])
    partials = torch.empty((blocks, q.shape[0], q.shape[2]), dtype=torch.float32, device=q.device)
    _library.attention_distance(q, _aligned(q), _aligned(k), lse, float(scale), *grid, *patch_size, partials)
    return sum_partials(partials)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """(q', k'), as :func:`fastvit.triton.rope.rope`; d is a multiple of 8."""
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _library.rope(q, _aligned(q), _aligned(k), _aligned(cos), _aligned(sin), int(inverse), q_out, k_out)
    return q_out, k_out


def patch_embed_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(B, P + N, D), as :func:`fastvit.triton.patch_embed.patch_embed_forward`; D is a multiple of 8."""
    batch, _, height, right = images.shape
    width, _, p, q = weight.shape
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    tokens = prefix + (height // p) * (right // q)
    out = torch.empty(batch, tokens, width, dtype=out_dtype or weight.dtype, device=images.device)
    positions = None if pos_embed is None else pos_embed[0].contiguous()
    first = None if prefix_tokens is None or prefix == 0 else prefix_tokens[0].contiguous()
    weight = _aligned(weight.contiguous())
    _library.patch_embed_forward(images, images, weight, _rows(bias), positions, first, mean, std, out)
    return out


def patch_embed_weight_gradient(
    dout: Tensor,
    images: Tensor,
    weight_shape: tuple[int, int, int, int] | torch.Size,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    prefix: int,
) -> Tensor:
    """dweight (D, C, p, q) float32, as :func:`fastvit.triton.patch_embed.patch_embed_weight_gradient`."""
    width, channels, p, q = weight_shape
    features = channels * p * q
    rows = dout.shape[0] * (dout.shape[1] - prefix)
    splits = _library.patch_embed_weight_gradient_splits(dout, rows, width, features)
    partials = torch.empty(splits, width, features, dtype=torch.float32, device=dout.device)
    dout = _aligned(dout.contiguous())
    _library.patch_embed_weight_gradient(dout, dout, images, mean, std, p, q, prefix, partials)
    return sum_partials(partials).view(weight_shape)


def patch_embed_row_gradients(dout: Tensor) -> Tensor:
    """dout (B, T, D) summed over the batch: (T, D) float32."""
    return sum_partials(dout)


def patch_embed_image_gradient(
    dout: Tensor,
    weight: Tensor,
    image_shape: tuple[int, int, int, int] | torch.Size,
    *,
    std: Tensor | None = None,
    prefix: int,
    dtype: torch.dtype,
) -> Tensor:
    """dimages (B, C, H, W), as :func:`fastvit.triton.patch_embed.patch_embed_image_gradient`."""
    dimages = torch.empty(image_shape, dtype=dtype, device=dout.device)
    dout, weight = _aligned(dout.contiguous()), _aligned(weight.contiguous())
    _library.patch_embed_image_gradient(dout, dout, weight, std, prefix, dimages)
    return dimages


def _packed_patches(pixels: Tensor, layout: Layout, weight_shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The raw pixels of every patch, (N, C, p, q)."""
    _, channels, p, q = weight_shape
    return pixels[layout.pixels(channels, (p, q))]


def patch_embed_packed_forward(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(1, N + n * P, D), as :func:`fastvit.triton.patch_embed_packed.patch_embed_packed_forward`.

    Here the raw pixels are gathered by PyTorch first; to the kernel each patch is an image of its own.
    """
    dtype, patches = (
        out_dtype or weight.dtype,
        pixels[layout.pixels(weight.shape[1], (weight.shape[2], weight.shape[3]))],
    )
    exact = dtype if pos_embed is None else torch.float32
    x = patch_embed_forward(patches, weight, bias, mean=mean, std=std, out_dtype=exact)[:, 0]
    if pos_embed is not None:
        x = (x + pos_embed).to(dtype)
    if prefix_tokens is None:
        return x.unsqueeze(0)
    at = layout.prefix_tokens(prefix_tokens.shape[1])
    out = x.new_empty(x.shape[0] + at.numel(), x.shape[1]).index_copy_(0, layout.patch_tokens(at.shape[1]), x)
    return out.index_copy_(0, at.flatten(), prefix_tokens[0].to(dtype).repeat(at.shape[0], 1)).unsqueeze(0)


def patch_embed_packed_weight_gradient(
    dout: Tensor,
    pixels: Tensor,
    weight_shape: tuple[int, int, int, int] | torch.Size,
    layout: Layout,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """dweight float32, as :func:`fastvit.triton.patch_embed_packed.patch_embed_packed_weight_gradient`."""
    patches = _packed_patches(pixels, layout, weight_shape)
    return patch_embed_weight_gradient(dout.unsqueeze(1), patches, weight_shape, mean=mean, std=std, prefix=0)
