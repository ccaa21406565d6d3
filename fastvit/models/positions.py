"""Where the patches of a ViT's images are: rotary angles, windows and tables, as blocks read them in their context."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from fastvit.layers import Attention, Block, PatchDropout, RelativeAttention, RelativePositionBias
from fastvit.layers.token_context import Batch, Batches, TokenContext
from fastvit.ops import rope
from fastvit.packing import PackedImages

KINDS = ("learn", "learn_2d", "relative", "none", "")
PLACES = ("stem", "layers", "shared")


def check(
    kind: str,
    place: str,
    *,
    rope: float | None,
    windowed: bool,
    width: int,
    head_dim: int,
    class_token: bool,
    reg_tokens: int,
    distilled: bool,
    patch_drop_rate: float,
    dynamic_img_size: bool,
    attn_layer: bool,
) -> None:
    """Raise a ValueError that names the argument where a ViT can't have these positions.

    Args:
        kind, place: ``pos_embed`` and ``pos_embed_at``.
        windowed: whether there are biases by relative position.
        width, head_dim: D and d.
        attn_layer: whether ViT has an ``attn_layer``; the others are ViT's arguments.
    """
    dropped = f"patch_drop_rate={patch_drop_rate}"
    conflicts = {
        "dynamic_img_size": dynamic_img_size,
        "patch_drop_rate": patch_drop_rate > 0,
        "biases by relative position": windowed,
        "an attn_layer": attn_layer,
    }
    found = ", ".join(name for name, here in conflicts.items() if here)
    for wrong, message in (
        (kind not in KINDS, f"unknown pos_embed {kind!r}; accepted: {', '.join(map(repr, KINDS))}"),
        (place not in PLACES, f"unknown pos_embed_at {place!r}; accepted: {', '.join(map(repr, PLACES))}"),
        (
            place != "stem" and not kind.startswith("learn"),
            f"pos_embed_at={place!r} with pos_embed={kind!r}; accepted: 'learn' and 'learn_2d'",
        ),
        (
            kind == "learn_2d" and width % 2,
            f"pos_embed='learn_2d' has one half for each axis; embed_dim must be even, got {width}",
        ),
        (rope is not None and rope <= 0, f"rope must be the base of the periods, positive, or None, got {rope}"),
        (
            rope is not None and head_dim % 4,
            f"rope turns heads in four quarters; embed_dim / num_heads is {head_dim}, no multiple of 4",
        ),
        (
            windowed and (not class_token or reg_tokens or distilled),
            "tables of biases by relative position have rows for one class token: class_token must be True and "
            f"reg_tokens 0, got {class_token} and {reg_tokens}",
        ),
        (
            patch_drop_rate and place != "stem",
            f"{dropped} with pos_embed_at={place!r}: later blocks add positions to all patches; accepted: 'stem'",
        ),
        (patch_drop_rate and windowed, f"{dropped}: biases by relative position are for whole windows; accepted: 0"),
        (
            kind == "relative" and found,
            f"pos_embed='relative' has relative position keys for one grid: not with {found}",
        ),
    ):
        if wrong:
            raise ValueError(message)


def check_resize(model: nn.Module) -> None:
    """Raise a ValueError where a model has relative position keys, which nothing resamples."""
    if any(isinstance(module, RelativeAttention) for module in model.modules()):
        raise ValueError(
            "pos_embed='relative' has relative position keys along one sequence, and none for another grid; build the "
            "model with the other img_size"
        )


def check_blocks(blocks: nn.Sequential) -> None:
    """Raise a ValueError that names a block which takes no context."""
    for i, block in enumerate(blocks):
        if not isinstance(block, Block) or not isinstance(block.attn, Attention):
            attention = type(getattr(block, "attn", None)).__name__
            raise ValueError(
                f"blocks.{i} is a {type(block).__name__} with {attention}: rope, tables and positions go with "
                "fastvit.layers' Block or BeitBlock, and Attention or BeitAttention"
            )


def drop_patches(drop: nn.Module, x: Tensor, rotary: bool) -> tuple[Tensor, Tensor | None]:
    """Return tokens x (B, P + N, D) after patch dropout, and with ``rotary`` which patches stayed, (B, N') int64.

    Raises:
        ValueError: a module of another class with rotary angles, which must be of the patches that stay.
    """
    if not rotary or isinstance(drop, nn.Identity):
        return drop(x), None
    if not isinstance(drop, PatchDropout):
        raise ValueError(
            f"patch_drop is a {type(drop).__name__}; accepted with rope: fastvit.layers.PatchDropout, which says which "
            "patches stay"
        )
    kept = drop.draw(x)
    return drop(x, kept), kept


@torch.fx.wrap
def angles(x: Tensor, grid: tuple[int, int], head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of a grid of patches, (h * w, d), for tokens x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rope.axial(grid, head_dim, base=base, device=x.device, dtype=dtype)


def packed_angles(
    images: PackedImages, prefix: int, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of all tokens, (total, d): of patches in their own image; prefix tokens are not rotated."""
    layout, device, dtype = images.layout, images.device, torch.promote_types(dtype, torch.float32)
    place = torch.stack([layout.row, layout.column], 1).to(dtype) + 0.5
    grids = layout.sizes[layout.image] // torch.tensor(images.patch_size, device=device)
    parts = rope.angles(2 * (place / grids) - 1, head_dim, base=base)
    at, total = layout.patch_tokens(prefix), layout.image.shape[0] + len(images) * prefix
    still = (make(total, head_dim, dtype=dtype, device=device) for make in (torch.ones, torch.zeros))
    cos, sin = (whole.index_copy(0, at, part) for whole, part in zip(still, parts, strict=True))
    return cos, sin


def batches_by_size(images: PackedImages, prefix: int, shared: RelativePositionBias | None) -> Batches:
    """Return the images of each size as a batch, in the order in which sizes come."""
    counts = Counter(images.grids)  # by first appearance
    each = []
    for grid, count in counts.items():
        table = None if shared is None else shared.table_for(grid)
        each.append(Batch(count, prefix + grid[0] * grid[1], TokenContext(window=grid, rel_pos_table=table)))
    place = {grid: i for i, grid in enumerate(counts)}
    batch_of = [place[grid] for grid in images.grids]
    if batch_of == sorted(batch_of):
        return Batches(None, None, tuple(each))
    batch = torch.tensor(batch_of).to(images.device, non_blocking=True)  # on a GPU nothing waits for it
    order = batch[images.sequences(prefix).image].argsort(stable=True)
    return Batches(order, order.argsort(), tuple(each))
