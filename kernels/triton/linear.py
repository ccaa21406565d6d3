"""out = residual + row_scale * gamma * act(x W^T + b): one GEMM, everything else in its epilogue.

Two forms of one kernel, with one epilogue. The pointer form masks any shape and takes any strides; it
runs everywhere, one program for each output tile. The TMA form (Hopper and later, aligned rows)
is persistent: the loop over tiles is flattened into the loop over K, so the loads of the next tile are
in flight while this one is written. Neither knows which gradient or layer it computes: the input gradient
(``linear_backward``) is the same GEMM with W read the other way round and the epilogue run backward.

Names in this file are the GEMM's: out (M, N) = a (M, K) @ b (K, N).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvit import activations
from fastvit.triton import tiles
from fastvit.triton.activations import FORMULAS, gated_forward
from fastvit.triton.launch import (
    architecture,
    dot,
    launch,
    multiprocessors,
    narrow,
    precision,
    rows_contiguous,
    rows_per_image,
    store,
)

_GROUP_M = tl.constexpr(8)  # row tiles that share the columns of b while they are in L2


@triton.jit
def tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first row and column of output tile number ``tile``, counted down groups of _GROUP_M row tiles."""
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    in_group = _GROUP_M * n_tiles
    first = tile // in_group * _GROUP_M
    height = tl.minimum(m_tiles - first, _GROUP_M)
    return (first + tile % in_group % height) * BLOCK_M, tile % in_group // height * BLOCK_N


@triton.jit
def _finish(acc, row, col, pointers, M, N, rows_per_image, ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr):
    """Write the block of out at (row, col) whose product is ``acc``.

    Forward: preact = acc + bias is written where it has a pointer, out = residual + row_scale * gamma * act(preact).
    Backward: out = row_scale * acc * act'(preact), and hidden = act(preact) is written beside it.
    """
    out_ptr, bias_ptr, gamma_ptr, row_scale_ptr, residual_ptr, preact_ptr, hidden_ptr = pointers
    rows, cols = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    in_rows, in_cols = row + rows < M, col + cols < N
    mask = in_rows[:, None] & in_cols[None, :]
    corner = row.to(tl.int64) * N + col  # only the corner of a tile needs 64 bits
    offsets = corner + (rows[:, None] * N + cols[None, :])
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col + cols, mask=in_cols, other=0).to(tl.float32)[None, :]
    if BACKWARD and ACTIVATION is not None:
        hidden, slope = ACTIVATION(tl.load(preact_ptr + offsets, mask=mask).to(tl.float32))
        store(hidden_ptr + offsets, hidden, mask)
        acc *= slope
    else:
        if preact_ptr is not None:
            store(preact_ptr + offsets, acc, mask)
        if ACTIVATION is not None:
            acc, _ = ACTIVATION(acc)
    if gamma_ptr is not None:
        acc *= tl.load(gamma_ptr + col + cols, mask=in_cols, other=0).to(tl.float32)[None, :]
    if row_scale_ptr is not None:
        acc *= tl.load(row_scale_ptr + (row + rows) // rows_per_image, mask=in_rows, other=0)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=mask).to(tl.float32)
    store(out_ptr + offsets, acc, mask)


@triton.jit
def _epilogue(
    acc, row, col, pointers, M, N, rows_per_image,
    ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Run ``_finish`` in PARTS slices of N (1, 2 or 4): a large tile's epilogue then fits the registers left over."""
    if PARTS == 1:
        _finish(acc, row, col, pointers, M, N, rows_per_image, ACTIVATION, BACKWARD)
    else:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1)))
        _epilogue(left, row, col, pointers, M, N, rows_per_image, ACTIVATION, BACKWARD, PARTS // 2)
        _epilogue(right, row, col + HALF, pointers, M, N, rows_per_image, ACTIVATION, BACKWARD, PARTS // 2)


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def linear_pointer_kernel(
    a_ptr,  # (M, K), rows contiguous
    b_ptr,  # (K, N), any strides
    a_scale_ptr,  # (K,) or None: scales the columns of a
    out_ptr,  # (M, N)
    bias_ptr,  # (N,) or None
    gamma_ptr,  # (N,) or None
    row_scale_ptr,  # (B,) float32 or None: row m is scaled by entry m // rows_per_image
    residual_ptr,  # (M, N) or None
    preact_ptr,  # (M, N) or None: written forward, read backward
    hidden_ptr,  # (M, N) or None: written backward
    M,
    N,
    K,
    stride_am,
    stride_bk,
    stride_bn,
    rows_per_image,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, col = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    rows, cols, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a_ptr += row.to(tl.int64) * stride_am  # 64 bits lead to a tile, 32 lead through it
    b_ptr += col.to(tl.int64) * stride_bn
    a_offsets = rows[:, None] * stride_am + ks[None, :]
    b_offsets = ks[:, None] * stride_bk + cols[None, :] * stride_bn
    in_rows, in_cols = row + rows < M, col + cols < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = k + ks < K
        a = tl.load(a_ptr + a_offsets, mask=in_rows[:, None] & in_k[None, :], other=0)
        b = tl.load(b_ptr + b_offsets, mask=in_k[:, None] & in_cols[None, :], other=0)
        if a_scale_ptr is not None:
            a = a.to(tl.float32) * tl.load(a_scale_ptr + k + ks, mask=in_k, other=0).to(tl.float32)[None, :]
        if a.dtype != b.dtype:
            a = narrow(a.to(tl.float32), b.dtype)
        acc = dot(a, b, acc, PRECISION)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * stride_bk
    pointers = (out_ptr, bias_ptr, gamma_ptr, row_scale_ptr, residual_ptr, preact_ptr, hidden_ptr)
    _epilogue(acc, row, col, pointers, M, N, rows_per_image, ACTIVATION, BACKWARD, PARTS)


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def linear_tma_kernel(
    a_desc,  # (M, K) in blocks (BLOCK_M, BLOCK_K)
    b_desc,  # forward (N, K) in blocks (BLOCK_N, BLOCK_K); backward (K, N) in blocks (BLOCK_K, BLOCK_N)
    out_ptr,  # (M, N)
    bias_ptr,  # (N,) or None
    gamma_ptr,  # (N,) or None
    row_scale_ptr,  # (B,) float32 or None: row m is scaled by entry m // rows_per_image
    residual_ptr,  # (M, N) or None
    preact_ptr,  # (M, N) or None: written forward, read backward
    hidden_ptr,  # (M, N) or None: written backward
    M,
    N,
    K,
    rows_per_image,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_total = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_total, tl.num_programs(0), flatten=True):
        row, col = tile_origin(tile, M, N, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([row, k])
            b = b_desc.load([k, col]) if BACKWARD else b_desc.load([col, k]).T
            acc = dot(a, b, acc, PRECISION)
        pointers = (out_ptr, bias_ptr, gamma_ptr, row_scale_ptr, residual_ptr, preact_ptr, hidden_ptr)
        _epilogue(acc, row, col, pointers, M, N, rows_per_image, ACTIVATION, BACKWARD, PARTS)


@lru_cache(maxsize=8192)
def choose(op: str, arch: int, dtype: torch.dtype, m: int, n: int, k: int, forms: tuple[str, ...]) -> dict[str, Any]:
    """Return the derived tile of the GEMM (m, k) @ (k, n), in the first of ``forms`` that the table has for ``op``.

    Of the rows left it is the one whose shape is nearest, in octaves.

    Raises:
        LookupError: the table has no such row.
    """
    rows = [row for row in tiles.rows("linear", arch, dtype) if row["op"] == op]
    rows = next((found for form in forms if (found := [row for row in rows if row["form"] == form])), [])
    if not rows:
        raise LookupError(f"tables/linear.json has no row for {op}, sm{arch}, {dtype} among the forms {forms}")
    shape = {"m": m, "n": n, "k": k}
    return min(rows, key=lambda row: sum(abs(math.log2(max(size, 1) / row[name])) for name, size in shape.items()))


def forms(*sizes: int) -> tuple[str, ...]:
    """Return the forms of a pointer kernel that suit these sizes and strides.

    Of each it knows whether 16 divides it. Where 16 does not, elements are loaded and stored one by one, and their
    addresses take so many registers that only a smaller tile, "unaligned", leaves room for them.
    """
    return ("unaligned", "pointer") if any(size % 16 for size in sizes) else ("pointer",)


def _tma_can_read(x: Tensor) -> bool:
    """Return whether a host descriptor can address x (M, N): not empty, base and rows on 16-byte boundaries."""
    row = x.stride(0) * x.element_size()
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and row % 16 == 0 and x.stride(0) >= x.shape[1]


def matmul(
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    backward: bool = False,
    a_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    residual: Tensor | None = None,
    preact: Tensor | None = None,
    hidden: Tensor | None = None,
    activation: str | None = None,
    tile: dict[str, Any] | None = None,
) -> None:
    """Launch the GEMM a @ weight^T (backward: a @ weight) into ``out``, in the form and tile that suit it."""
    (m, k), n = a.shape, out.shape[1]
    arch = architecture(a)
    tma = arch >= 90 and weight.element_size() == 2 and a.dtype == weight.dtype and a_scale is None and n % 16 == 0
    tma = tma and _tma_can_read(a) and _tma_can_read(weight)
    suited = ("tma", "pointer") if tma else forms(n, k, a.stride(0), weight.stride(0))
    op = "input" if backward else "forward"
    tile = tile or tiles.choose(
        "linear", a, weight.dtype, m, lambda: choose(op, arch, weight.dtype, m, n, k, suited),
        op=op, allows=suited[0], activation=activation,
        scaled=a_scale is not None, residual=residual is not None, n=n, k=k,
    )  # fmt: skip
    form = tile.get("form", suited[0])
    block_m, block_n, block_k = tile["block_m"], tile["block_n"], tile["block_k"]
    args: dict[str, Any] = {
        "out_ptr": out,
        "bias_ptr": bias,
        "gamma_ptr": gamma,
        "row_scale_ptr": row_scale,
        "residual_ptr": residual,
        "preact_ptr": preact,
        "hidden_ptr": hidden,
        "M": m,
        "N": n,
        "K": k,
        "rows_per_image": rows_per_image(m, row_scale),
        "ACTIVATION": FORMULAS[activation],
        "BACKWARD": backward,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "PARTS": tile.get("parts", 1),
        "PRECISION": precision(weight.dtype),
    }
    programs = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    if form == "tma":
        kernel, programs = linear_tma_kernel, min(programs, multiprocessors(a))
        weight_block = [block_k, block_n] if backward else [block_n, block_k]
        args["a_desc"] = TensorDescriptor.from_tensor(a, [block_m, block_k])
        args["b_desc"] = TensorDescriptor.from_tensor(weight, weight_block)
    else:
        kernel = linear_pointer_kernel
        stride_bk, stride_bn = weight.stride() if backward else weight.stride()[::-1]
        args |= {"a_ptr": a, "b_ptr": weight, "a_scale_ptr": a_scale}
        args |= {"stride_am": a.stride(0), "stride_bk": stride_bk, "stride_bn": stride_bn}
    hot = weight.element_size() == 2
    launch(kernel, (programs,), args, tile=tile, hot=hot)


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
    """Compute residual + row_scale * gamma * act(x W^T + b), each part optional; products summed in float32.

    Args:
        x: (M, K), float32, float16 or bfloat16; a row stride is kept, other layouts are made contiguous.
        weight: (N, K), x's dtype.
        bias: (N,), float32 or x's dtype.
        activation: None or a name in :mod:`fastvit.activations`; a gated one stands alone and takes one more launch.
        residual: (M, N), any of the dtypes; ``out`` takes it.
        gamma: (N,), LayerScale, float32 or x's dtype.
        row_scale: (B,) float32, drop-path; row m takes entry m // (M // B).
        save_preact: also return x W^T + b.
        tile: in place of the table's: block_m, block_n, block_k, warps, stages; parts (of the epilogue) is 1
            and form, by default the first that the shapes allow.

    Returns:
        out (M, N), or (M, N / 2) with a gated activation, and preact (M, N) in x's dtype, or None.

    Raises:
        ValueError: unknown activation, a gated one with a residual or scales, or B does not divide M.
    """
    activations.check(activation, gated=True)
    x, weight = rows_contiguous(x), rows_contiguous(weight)
    m, n = x.shape[0], weight.shape[0]
    if activation in activations.GATED:
        if residual is not None or gamma is not None or row_scale is not None:
            raise ValueError(f"{activation} takes no residual, gamma or row_scale")
        preact = x.new_empty(m, n)
        matmul(x, weight, preact, bias=bias, tile=tile)
        return gated_forward(preact, activation), preact if save_preact else None
    preact = x.new_empty(m, n) if save_preact else None
    out = x.new_empty(m, n, dtype=None if residual is None else residual.dtype)
    matmul(
        x, weight, out, bias=bias, gamma=gamma, row_scale=row_scale, preact=preact, activation=activation, tile=tile,
        residual=None if residual is None else residual.contiguous(),
    )  # fmt: skip
    return out, preact
