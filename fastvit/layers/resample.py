"""Weights for another size: position embeddings, patch projections and image channels."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.ops.library import autocast_dtype
from fastvit.packing import Layout

Pair = tuple[int, int]


@torch.fx.wrap
def resample_pos_embed(
    pos_embed: Tensor,
    new_size: Pair,
    old_size: Pair | None = None,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Return position embeddings for another grid, interpolated in 2-D (section 3.2 of the ViT paper), with gradients.

    Args:
        pos_embed: (1, P + h * w, D), the grid in row-major order.
        new_size: (h', w').
        old_size: (h, w); by default the grid is square.
        num_prefix_tokens: P leading rows that are kept as they are.
        interpolation, antialias: as in F.interpolate; timm's defaults.

    Returns:
        (1, P + h' * w', D) in the dtype of ``pos_embed``, interpolated in float32 at least.

    Raises:
        ValueError: the rows are not a grid of ``old_size``.
    """
    rows = pos_embed.shape[1] - num_prefix_tokens
    if old_size is None:
        side = math.isqrt(max(rows, 0))
        old_size = (side, side)
    if rows < 1 or old_size[0] * old_size[1] != rows:
        raise ValueError(
            f"pos_embed has {pos_embed.shape[1]} rows, {num_prefix_tokens} of them for prefix tokens: "
            f"the other {rows} are no {old_size[0]}x{old_size[1]} grid"
        )
    if old_size[0] == new_size[0] and old_size[1] == new_size[1]:
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = grid.unflatten(1, old_size).permute(0, 3, 1, 2).to(torch.promote_types(pos_embed.dtype, torch.float32))
    grid = F.interpolate(grid, size=new_size, mode=interpolation, antialias=antialias)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def resample_pos_embed_at(
    pos_embed: Tensor, layout: Layout, patch_size: Pair, old_size: Pair, num_prefix_tokens: int
) -> Tensor:
    """Return :func:`resample_pos_embed` for every patch of packed images, each for the grid of its own image.

    Interpolation is linear, so it is one product: each patch's weights (along both axes) with the embeddings. Grids are
    values of tensors here: any mix of them takes the same few operations, and the gradient is a product too.

    Args:
        pos_embed: (1, P + h * w, D), the grid of ``old_size`` = (h, w) in row-major order.
        layout: of N patches of ``patch_size``.
        num_prefix_tokens: P leading rows, which are left out.

    Returns:
        (N, D) in the dtype of ``pos_embed``, interpolated in float32 at least.
    """
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    p, q = patch_size
    height, width = layout.sizes[layout.image].unbind(1)
    down = _bicubic_weights(layout.row, height // p, old_size[0], dtype)
    across = _bicubic_weights(layout.column, width // q, old_size[1], dtype)
    weights = (down.unsqueeze(2) * across.unsqueeze(1)).flatten(1)  # (N, h * w)
    with torch.autocast(pos_embed.device.type, enabled=False) if autocast_dtype(pos_embed.device) else nullcontext():
        return (weights @ pos_embed[0, num_prefix_tokens:].to(dtype)).to(pos_embed.dtype)


def _bicubic_weights(place: Tensor, size: Tensor, old_size: int, dtype: torch.dtype) -> Tensor:
    """Return the weights (N, old_size) of F.interpolate, antialiased, at ``place`` of ``size``.

    Keys' cubic convolution (1981) with a = -1/2, stretched where samples become fewer, cut off at the border.
    """
    scale = old_size / size.to(dtype)
    centre = scale * (place + 0.5)
    samples = torch.arange(old_size, device=place.device) + 0.5
    x = (samples - centre.unsqueeze(1)).abs() / scale.clamp(min=1.0).unsqueeze(1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


@torch.fx.wrap
def resample_rel_pos_table(table: Tensor, new_window: Pair, old_window: Pair) -> Tensor:
    """Return BEiT's table of biases by relative position for another window of patches, with gradients.

    Near distances stay apart as they are and far ones are stretched, in a geometric progression, as in BEiT's own
    fine-tuning and timm's ``resize_rel_pos_bias_table``, of which this is the linear interpolation.

    Args:
        table: ((2h-1)(2w-1) [+3], H); three rows more are the class token's, and stay.
        new_window, old_window: (h', w') and (h, w), in patches.

    Returns:
        ((2h'-1)(2w'-1) [+3], H) in the dtype of ``table``, interpolated in float32 at least.

    Raises:
        ValueError: the rows are none of such a window.
    """
    if new_window[0] == old_window[0] and new_window[1] == old_window[1]:
        return table
    height, width = 2 * old_window[0] - 1, 2 * old_window[1] - 1
    if table.shape[0] - height * width not in (0, 3):
        raise ValueError(
            f"a table of {table.shape[0]} relative positions is none of {old_window[0]}x{old_window[1]} patches, which "
            f"have {height * width}, or {height * width + 3} with a class token"
        )
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    grid, rest = wide[: height * width].unflatten(0, (height, width)), table[height * width :]
    down, across = (_stretched(*sizes, wide) for sizes in zip(new_window, old_window, strict=True))
    grid = torch.tensordot(across, torch.tensordot(down, grid, dims=1), dims=([1], [1])).transpose(0, 1)
    return torch.cat([grid.flatten(0, 1).to(table.dtype), rest])


def window_of(rows: int, likely: Pair | None = None) -> Pair:
    """Return the window (h, w) of patches of a table of relative positions: the likely one, else a square.

    Args:
        rows: of the table, three of them the class token's.
        likely: (h, w) that is taken where it has so many.

    Raises:
        ValueError: there is no such square.
    """
    if likely is not None and (2 * likely[0] - 1) * (2 * likely[1] - 1) == rows - 3:
        return likely
    side = math.isqrt(max(rows - 3, 0))
    if side % 2 == 0 or side * side != rows - 3:
        raise ValueError(f"a table of {rows} relative positions, 3 of them the class token's, is of no square window")
    return (side + 1) // 2, (side + 1) // 2


def _stretched(new: int, old: int, like: Tensor) -> Tensor:
    """Return the weights of the distances of ``old`` patches at those of ``new`` ones: (2 new - 1, 2 old - 1)."""
    if old == 1:
        return like.new_ones(2 * new - 1, 1)
    low, high, ratio = 1.01, 1.5, 1.25  # of the progression, which ends at the farthest of the new ones if it can
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio ** (old - 1)) / (1 - ratio) > new - 1 else (ratio, high)
    far = list(itertools.accumulate(ratio**i for i in range(old - 1)))
    places = torch.tensor([-x for x in reversed(far)] + [0.0, *far], dtype=like.dtype, device=like.device)
    distances = torch.arange(1 - new, new, dtype=like.dtype, device=like.device)
    right = torch.bucketize(distances, places).clamp(1, 2 * old - 2)
    share = ((distances - places[right - 1]) / (places[right] - places[right - 1])).clamp(0, 1).unsqueeze(1)
    weights = like.new_zeros(2 * new - 1, 2 * old - 1)
    weights = weights.scatter(1, right.unsqueeze(1), share)
    return weights.scatter(1, right.unsqueeze(1) - 1, 1 - share)


def resample_patch_embed(weight: Tensor, new_size: Pair) -> Tensor:
    """Return a patch projection for another patch size, by pseudo-inverse resize (Beyer et al., "FlexiViT", 2023).

    Resizing a patch is a matrix B; the new weights are pinv(B^T) w, so that tokens of resized patches change least.

    Args:
        weight: (D, C, p, q).
        new_size: (p', q').

    Returns:
        (D, C, p', q') in the dtype of ``weight``.
    """
    old_size = (weight.shape[2], weight.shape[3])
    if old_size == tuple(new_size):
        return weight
    pixels = old_size[0] * old_size[1]
    basis = torch.eye(pixels, device=weight.device).reshape(pixels, 1, *old_size)
    resize = F.interpolate(basis, size=tuple(new_size), mode="bicubic", antialias=True).flatten(1).T  # (p'q', pq)
    new = weight.flatten(2).to(resize.dtype) @ torch.linalg.pinv(resize)
    return new.unflatten(2, tuple(new_size)).to(weight.dtype)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Return a patch projection (D, C, p, q) for another number of channels, (D, channels, p, q).

    One channel sums the file's; more repeat them, scaled so that the tokens keep their size.
    """
    own = weight.shape[1]
    if channels == own:
        return weight
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, -(-channels // own), 1, 1)[:, :channels] * (own / channels)
