"""Patch embedding of images of any sizes, packed end to end, and its weight's gradient: one launch for all images.

The products of patch_embed.py with rows that know their image. A row is a patch. Three tables say whose it is and where
in that image's grid it lies, two more where the image begins in the one buffer of pixels and how large it is: so a row
has a first pixel and strides of its own. No padding, no loop over images, the same code for every mix of sizes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.triton.launch import dot, store
from fastvit.triton.patch_embed import choose_tile, launch_tile, normalised, split_rows
from fastvit.triton.reduce import sum_partials


@triton.constexpr_function
def _power_of_two(n):
    """The largest that divides n."""
    return n & -n


@triton.jit
def _places(
    starts_ptr,  # (n,) int64
    sizes_ptr,  # (n, 2) int32
    image_ptr,  # (N,) int32
    row_ptr,  # (N,) int32
    column_ptr,  # (N,) int32
    rows,  # (ROWS,)
    row_mask,  # (ROWS,)
    P: tl.constexpr,
    Q: tl.constexpr,
):
    """(image, first, plane, line) of patches, (ROWS,) each: whose they are, where the first pixel is, and how far it is
    to the next channel and to the next line.
    """
    image = tl.load(image_ptr + rows, row_mask, other=0)
    height, width = tl.load(sizes_ptr + 2 * image), tl.load(sizes_ptr + 2 * image + 1)
    y, x = tl.load(row_ptr + rows, row_mask, other=0), tl.load(column_ptr + rows, row_mask, other=0)
    first = tl.load(starts_ptr + image) + y.to(tl.int64) * P * width + x * Q
    # Images are whole patches: every distance is a multiple of Q, which lets a load take several pixels.
    multiple: tl.constexpr = _power_of_two(Q)
    return (
        image,
        tl.multiple_of(first, multiple),
        tl.multiple_of(height * width, multiple),
        tl.multiple_of(width, multiple),
    )


@triton.jit
def _patches(
    pixels_ptr,  # (S,) uint8 or floating
    mean_ptr,  # (C,) float32 or None
    std_ptr,  # (C,) float32 or None
    first,  # (ROWS,) int64
    plane,  # (ROWS,) int32
    line,  # (ROWS,) int32
    row_mask,  # (ROWS,)
    k,  # (COLUMNS,)
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The (ROWS, COLUMNS) tile of patches in DTYPE, normalised. One image is fewer than 2^31 values."""
    k_mask = k < C * P * Q
    channel, i, j = (k // (P * Q))[None, :], (k // Q % P)[None, :], (k % Q)[None, :]
    offsets = channel * plane[:, None] + i * line[:, None] + j
    values = tl.load(pixels_ptr + first[:, None] + offsets, row_mask[:, None] & k_mask[None, :], other=0)
    return normalised(values, mean_ptr, std_ptr, k, k_mask, P * Q, DTYPE)


@triton.jit(do_not_specialize=["M", "prefix_rows"])
def patch_embed_packed_forward_kernel(
    pixels_ptr,  # (S,) uint8 or floating
    weight_ptr,  # (D, C * P * Q)
    bias_ptr,  # (D,) or None
    pos_ptr,  # (M, D) or None
    prefix_ptr,  # (prefix_rows, D) or None
    mean_ptr,  # (C,) float32 or None
    std_ptr,  # (C,) float32 or None
    starts_ptr,  # (n,) int64
    sizes_ptr,  # (n, 2) int32
    image_ptr,  # (M,) int32
    row_ptr,  # (M,) int32
    column_ptr,  # (M,) int32
    out_ptr,  # (M + n * prefix_rows, D)
    M,  # patches
    D,
    prefix_rows,
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
    image, first, plane, line = _places(starts_ptr, sizes_ptr, image_ptr, row_ptr, column_ptr, rows, row_mask, P, Q)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        dtype: tl.constexpr = weight_ptr.dtype.element_ty
        a = _patches(pixels_ptr, mean_ptr, std_ptr, first, plane, line, row_mask, k, C, P, Q, dtype)
        w = tl.load(weight_ptr + n[None, :] * K + k[:, None], n_mask[None, :] & (k < K)[:, None], other=0.0)
        acc = dot(a, w, acc, PRECISION)

    mask = row_mask[:, None] & n_mask[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, n_mask, other=0.0).to(tl.float32)[None, :]
    if pos_ptr is not None:
        acc += tl.load(pos_ptr + rows.to(tl.int64)[:, None] * D + n[None, :], mask, other=0.0).to(tl.float32)
    tokens = rows.to(tl.int64) + (image + 1).to(tl.int64) * prefix_rows
    out = out_ptr + tokens[:, None] * D + n[None, :]
    store(out, acc, mask)
    if prefix_ptr is not None:
        # Whoever has an image's first patch writes the prefix rows before it.
        before = tl.load(image_ptr + rows - 1, row_mask & (rows > 0), other=-1)
        heads = row_mask & (image != before)
        if tl.max(heads.to(tl.int32), 0) > 0:
            for t in range(prefix_rows):
                prefix = tl.load(prefix_ptr + t * D + n, n_mask, other=0.0).to(tl.float32)
                value = tl.broadcast_to(prefix[None, :], (BLOCK_M, BLOCK_N))
                store(out + (t - prefix_rows) * D, value, heads[:, None] & n_mask[None, :])


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def patch_embed_packed_weight_gradient_kernel(
    dout_ptr,  # (M, D): of the patches
    pixels_ptr,  # (S,) uint8 or floating
    mean_ptr,  # (C,) float32 or None
    std_ptr,  # (C,) float32 or None
    starts_ptr,  # (n,) int64
    sizes_ptr,  # (n, 2) int32
    image_ptr,  # (M,) int32
    row_ptr,  # (M,) int32
    column_ptr,  # (M,) int32
    partials_ptr,  # (splits, D, C * P * Q) float32
    M,
    rows_per_split,
    D,
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
        dout = tl.load(
            dout_ptr + rows.to(tl.int64)[:, None] * D + d[None, :], mask[:, None] & d_mask[None, :], other=0.0
        )
        _, first, plane, line = _places(starts_ptr, sizes_ptr, image_ptr, row_ptr, column_ptr, rows, mask, P, Q)
        a = _patches(pixels_ptr, mean_ptr, std_ptr, first, plane, line, mask, k, C, P, Q, dout.dtype)
        acc = dot(tl.trans(dout), a, acc, PRECISION)

    partial = partials_ptr + split.to(tl.int64) * D * K + d[:, None] * K + k[None, :]
    tl.store(partial, acc, d_mask[:, None] & (k < K)[None, :])


Layout = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _tables(layout: Layout) -> dict[str, Tensor]:
    starts, sizes, _, image, row, column = layout
    tables = {"starts": starts, "sizes": sizes, "image": image, "row": row, "column": column}
    return {f"{name}_ptr": table.contiguous() for name, table in tables.items()}


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
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """Embed N patches of n images, each image's after its own prefix tokens: (1, N + n * P, D).

    pixels (S,) uint8 or floating: images (C, H, W) of whole patches, one after the other; weight (D, C, p, q); bias
    (D,); layout = (starts (n,) int64, sizes (n, 2), cu_patches (n + 1,), image, row, column (N,), all int32), as
    fastvit.packing.Layout; pos_embed (N, D); prefix_tokens (1, P, D); the rest as in patch_embed_forward.
    """
    (dim, channels, p, q), images, patches = weight.shape, layout[0].shape[0], layout[3].shape[0]
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    tokens = patches + images * prefix
    out = torch.empty((1, tokens, dim), dtype=out_dtype or weight.dtype, device=pixels.device)
    tile = tile or choose_tile("forward", weight, patches, patches, pixels.dtype, weight.shape)
    args = {
        "pixels_ptr": pixels.contiguous(),
        "weight_ptr": weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "pos_ptr": None if pos_embed is None else pos_embed.contiguous(),
        "prefix_ptr": None if prefix_tokens is None or not prefix else prefix_tokens.contiguous(),
        "mean_ptr": mean,
        "std_ptr": std,
        **_tables(layout),
        "out_ptr": out,
        "M": patches,
        "D": dim,
        "prefix_rows": prefix,
        "C": channels,
        "P": p,
        "Q": q,
    }
    grid = triton.cdiv(patches, tile["block_m"]) * triton.cdiv(dim, tile["block_n"])
    launch_tile(patch_embed_packed_forward_kernel, (grid,), tile, weight.dtype, args)
    return out


def patch_embed_packed_weight_gradient(
    dout: Tensor,
    pixels: Tensor,
    weight_shape: tuple[int, int, int, int] | torch.Size,
    layout: Layout,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    tile: dict[str, Any] | None = None,
) -> Tensor:
    """dweight (D, C, p, q) float32 from dout (N, D), of the patches alone, and the pixels of the forward.

    The patches are gathered again; as patch_embed_weight_gradient, bit-equal from run to run.
    """
    dim, channels, p, q = weight_shape
    patches = dout.shape[0]
    tile = tile or choose_tile("weight_gradient", dout, dim, patches, pixels.dtype, torch.Size(weight_shape))
    if pixels.dtype == torch.uint8:
        # The pixels' places are read in the loop. Pipelined, they lose what is known of their alignment, and Triton 3.6
        # then fails to compile: it asks for asynchronous copies of single bytes, which don't exist.
        tile = {**tile, "stages": 1}
    grid = triton.cdiv(dim, tile["block_m"]) * triton.cdiv(channels * p * q, tile["block_n"])
    splits, per_split = split_rows(patches, grid, tile, dout)
    partials = torch.empty((splits, *weight_shape), dtype=torch.float32, device=dout.device)
    args = {
        "dout_ptr": dout.contiguous(),
        "pixels_ptr": pixels.contiguous(),
        "mean_ptr": mean,
        "std_ptr": std,
        **_tables(layout),
        "partials_ptr": partials,
        "M": patches,
        "rows_per_split": per_split,
        "D": dim,
        "C": channels,
        "P": p,
        "Q": q,
    }
    launch_tile(patch_embed_packed_weight_gradient_kernel, (grid, splits), tile, dout.dtype, args)
    return sum_partials(partials)
