"""Patch embedding as one GEMM that gathers its own patches, and its gradients.

    out[b, P + n] = patch(b, n) W^T + bias + pos        out[b, t] = prefix[t] + pos for t < P

with patch(b, n) the K = C * p * q pixels of patch n (equation 1 of Dosovitskiy et al. 2021), so a
strided convolution without an im2col buffer. K runs in the weight's own order, k = (c * p + i) * q + j:
the weight is read as it lies, and in an NCHW image each (c, i) is a run of q pixels that goes on in
the next patch, which is the next row of the tile. In an NHWC image one line serves C values of c,
and the later ones find it in the cache: device memory is read once either way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.triton import tiles
from fastvit.triton.launch import architecture, dot, launch, multiprocessors, narrow, precision, store
from fastvit.triton.reduce import sum_partials


@triton.jit
def _patch_offsets(image, patch, stride_b, stride_h, stride_w, grid_w, P: tl.constexpr, Q: tl.constexpr):
    """Where the first pixel of each patch lies: int64, the shape of ``image`` and ``patch``."""
    y, x = (patch // grid_w) * P, (patch % grid_w) * Q
    return image.to(tl.int64) * stride_b + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


@triton.jit
def _pixel_offsets(k, stride_c, stride_h, stride_w, P: tl.constexpr, Q: tl.constexpr):
    """Where pixel k = (c * P + i) * Q + j of a patch lies after its first: int32 (see ``_near``), as ``k``."""
    return k // (P * Q) * stride_c + k // Q % P * stride_h + k % Q * stride_w


@triton.jit
def normalised(
    values,  # (ROWS, COLUMNS) uint8 or floating
    mean_ptr,  # (C,) float32 or None
    std_ptr,  # (C,) float32 or None
    k,  # (COLUMNS,)
    k_mask,  # (COLUMNS,)
    PLANE: tl.constexpr,  # values of a channel in a patch
    DTYPE: tl.constexpr,
):
    """Pixels k of patches in DTYPE: uint8 scaled to 0..1, then (value - mean) / std in float32."""
    if values.dtype == tl.uint8 or mean_ptr is not None or std_ptr is not None:
        # One multiply-add a pixel: the divisions are done once a column.
        scale = tl.full(k.shape, 1 / 255 if values.dtype == tl.uint8 else 1.0, tl.float32)
        shift = tl.zeros(k.shape, tl.float32)
        if mean_ptr is not None:
            shift -= tl.load(mean_ptr + k // PLANE, k_mask, other=0.0)
        if std_ptr is not None:
            std = tl.load(std_ptr + k // PLANE, k_mask, other=1.0)
            scale, shift = scale / std, shift / std
        values = values.to(tl.float32) * scale[None, :] + shift[None, :]
    return values if values.dtype == DTYPE else narrow(values.to(tl.float32), DTYPE)


@triton.jit
def _patches(
    images_ptr,  # (B, C, H, W), any strides; uint8 or floating
    mean_ptr,  # (C,) float32 or None
    std_ptr,  # (C,) float32 or None
    patch_offsets,  # (ROWS,)
    patch_mask,  # (ROWS,)
    k,  # (COLUMNS,)
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The (ROWS, COLUMNS) tile of patches in DTYPE, normalised."""
    k_mask = k < C * P * Q
    pixels = images_ptr + patch_offsets[:, None] + _pixel_offsets(k, stride_c, stride_h, stride_w, P, Q)[None, :]
    values = tl.load(pixels, patch_mask[:, None] & k_mask[None, :], other=0)
    return normalised(values, mean_ptr, std_ptr, k, k_mask, P * Q, DTYPE)


@triton.jit(do_not_specialize=["M", "tokens", "prefix_rows", "pos_rows", "grid_w"])
def patch_embed_forward_kernel(
    images_ptr,  # (B, C, H, W), any strides; uint8 or floating
    weight_ptr,  # (D, C * P * Q)
    bias_ptr,  # (D,) or None
    pos_ptr,  # (pos_rows, D) or None: for the last pos_rows tokens of an image
    prefix_ptr,  # (prefix_rows, D) or None
    mean_ptr,  # (C,) float32 or None
    std_ptr,  # (C,) float32 or None
    out_ptr,  # (M, D), M = B * tokens
    M,
    D,
    tokens,
    prefix_rows,
    pos_rows,
    grid_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K: tl.constexpr = C * P * Q
    # The programs of one row of tiles run together: they gather the same patches, once from device memory.
    tiles_n = tl.cdiv(D, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, n_mask = rows < M, n < D
    image, token = rows // tokens, rows % tokens
    patch = token - prefix_rows
    patch_mask = row_mask & (patch >= 0)
    patch_offsets = _patch_offsets(image, patch, stride_b, stride_h, stride_w, grid_w, P, Q)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        dtype: tl.constexpr = weight_ptr.dtype.element_ty
        a = _patches(
            images_ptr, mean_ptr, std_ptr, patch_offsets, patch_mask, k, stride_c, stride_h, stride_w, C, P, Q, dtype
        )
        w = tl.load(weight_ptr + n[None, :] * K + k[:, None], n_mask[None, :] & (k < K)[:, None], other=0.0)
        acc = dot(a, w, acc, PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, n_mask, other=0.0).to(tl.float32)[None, :]
    if prefix_ptr is not None and tl.min(patch, 0) < 0:  # a branch keeps these values out of the registers of pos
        prefix_mask = (row_mask & (patch < 0))[:, None] & n_mask[None, :]
        prefix = tl.load(prefix_ptr + token[:, None] * D + n[None, :], prefix_mask, other=0.0)
        acc = tl.where((patch < 0)[:, None], prefix.to(tl.float32), acc)
    if pos_ptr is not None:
        position = token - (tokens - pos_rows)
        pos_mask = (row_mask & (position >= 0))[:, None] & n_mask[None, :]
        acc += tl.load(pos_ptr + position[:, None] * D + n[None, :], pos_mask, other=0.0).to(tl.float32)
    out = out_ptr + rows.to(tl.int64)[:, None] * D + n[None, :]
    store(out, acc, row_mask[:, None] & n_mask[None, :])


@triton.jit(do_not_specialize=["patches", "per_image", "patches_per_split", "prefix_rows", "grid_w"])
def patch_embed_weight_gradient_kernel(
    dout_ptr,  # (B, prefix_rows + per_image, D)
    images_ptr,  # (B, C, H, W), any strides; uint8 or floating
    mean_ptr,  # (C,) float32 or None
    std_ptr,  # (C,) float32 or None
    partials_ptr,  # (splits, D, C * P * Q) float32
    patches,  # B * per_image
    per_image,
    patches_per_split,
    D,
    prefix_rows,
    grid_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K: tl.constexpr = C * P * Q
    split = tl.program_id(1)
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    d = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    d_mask = d < D

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * patches_per_split
    end = tl.minimum(first + patches_per_split, patches)
    for start in range(first, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        mask = rows < end
        image, patch = rows // per_image, rows % per_image
        dout_rows = rows + (image + 1) * prefix_rows  # past the prefix rows of this image and those before
        dout = tl.load(
            dout_ptr + dout_rows.to(tl.int64)[:, None] * D + d[None, :], mask[:, None] & d_mask[None, :], other=0.0
        )
        offsets = _patch_offsets(image, patch, stride_b, stride_h, stride_w, grid_w, P, Q)
        a = _patches(images_ptr, mean_ptr, std_ptr, offsets, mask, k, stride_c, stride_h, stride_w, C, P, Q, dout.dtype)
        acc = dot(tl.trans(dout), a, acc, PRECISION)

    partial = partials_ptr + split.to(tl.int64) * D * K + d[:, None] * K + k[None, :]
    tl.store(partial, acc, d_mask[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["patches", "per_image", "prefix_rows", "grid_w"])
def patch_embed_image_gradient_kernel(
    dout_ptr,  # (B, prefix_rows + per_image, D)
    weight_ptr,  # (D, C * P * Q)
    std_ptr,  # (C,) float32 or None
    dimages_ptr,  # (B, C, H, W), strides below
    patches,  # B * per_image
    per_image,
    D,
    prefix_rows,
    grid_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K: tl.constexpr = C * P * Q
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, k_mask = rows < patches, k < K
    image, patch = rows // per_image, rows % per_image
    dout_rows = (rows + (image + 1) * prefix_rows).to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        d_mask = d < D
        dout = tl.load(dout_ptr + dout_rows[:, None] * D + d[None, :], row_mask[:, None] & d_mask[None, :], other=0.0)
        w = tl.load(weight_ptr + d[:, None] * K + k[None, :], d_mask[:, None] & k_mask[None, :], other=0.0)
        acc = dot(dout, w, acc, PRECISION)

    if std_ptr is not None:
        acc /= tl.load(std_ptr + k // (P * Q), k_mask, other=1.0)[None, :]
    offsets = _patch_offsets(image, patch, stride_b, stride_h, stride_w, grid_w, P, Q)
    pixels = dimages_ptr + offsets[:, None] + _pixel_offsets(k, stride_c, stride_h, stride_w, P, Q)[None, :]
    store(pixels, acc, row_mask[:, None] & k_mask[None, :])


def choose_tile(
    kernel: str, like: Tensor, size: int, rows: int, pixels: torch.dtype, weight: torch.Size
) -> dict[str, Any]:
    """The table's tile; of the derived ones the first for ``kernel`` that ``size`` output rows are enough for.

    ``rows`` are those that grow with the batch, ``pixels`` the dtype of the images, ``weight`` its shape.
    """

    def derived() -> dict[str, Any]:
        table = tiles.rows("patch_embed", architecture(like), like.dtype)
        return next(row for row in table if row["kernel"] == kernel and size >= row["min_size"])

    return tiles.choose(
        "patch_embed", like, like.dtype, rows, derived,
        kernel=kernel, pixels="uint8" if pixels == torch.uint8 else "floating",
        dim=weight[0], channels=weight[1], patch_height=weight[2], patch_width=weight[3],
    )  # fmt: skip


def launch_tile(
    kernel: Any, grid: tuple[int, ...], tile: dict[str, Any], dtype: torch.dtype, args: dict[str, Any]
) -> None:
    blocks = {name.upper(): tile[name] for name in ("block_m", "block_n", "block_k")}
    launch(
        kernel,
        grid,
        {**args, **blocks, "PRECISION": precision(dtype)},
        num_warps=tile["warps"],
        num_stages=tile["stages"],
        hot=dtype != torch.float32,
    )


def split_rows(rows: int, grid: int, tile: dict[str, Any], like: Tensor) -> tuple[int, int]:
    """(splits, rows of each) of a contraction over ``rows`` whose tiles of results are ``grid`` programs."""
    # Enough splits for two programs on every multiprocessor, none shorter than eight steps.
    steps = triton.cdiv(rows, tile["block_k"])
    splits = max(min(triton.cdiv(2 * multiprocessors(like), grid), steps // 8), 1)
    per_split = triton.cdiv(steps, splits) * tile["block_k"]
    return max(triton.cdiv(rows, max(per_split, 1)), 1), per_split


def _near(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """``images``, copied if one patch spans 2^31 values or more: within a patch the kernels count in int32."""
    last = (0, images.shape[1] - 1, patch[0] - 1, patch[1] - 1)
    span = sum(i * stride for i, stride in zip(last, images.stride(), strict=True))
    return images if span < 2**31 else images.contiguous()


def _strides(images: Tensor) -> dict[str, int]:
    return dict(zip(("stride_b", "stride_c", "stride_h", "stride_w"), images.stride(), strict=True))


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
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """Embed the patches of ``images``, prefix tokens first: (B, P + N, D) in ``out_dtype`` (default: weight's).

    images (B, C, H, W), uint8 or floating, any strides (NHWC memory is a permuted view); weight
    (D, C, p, q) with H % p == 0 and W % q == 0; bias (D,); pos_embed (1, N, D) for the patches or
    (1, P + N, D) for every row; prefix_tokens (1, P, D); mean, std (C,) float32 in units of the values
    after uint8 was scaled to 0..1. bias, pos_embed and prefix_tokens may have another floating dtype.
    ``tile`` replaces the table's choice. As fastvit.reference.patch_embed, rounded once at the end.
    """
    batch, channels, height, width = images.shape
    dim, _, p, q = weight.shape
    images = _near(images, (p, q))
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    tokens = prefix + (height // p) * (width // q)
    out = torch.empty((batch, tokens, dim), dtype=out_dtype or weight.dtype, device=images.device)
    tile = tile or choose_tile("forward", weight, batch * tokens, batch * tokens, images.dtype, weight.shape)
    args = {
        "images_ptr": images,
        "weight_ptr": weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "pos_ptr": None if pos_embed is None else pos_embed.contiguous(),
        "prefix_ptr": None if prefix_tokens is None or not prefix else prefix_tokens.contiguous(),
        "mean_ptr": mean,
        "std_ptr": std,
        "out_ptr": out,
        "M": batch * tokens,
        "D": dim,
        "tokens": tokens,
        "prefix_rows": prefix,
        "pos_rows": 0 if pos_embed is None else pos_embed.shape[1],
        "grid_w": width // q,
        **_strides(images),
        "C": channels,
        "P": p,
        "Q": q,
    }
    grid = triton.cdiv(batch * tokens, tile["block_m"]) * triton.cdiv(dim, tile["block_n"])
    launch_tile(patch_embed_forward_kernel, (grid,), tile, weight.dtype, args)
    return out


def patch_embed_weight_gradient(
    dout: Tensor,
    images: Tensor,
    weight_shape: tuple[int, int, int, int] | torch.Size,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    prefix: int,
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """dweight (D, C, p, q) float32 from dout (B, P + N, D), with P = ``prefix``, and the images of the forward.

    The patches are gathered again. The B * N rows are split over programs whose float32 partial sums
    are added in a fixed order: bit-equal from run to run on one device.
    """
    batch, channels, height, width = images.shape
    dim, _, p, q = weight_shape
    images = _near(images, (p, q))
    per_image, size = (height // p) * (width // q), channels * p * q
    patches = batch * per_image
    tile = tile or choose_tile("weight_gradient", dout, dim, patches, images.dtype, torch.Size(weight_shape))
    grid = triton.cdiv(dim, tile["block_m"]) * triton.cdiv(size, tile["block_n"])
    splits, per_split = split_rows(patches, grid, tile, dout)
    partials = torch.empty((splits, *weight_shape), dtype=torch.float32, device=dout.device)
    args = {
        "dout_ptr": dout.contiguous(),
        "images_ptr": images,
        "mean_ptr": mean,
        "std_ptr": std,
        "partials_ptr": partials,
        "patches": patches,
        "per_image": per_image,
        "patches_per_split": per_split,
        "D": dim,
        "prefix_rows": prefix,
        "grid_w": width // q,
        **_strides(images),
        "C": channels,
        "P": p,
        "Q": q,
    }
    launch_tile(patch_embed_weight_gradient_kernel, (grid, splits), tile, dout.dtype, args)
    return sum_partials(partials)


def patch_embed_row_gradients(dout: Tensor) -> Tensor:
    """dout (B, T, D) summed over the batch: (T, D) float32, bit-equal from run to run.

    Its rows are the gradients of the position embeddings and of the prefix tokens; the sum of its
    patch rows is that of the bias.
    """
    return sum_partials(dout)


def patch_embed_image_gradient(
    dout: Tensor,
    weight: Tensor,
    image_shape: tuple[int, int, int, int] | torch.Size,
    *,
    std: Tensor | None = None,
    prefix: int,
    dtype: torch.dtype,
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """dimages (B, C, H, W), contiguous, in ``dtype``, from dout (B, P + N, D), P = ``prefix``, and weight (D, C, p, q).

    A GEMM whose epilogue scatters: every pixel belongs to exactly one patch, so it is written once.
    """
    batch, channels, height, width = image_shape
    dim, _, p, q = weight.shape
    per_image, size = (height // p) * (width // q), channels * p * q
    dimages = torch.empty(image_shape, dtype=dtype, device=dout.device)
    patches = batch * per_image
    tile = tile or choose_tile("image_gradient", dout, patches, patches, dtype, weight.shape)
    args = {
        "dout_ptr": dout.contiguous(),
        "weight_ptr": weight.contiguous(),
        "std_ptr": std,
        "dimages_ptr": dimages,
        "patches": patches,
        "per_image": per_image,
        "D": dim,
        "prefix_rows": prefix,
        "grid_w": width // q,
        **_strides(dimages),
        "C": channels,
        "P": p,
        "Q": q,
    }
    grid = triton.cdiv(patches, tile["block_m"]) * triton.cdiv(size, tile["block_n"])
    launch_tile(patch_embed_image_gradient_kernel, (grid,), tile, dout.dtype, args)
    return dimages
