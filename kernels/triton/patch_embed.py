"""Patch embedding as one GEMM that gathers its own patches, and its gradients.

    out[b, P + n] = patch(b, n) W^T + bias + pos        out[b, t] = prefix[t] + pos for t < P

with patch(b, n) the K = C * p * q pixels of patch n (equation 1 of Dosovitskiy et al. 2021), so a strided convolution
without an im2col buffer. K runs in the weight's own order, k = (c * p + i) * q + j: the weight is read as it lies, and
in an NCHW image each (c, i) is a run of q pixels that goes on in the next patch, which is the next row of the tile. In
an NHWC image one line serves C values of c, and the later ones find it in the cache: device memory is read once either
way.

A row of every tile is a patch. In a batch (B, C, H, W) arithmetic finds its pixels. Packed images of any sizes lie end
to end in one buffer, and tables hold each patch's image and its place in that image's grid: no padding, no loop over
images, the same code for every mix of sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.packing import Layout
from fastvit.triton import tiles
from fastvit.triton.launch import architecture, dot, launch, multiprocessors, narrow, precision, store
from fastvit.triton.reduce import sum_partials


@triton.constexpr_function
def _power_of_two(n):
    """Return the largest power of two that divides n."""
    return n & -n


@triton.jit
def _locate(
    rows,  # (ROWS,) patches
    row_mask,  # (ROWS,)
    per_image,  # patches of an image, as the two below: None for packed images
    grid_w,  # patches side by side
    strides,  # (image, channel, line, pixel)
    layout,  # None, or of packed images (starts (n,) int64, sizes (n, 2), image, row and column (N,) int32)
    P: tl.constexpr,
    Q: tl.constexpr,
):
    """Return (image (ROWS,), first pixel (ROWS, 1) int64, steps to the next channel, line and pixel) of patches.

    The steps are int32: scalars, or (ROWS, 1) where every image has a size of its own.
    """
    if layout is None:
        image, patch = rows // per_image, rows % per_image
        y, x = (patch // grid_w) * P, (patch % grid_w) * Q
        first = image.to(tl.int64) * strides[0] + y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
        plane, line, step = strides[1], strides[2], strides[3]
    else:
        image = tl.load(layout[2] + rows, row_mask, other=0)
        height, width = tl.load(layout[1] + 2 * image), tl.load(layout[1] + 2 * image + 1)
        y, x = tl.load(layout[3] + rows, row_mask, other=0), tl.load(layout[4] + rows, row_mask, other=0)
        first = tl.load(layout[0] + image) + y.to(tl.int64) * P * width + x * Q
        # Images are whole patches: every distance is a multiple of Q, which lets a load take several pixels.
        multiple: tl.constexpr = _power_of_two(Q)
        first = tl.multiple_of(first, multiple)
        plane = tl.multiple_of(height * width, multiple)[:, None]
        line = tl.multiple_of(width, multiple)[:, None]
        step = 1
    return image, first[:, None], plane, line, step


@triton.jit
def _pixel_offsets(k, plane, line, step, P: tl.constexpr, Q: tl.constexpr):
    """Return the offset of pixel k = (c * P + i) * Q + j from a patch's first: int32 (see ``_near``)."""
    return (k // (P * Q))[None, :] * plane + (k // Q % P)[None, :] * line + (k % Q)[None, :] * step


@triton.jit
def _patches(
    images_ptr,  # (B, C, H, W), any strides, or packed (S,); uint8 or floating
    mean_ptr,  # (C,) float32 or None
    std_ptr,  # (C,) float32 or None
    first,  # (ROWS, 1) int64
    plane,
    line,
    step,
    row_mask,  # (ROWS,)
    k,  # (COLUMNS,)
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Load the (ROWS, COLUMNS) tile of patches in DTYPE: uint8 scaled to 0..1, then (value - mean) / std in float32."""
    k_mask = k < C * P * Q
    pixels = images_ptr + first + _pixel_offsets(k, plane, line, step, P, Q)
    values = tl.load(pixels, row_mask[:, None] & k_mask[None, :], other=0)
    if values.dtype == tl.uint8 or mean_ptr is not None or std_ptr is not None:
        # One multiply-add a pixel: the divisions are done once a column.
        scale = tl.full(k.shape, 1 / 255 if values.dtype == tl.uint8 else 1.0, tl.float32)
        shift = tl.zeros(k.shape, tl.float32)
        if mean_ptr is not None:
            shift -= tl.load(mean_ptr + k // (P * Q), k_mask, other=0.0)
        if std_ptr is not None:
            std = tl.load(std_ptr + k // (P * Q), k_mask, other=1.0)
            scale, shift = scale / std, shift / std
        values = values.to(tl.float32) * scale[None, :] + shift[None, :]
    return values if values.dtype == DTYPE else narrow(values.to(tl.float32), DTYPE)


@triton.jit(do_not_specialize=["M", "per_image", "prefix_rows", "pos_rows", "grid_w"])
def patch_embed_forward_kernel(
    images_ptr,  # (B, C, H, W), any strides, or packed (S,); uint8 or floating
    weight_ptr,  # (D, C * P * Q)
    bias_ptr,  # (D,) or None
    pos_ptr,  # (pos_rows, D) or None: for the last pos_rows tokens of an image; (M, D) for packed images
    prefix_ptr,  # (prefix_rows, D) or None
    mean_ptr,  # (C,) float32 or None
    std_ptr,  # (C,) float32 or None
    out_ptr,  # (M + B * prefix_rows, D)
    M,  # patches
    D,
    per_image,  # see _locate, as grid_w, strides and layout
    grid_w,
    prefix_rows,
    pos_rows,
    strides,
    layout,
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
    image, first, plane, line, step = _locate(rows, row_mask, per_image, grid_w, strides, layout, P, Q)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        dtype: tl.constexpr = weight_ptr.dtype.element_ty
        a = _patches(images_ptr, mean_ptr, std_ptr, first, plane, line, step, row_mask, k, C, P, Q, dtype)
        w = tl.load(weight_ptr + n[None, :] * K + k[:, None], n_mask[None, :] & (k < K)[:, None], other=0.0)
        acc = dot(a, w, acc, PRECISION)

    mask = row_mask[:, None] & n_mask[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, n_mask, other=0.0).to(tl.float32)[None, :]
    if pos_ptr is not None:
        position = rows % per_image if layout is None else rows.to(tl.int64)
        if layout is None and prefix_ptr is not None:
            position += pos_rows - per_image
        acc += tl.load(pos_ptr + position[:, None] * D + n[None, :], mask, other=0.0).to(tl.float32)
    tokens = rows.to(tl.int64)
    if prefix_ptr is not None:
        tokens += (image + 1).to(tl.int64) * prefix_rows
    out = out_ptr + tokens[:, None] * D + n[None, :]
    store(out, acc, mask)
    if prefix_ptr is not None:
        # The program that has an image's first patch writes the prefix rows before it.
        if layout is None:
            begins = row_mask & (rows % per_image == 0)
        else:
            begins = row_mask & (image != tl.load(layout[2] + rows - 1, row_mask & (rows > 0), other=-1))
        if tl.max(begins.to(tl.int32), 0) > 0:
            for t in range(prefix_rows):
                prefix = tl.load(prefix_ptr + t * D + n, n_mask, other=0.0).to(tl.float32)
                if pos_ptr is not None and layout is None:  # packed: the prefix has its positions already
                    pos_mask = n_mask & (pos_rows > per_image)
                    prefix += tl.load(pos_ptr + t * D + n, pos_mask, other=0.0).to(tl.float32)
                value = tl.broadcast_to(prefix[None, :], (BLOCK_M, BLOCK_N))
                store(out + (t - prefix_rows) * D, value, begins[:, None] & n_mask[None, :])


@triton.jit(do_not_specialize=["M", "per_image", "rows_per_split", "prefix_rows", "grid_w"])
def patch_embed_weight_gradient_kernel(
    dout_ptr,  # (B, prefix_rows + per_image, D), or of packed images (M, D), their patches alone
    images_ptr,  # (B, C, H, W), any strides, or packed (S,); uint8 or floating
    mean_ptr,  # (C,) float32 or None
    std_ptr,  # (C,) float32 or None
    partials_ptr,  # (splits, D, C * P * Q) float32
    M,  # patches
    D,
    rows_per_split,
    per_image,  # see _locate, as grid_w, strides and layout
    grid_w,
    prefix_rows,
    strides,
    layout,
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
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        mask = rows < end
        image, first, plane, line, step = _locate(rows, mask, per_image, grid_w, strides, layout, P, Q)
        dout_rows = rows + prefix_rows  # past the prefix rows of this image, and of those before
        if layout is None:
            dout_rows += image * prefix_rows
        dout = tl.load(
            dout_ptr + dout_rows.to(tl.int64)[:, None] * D + d[None, :], mask[:, None] & d_mask[None, :], other=0.0
        )
        a = _patches(images_ptr, mean_ptr, std_ptr, first, plane, line, step, mask, k, C, P, Q, dout.dtype)
        acc = dot(tl.trans(dout), a, acc, PRECISION)

    partial = partials_ptr + split.to(tl.int64) * D * K + d[:, None] * K + k[None, :]
    tl.store(partial, acc, d_mask[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["M", "per_image", "prefix_rows", "grid_w"])
def patch_embed_image_gradient_kernel(
    dout_ptr,  # (B, prefix_rows + per_image, D)
    weight_ptr,  # (D, C * P * Q)
    std_ptr,  # (C,) float32 or None
    dimages_ptr,  # (B, C, H, W)
    M,  # patches
    D,
    per_image,  # see _locate, as grid_w and strides
    grid_w,
    prefix_rows,
    strides,
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
    row_mask, k_mask = rows < M, k < K
    image, first, plane, line, step = _locate(rows, row_mask, per_image, grid_w, strides, None, P, Q)
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
    pixels = dimages_ptr + first + _pixel_offsets(k, plane, line, step, P, Q)
    store(pixels, acc, row_mask[:, None] & k_mask[None, :])


def _choose_tile(
    kernel: str, like: Tensor, size: int, patches: int, pixels: torch.dtype, weight: Sequence[int]
) -> dict[str, Any]:
    """Return the table's tile for ``kernel``, or the first derived one that ``size`` output rows are enough for."""

    def derived() -> dict[str, Any]:
        table = tiles.rows("patch_embed", architecture(like), like.dtype)
        return next(row for row in table if row["kernel"] == kernel and size >= row["min_size"])

    return tiles.choose(
        "patch_embed", like, like.dtype, patches, derived,
        kernel=kernel, pixels="uint8" if pixels == torch.uint8 else "floating",
        dim=weight[0], channels=weight[1], patch_height=weight[2], patch_width=weight[3],
    )  # fmt: skip


def _launch(kernel: Any, grid: tuple[int, ...], tile: dict[str, Any], dtype: torch.dtype, args: dict[str, Any]) -> None:
    blocks = {name.upper(): tile[name] for name in ("block_m", "block_n", "block_k")}
    launch(kernel, grid, {**args, **blocks, "PRECISION": precision(dtype)}, tile=tile, hot=dtype != torch.float32)


def _near(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return ``images``, copied if one patch spans 2^31 values or more: within a patch the kernels count in int32."""
    last = (0, images.shape[1] - 1, patch[0] - 1, patch[1] - 1)
    span = sum(i * stride for i, stride in zip(last, images.stride(), strict=True))
    return images if span < 2**31 else images.contiguous()


def _places(images: Tensor, weight: Sequence[int], layout: Layout | None = None) -> dict[str, Any]:
    """Return the arguments that tell a kernel where patches are: images (B, C, H, W), or packed (S,) by ``layout``."""
    _, channels, p, q = weight
    patch = {"C": channels, "P": p, "Q": q}
    if layout is not None:
        tables = tuple(t.contiguous() for t in (layout.starts, layout.sizes, layout.image, layout.row, layout.column))
        return {"M": layout.image.shape[0], "per_image": 0, "grid_w": 0, "strides": None, "layout": tables, **patch}
    batch, _, height, width = images.shape
    per_image, grid_w = (height // p) * (width // q), width // q
    grid = {"M": batch * per_image, "per_image": per_image, "grid_w": grid_w}
    return {**grid, "strides": images.stride(), "layout": None, **patch}


def patch_embed_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: Layout | None = None,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """Embed the patches of ``images``, each image's after the prefix tokens: (B, P + N, D), packed (1, N + n * P, D).

    Args:
        images: (B, C, H, W) with H % p == 0 and W % q == 0, uint8 or floating, any strides (NHWC memory is a permuted
            view); or packed (S,), n images (C, H, W) of whole patches, one after the other, N patches in all.
        weight: (D, C, p, q).
        bias: (D,) or None. bias, pos_embed and prefix_tokens may have another floating dtype than the weight.
        layout: of packed images.
        pos_embed: (1, N, D) for the patches or (1, P + N, D) for every row; packed (N, D).
        prefix_tokens: (1, P, D).
        mean, std: (C,) float32 in units of the values after uint8 was scaled to 0..1.
        out_dtype: of the result, which is rounded once, at the end; by default the weight's.
        tile: in place of the table's: block_m, block_n, block_k, warps, stages.
    """
    dim, _, p, q = weight.shape
    images = _near(images, (p, q)) if layout is None else images.contiguous()
    places = _places(images, weight.shape, layout)
    patches, prefix = places["M"], 0 if prefix_tokens is None else prefix_tokens.shape[1]
    batch = images.shape[0] if layout is None else layout.starts.shape[0]
    shape = (batch, prefix + places["per_image"], dim) if layout is None else (1, batch * prefix + patches, dim)
    out = torch.empty(shape, dtype=out_dtype or weight.dtype, device=images.device)
    tile = tile or _choose_tile("forward", weight, patches, patches, images.dtype, weight.shape)
    args = {
        "images_ptr": images,
        "weight_ptr": weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "pos_ptr": None if pos_embed is None else pos_embed.contiguous(),
        "prefix_ptr": None if prefix_tokens is None or not prefix else prefix_tokens.contiguous(),
        "mean_ptr": mean,
        "std_ptr": std,
        "out_ptr": out,
        "D": dim,
        "prefix_rows": prefix,
        "pos_rows": 0 if pos_embed is None or layout is not None else pos_embed.shape[1],
        **places,
    }
    grid = triton.cdiv(patches, tile["block_m"]) * triton.cdiv(dim, tile["block_n"])
    _launch(patch_embed_forward_kernel, (grid,), tile, weight.dtype, args)
    return out


def patch_embed_weight_gradient(
    dout: Tensor,
    images: Tensor,
    weight_shape: Sequence[int],
    *,
    layout: Layout | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    prefix: int = 0,
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """Return dweight (D, C, p, q) float32 from dout (B, P + N, D), P = ``prefix``, and the images of the forward.

    For packed images dout is (N, D), of the patches alone. The patches are gathered again. They are split over programs
    whose float32 partial sums are added in a fixed order: bit-equal from run to run on one device.
    """
    dim, channels, p, q = weight_shape
    images = _near(images, (p, q)) if layout is None else images.contiguous()
    places = _places(images, weight_shape, layout)
    patches = places["M"]
    tile = tile or _choose_tile("weight_gradient", dout, dim, patches, images.dtype, weight_shape)
    if layout is not None and images.dtype == torch.uint8:
        # The pixels' places are read in the loop. Pipelined, they lose what is known of their alignment, and Triton 3.6
        # then fails to compile: it asks for asynchronous copies of single bytes, which don't exist.
        tile = {**tile, "stages": 1}
    grid = triton.cdiv(dim, tile["block_m"]) * triton.cdiv(channels * p * q, tile["block_n"])
    # Enough splits for two programs on every multiprocessor, none shorter than eight steps.
    steps = triton.cdiv(patches, tile["block_k"])
    splits = max(min(triton.cdiv(2 * multiprocessors(dout), grid), steps // 8), 1)
    per_split = triton.cdiv(steps, splits) * tile["block_k"]
    splits = max(triton.cdiv(patches, max(per_split, 1)), 1)
    partials = torch.empty((splits, *weight_shape), dtype=torch.float32, device=dout.device)
    args = {
        "dout_ptr": dout.contiguous(),
        "images_ptr": images,
        "mean_ptr": mean,
        "std_ptr": std,
        "partials_ptr": partials,
        "D": dim,
        "rows_per_split": per_split,
        "prefix_rows": prefix,
        **places,
    }
    _launch(patch_embed_weight_gradient_kernel, (grid, splits), tile, dout.dtype, args)
    return sum_partials(partials)


def patch_embed_row_gradients(dout: Tensor) -> Tensor:
    """Return dout (B, T, D) summed over the batch: (T, D) float32, bit-equal from run to run.

    Its rows are the gradients of the position embeddings and of the prefix tokens; the sum of its
    patch rows is that of the bias.
    """
    return sum_partials(dout)


def patch_embed_image_gradient(
    dout: Tensor,
    weight: Tensor,
    image_shape: Sequence[int],
    *,
    std: Tensor | None = None,
    prefix: int,
    dtype: torch.dtype,
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """Return dimages (B, C, H, W), contiguous, in ``dtype``, from dout (B, P + N, D), P = ``prefix``, and the weight.

    A GEMM whose epilogue scatters: every pixel belongs to exactly one patch, so it is written once.
    """
    dim, channels, p, q = weight.shape
    dimages = torch.empty(image_shape, dtype=dtype, device=dout.device)
    places = _places(dimages, weight.shape)
    patches = places["M"]
    del places["layout"]
    tile = tile or _choose_tile("image_gradient", dout, patches, patches, dtype, weight.shape)
    args = {
        "dout_ptr": dout.contiguous(),
        "weight_ptr": weight.contiguous(),
        "std_ptr": std,
        "dimages_ptr": dimages,
        "D": dim,
        "prefix_rows": prefix,
        **places,
    }
    grid = triton.cdiv(patches, tile["block_m"]) * triton.cdiv(channels * p * q, tile["block_n"])
    _launch(patch_embed_image_gradient_kernel, (grid,), tile, dout.dtype, args)
    return dimages
