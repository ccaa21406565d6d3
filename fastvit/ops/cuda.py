"""The launchers of the CUDA kernels (``csrc/``): names and arguments of the Triton ones, on the compiled extension.

The extension (``fastvit/_C.abi3.so``) is loaded here. Where it is absent, or was built for another PyTorch,
:data:`MISSING` says so and nothing else happens. The tests load the same sources compiled for the CPU with
:func:`emulate`.

Products take float16 and bfloat16; LayerNorm and what is elementwise take float32 too. Arguments are as the Triton
launchers' unless a docstring says otherwise; layouts that a kernel does not read are copied once.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastvit.packing import Layout

_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)
_PACKAGE = Path(__file__).parent.parent
_library: Any = None  # torch.ops.fastvit_cuda, or fastvit_emulated in the tests
EMULATED = False

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
ATTENTION_MODIFIERS: tuple[str, ...] = ()  # of ops.attention's arguments, those that the kernels take
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
) -> tuple[Tensor, Tensor | None]:
    """(out, preact or None), as :func:`fastvit.triton.linear.linear_forward`; sizes K and N are multiples of 8."""
    if activation not in (None, "swiglu", *ACTIVATIONS):
        raise ValueError(f"unknown activation {activation!r}")
    swiglu = activation == "swiglu"
    if swiglu and (residual is not None or gamma is not None or row_scale is not None):
        raise ValueError("swiglu takes no residual, gamma or row_scale")
    m, n = x.shape[0], weight.shape[0]
    _check_scale(m, row_scale)
    x, weight, residual = _aligned(x), _aligned(weight.contiguous()), _aligned(residual)
    bias, gamma, row_scale = map(_rows, (bias, gamma, row_scale))
    out = torch.empty(m, n, dtype=(x if residual is None else residual).dtype, device=x.device)
    preact = torch.empty(m, n, dtype=x.dtype, device=x.device) if save_preact and not swiglu else None
    fused = "" if activation is None or swiglu else activation
    _library.linear_forward(x, x, weight, bias, fused, residual, gamma, row_scale, out, preact)
    if swiglu:
        return swiglu_forward(out), out if save_preact else None
    return out, preact


def linear_input_gradient(
    dout: Tensor,
    weight: Tensor,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    preact: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dx, hidden or None), as :func:`fastvit.triton.linear_backward.linear_input_gradient`."""
    if (preact is None) != (activation is None):
        raise ValueError("preact and activation go together")
    if activation not in (None, "swiglu", *ACTIVATIONS):
        raise ValueError(f"unknown activation {activation!r}")
    dout, weight = _aligned(scale_rows(dout, weight.dtype, row_scale)), _aligned(weight.contiguous())
    fused = activation in ACTIVATIONS
    dx = torch.empty(dout.shape[0], weight.shape[1], dtype=out_dtype or weight.dtype, device=dout.device)
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dweight, dbias, dgamma), as :func:`fastvit.triton.linear_backward.linear_weight_gradient`."""
    if gamma is not None and weight is None:
        raise ValueError("the gradient of gamma needs the weight")
    dout, x = _aligned(scale_rows(dout, x.dtype, row_scale)), _aligned(x)
    (m, n), k = dout.shape, x.shape[1]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    splits = _library.linear_weight_gradient_splits(x, m, n, k)
    partials = empty(splits, n, k)
    need_sums = need_bias or (gamma is not None and bias is not None)
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


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse), as :func:`fastvit.triton.attention.attention_forward`; d is a multiple of 8 from 32 to 128."""
    batch, queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if k.shape[1] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    _library.attention_forward(q, _aligned(q), _aligned(k), _aligned(v), float(scale), out, lse)
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
) -> None:
    """Write dq, dk and dv, as :func:`fastvit.triton.attention_backward.attention_backward`."""
    if k.shape[1] == 0:
        dq.zero_()
        return
    if q.shape[1] == 0:
        dk.zero_()
        dv.zero_()
        return
    dout, q, k, v, out = map(_aligned, (dout, q, k, v, out))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    dlse = None if dlse is None else dlse.contiguous()
    _library.attention_query_gradient(q, dout, dlse, q, k, v, out, lse, float(scale), dq, delta)
    _library.attention_key_value_gradient(q, dout, q, k, v, lse, delta, float(scale), dk, dv)


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
