"""Attention's weights from its saved log-sum-exp: some of their rows, and how far the heads look.

With the log-sum-exp of every row, a weight is one exponential of one score: no row needs its maximum or its sum, so
every tile of weights stands for itself. :func:`attention_rows` writes the tiles of some rows; each program owns one.
:func:`attention_distance` sums every weight times the distance of its two patches as the tiles go by, and writes one
number for a block of rows: T x T is never in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.triton.attention import in_units
from fastvit.triton.attention_scores import LOG2_E
from fastvit.triton.attention_tiles import head_rows, load_rows, pick_rows, products
from fastvit.triton.launch import launch, pieces, precision
from fastvit.triton.reduce import sum_partials

# By element size. Sixteen rows are the fewest that a product takes: the class token's with 15 others left out.
_TILES = {2: {"rows": 64, "keys": 64, "head_piece": 64}, 4: {"rows": 32, "keys": 32, "head_piece": 16}}


@triton.jit
def _weights(
    q,
    k,
    lse,  # (BLOCK_M,) natural
    bias,  # (BLOCK_M, BLOCK_N) or broadcast to it
    start,
    keys,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return exp(scale q k^T + bias - lse) for BLOCK_N keys from start: (BLOCK_M, BLOCK_N) float32; 0 without a key."""
    s = products(q, load_rows(k, start, keys, BLOCK_N, DIM, PIECES, True), BLOCK_M, BLOCK_N, PRECISION)
    p = tl.math.exp2(s * (scale * LOG2_E) + (bias - lse[:, None]) * LOG2_E)
    return tl.where((lse == float("-inf"))[:, None], 0.0, p)


@triton.jit(do_not_specialize=["heads", "queries", "keys", "count"])
def attention_rows_kernel(
    q_ptr,  # (B, Tq, H, d)
    k_ptr,  # (B, Tk, H, d)
    lse_ptr,  # (B, H, Tq) float32
    rows_ptr,  # (R,) int64, from the end where negative
    bias_ptr,  # (B, H, R, Tk) float32, or None
    out_ptr,  # (B, H, R, Tk) float32
    q_strides,  # (image, token, head) / UNIT
    k_strides,
    bias_strides,  # (image, head, row, key), 0 where it is broadcast; or None
    heads,  # H
    queries,  # Tq
    keys,  # Tk
    count,  # R
    scale,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,  # d
    PIECES: tl.constexpr,  # d cut into powers of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(count, BLOCK_M)
    row = tl.program_id(0) // blocks  # image * H + head
    places = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * BLOCK_N
    q = head_rows(q_ptr, q_strides, row // heads, row % heads, UNIT)
    k = head_rows(k_ptr, k_strides, row // heads, row % heads, UNIT)

    chosen = tl.load(rows_ptr + places, mask=places < count, other=0)
    chosen = tl.where(chosen < 0, chosen + queries, chosen)
    inside = (places < count) & (chosen >= 0) & (chosen < queries)  # no other memory is read, whatever the row
    columns = start + tl.arange(0, BLOCK_N)
    written = (places < count)[:, None] & (columns < keys)[None, :]
    bias = tl.full((1, 1), 0.0, tl.float32)
    if bias_ptr is not None:
        own = bias_ptr + (row // heads).to(tl.int64) * bias_strides[0] + (row % heads).to(tl.int64) * bias_strides[1]
        at = places.to(tl.int64)[:, None] * bias_strides[2] + columns.to(tl.int64)[None, :] * bias_strides[3]
        bias = tl.load(own + at, mask=written, other=0.0)
    row = row.to(tl.int64)
    lse = tl.load(lse_ptr + row * queries + chosen, mask=inside, other=float("nan"))
    tile = pick_rows(q, chosen, inside, DIM, PIECES)
    p = _weights(tile, k, lse, bias, start, keys, scale, BLOCK_M, BLOCK_N, DIM, PIECES, PRECISION)
    tl.store(out_ptr + (row * count + places[:, None]) * keys + columns[None, :], p, mask=written)


@triton.jit
def _places(patch, width, step_down, step_across):
    """Return the corners of patches (N,) int32: exact below 2^22, without the registers of an integer's division."""
    patch = patch.to(tl.float32)
    line = tl.floor((patch + 0.5) * (1.0 / width))
    return line * step_down, (patch - line * width) * step_across


@triton.jit(do_not_specialize=["heads", "patches", "tokens"])
def attention_distance_kernel(
    q_ptr,  # (B, N, H, d): of the patches, as k
    k_ptr,  # (B, N, H, d)
    lse_ptr,  # (B, H, T) float32, at the first patch
    partials_ptr,  # (blocks, B, H) float32
    q_strides,  # (image, token, head) / UNIT
    k_strides,
    heads,  # H
    patches,  # N
    tokens,  # T
    width,  # of the grid, in patches; float, as what follows
    step_down,  # height of a patch
    step_across,  # and its width
    scale,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,  # d
    PIECES: tl.constexpr,  # d cut into powers of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(patches, BLOCK_M)
    row = tl.program_id(0) // blocks  # image * H + head
    block = tl.program_id(0) % blocks
    q = head_rows(q_ptr, q_strides, row // heads, row % heads, UNIT)
    k = head_rows(k_ptr, k_strides, row // heads, row % heads, UNIT)
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + row.to(tl.int64) * tokens + place, mask=place < patches, other=float("-inf"))
    tile = load_rows(q, block * BLOCK_M, patches, BLOCK_M, DIM, PIECES, True)

    down, across = _places(place, width, step_down, step_across)
    bias = tl.full((1, 1), 0.0, tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    for start in range(0, patches, BLOCK_N):
        p = _weights(tile, k, lse, bias, start, patches, scale, BLOCK_M, BLOCK_N, DIM, PIECES, PRECISION)
        other = start + tl.arange(0, BLOCK_N)
        y, x = _places(other, width, step_down, step_across)
        y, x = down[:, None] - y[None, :], across[:, None] - x[None, :]
        total += tl.sum(tl.where((other < patches)[None, :], p * tl.sqrt(y * y + x * x), 0.0), 1)
    rows = tl.num_programs(0) // blocks  # B * H
    tl.store(partials_ptr + block.to(tl.int64) * rows + row, tl.sum(total, 0) / patches)


def _constants(q: Tensor, owned: int) -> dict[str, Any]:
    """Return the constants of both kernels for ``owned`` rows of each head of q (B, T, H, d)."""
    tile, head_dim = _TILES[q.element_size()], q.shape[3]
    if head_dim > 128:
        raise ValueError(f"attention kernels take a head dim of 1 to 128, got {head_dim}")
    return {
        "DIM": head_dim,
        "PIECES": pieces(head_dim, 16, tile["head_piece"]),
        "BLOCK_M": min(tile["rows"], max(triton.next_power_of_2(owned), 16)),
        "BLOCK_N": tile["keys"],
        "PRECISION": precision(q.dtype),
    }


def attention_rows(
    q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, scale: float, *, bias: Tensor | None = None
) -> Tensor:
    """Compute some rows of the attention weights, exp(scale q[rows] k^T + bias - lse[rows]).

    Args:
        q: (B, Tq, H, d) float16, bfloat16 or float32, d from 1 to 128.
        k: (B, Tk, H, d) in q's dtype. The last dimension of both is contiguous, other strides are free.
        lse: (B, H, Tq) float32 contiguous, as :func:`fastvit.triton.attention.attention_forward` returns it.
        rows: (R,) int64, from -Tq to Tq - 1; a row outside that is NaN, and no other memory is touched.
        scale: factor of the scores.
        bias: (B, H, R, Tk) float32 of any strides, of these rows; -inf where a key is absent.

    Returns:
        (B, H, R, Tk) float32; a row with no key (lse -inf) is 0.

    Raises:
        ValueError: the head dim is above 128.
    """
    batch, queries, heads, _ = q.shape
    keys, count = k.shape[1], rows.shape[0]
    out = torch.empty((batch, heads, count, keys), device=q.device, dtype=torch.float32)
    constants = _constants(q, count)
    args = {
        **in_units(q=q, k=k),
        "lse_ptr": lse,
        "rows_ptr": rows,
        "bias_ptr": bias,
        "bias_strides": None if bias is None else bias.stride(),
        "out_ptr": out,
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "count": count,
        "scale": float(scale),
        **constants,
    }
    grid = (triton.cdiv(count, constants["BLOCK_M"]) * batch * heads, triton.cdiv(keys, constants["BLOCK_N"]))
    launch(attention_rows_kernel, grid, args, hot=q.dtype != torch.float32)
    return out


def attention_distance(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, grid: Sequence[int], patch_size: Sequence[float]
) -> Tensor:
    """Compute the mean over the patches i of sum_j p_ij distance(i, j) for each head, j over the patches.

    Args:
        q, k: (B, T, H, d) float16, bfloat16 or float32, d from 1 to 128, unit last stride. The last h * w tokens are
            the patches, in raster order.
        lse: (B, H, T) float32 contiguous, over all tokens as keys.
        scale: factor of the scores.
        grid: (h, w), in patches, from one to 2^22.
        patch_size: (height, width) of a patch, the unit of the distance between centres.

    Returns:
        (B, H) float32.

    Raises:
        ValueError: the head dim is above 128.
    """
    batch, tokens, heads, _ = q.shape
    patches = grid[0] * grid[1]
    prefix = tokens - patches
    constants = _constants(q, patches)
    blocks = triton.cdiv(patches, constants["BLOCK_M"])
    partials = torch.empty((blocks, batch, heads), device=q.device, dtype=torch.float32)
    args = {
        **in_units(q=q[:, prefix:], k=k[:, prefix:]),
        "lse_ptr": lse[..., prefix:],
        "partials_ptr": partials,
        "heads": heads,
        "patches": patches,
        "tokens": tokens,
        "width": float(grid[1]),
        "step_down": float(patch_size[0]),
        "step_across": float(patch_size[1]),
        "scale": float(scale),
        **constants,
    }
    launch(attention_distance_kernel, (blocks * batch * heads,), args, hot=q.dtype != torch.float32)
    return sum_partials(partials)
