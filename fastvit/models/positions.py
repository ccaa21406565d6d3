"""Where the tokens of a ViT's images are, for models whose attention asks: DINOv3's rotations, BEiT's windows."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.layers import Attention, Block, PatchDropout, Positions, RelativeAttention
from fastvit.layers.positions import Batch, Batches
from fastvit.ops import rope
from fastvit.packing import PackedImages

if TYPE_CHECKING:
    from fastvit.models.vit import ViT


def check(model: ViT, head_dim: int, patch_drop_rate: float, pos_embed_at: str = "stem") -> None:
    """Raise a ValueError that names what a model's rope or tables of biases can't be with; it has no layers yet."""
    if model.rope is not None and model.rope <= 0:
        raise ValueError(f"rope must be the base of the periods, positive, or None, got {model.rope}")
    if model.rope is not None and head_dim % 4:
        raise ValueError(f"rope turns heads in four quarters; embed_dim / num_heads is {head_dim}, no multiple of 4")
    if model.windowed and (not model.has_class_token or model.num_prefix_tokens != 1):
        raise ValueError(
            "tables of biases by relative position have rows for one class token: class_token must be True and "
            f"reg_tokens 0, got {model.has_class_token} and {model.num_reg_tokens}"
        )
    if patch_drop_rate and pos_embed_at != "stem":
        raise ValueError(
            f"patch_drop_rate={patch_drop_rate} with pos_embed_at={pos_embed_at!r}: later blocks add positions to all "
            "patches; accepted: 'stem'"
        )
    if patch_drop_rate and model.windowed:
        raise ValueError(
            f"patch_drop_rate={patch_drop_rate}: biases by relative position are for whole windows; accepted: 0"
        )


def check_relative(model: ViT, other_attention: bool) -> None:
    """Raise a ValueError that names what keys of distances, which are for sequences of one length, are not with."""
    given = {
        "dynamic_img_size": model.dynamic_img_size,
        "patch_drop_rate": isinstance(model.patch_drop, PatchDropout),
        "biases by relative position": model.windowed,
        "an attn_layer": other_attention,
    }
    if wrong := [name for name, here in given.items() if here]:
        raise ValueError(f"pos_embed='relative' has keys for the distances in one grid: not with {', '.join(wrong)}")


def check_resize(model: ViT) -> None:
    """Raise a ValueError where a model has keys of distances, which nothing resamples."""
    if any(isinstance(module, RelativeAttention) for module in model.modules()):
        raise ValueError(
            "pos_embed='relative' has keys for the distances along one sequence, which another grid has not; build the "
            "model with the other img_size"
        )


def told(model: ViT) -> bool:
    """Whether blocks are told where their tokens are."""
    return model.rope is not None or model.windowed or model.layer_pos_embed is not None


def check_blocks(model: ViT) -> None:
    """Raise a ValueError that names a block which asks for no positions, where the model has some for it."""
    if not told(model):
        return
    for i, block in enumerate(model.blocks):
        if not isinstance(block, Block) or not isinstance(block.attn, Attention):
            attention = type(getattr(block, "attn", None)).__name__
            raise ValueError(
                f"blocks.{i} is a {type(block).__name__} with {attention}: rope, tables and positions go with "
                "fastvit.layers' Block or BeitBlock, and Attention or BeitAttention"
            )


def _head_dim(model: ViT) -> int:
    attention: Any = model.blocks[0].attn
    return int(attention.head_dim)


@torch.fx.wrap
def _turned(x: Tensor, grid: tuple[int, int], head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """(cos, sin) of a grid of patches, (h * w, d), for tokens x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rope.axial(grid, head_dim, base=base, device=x.device, dtype=dtype)


def drop_patches(model: ViT, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Patch dropout of tokens x (B, P + N, D); and which patches stayed, (B, N') int64, where rope asks; None: all.

    Raises:
        ValueError: a module of another class in a model with rope, which wouldn't know whose angles are whose.
    """
    drop = model.patch_drop
    if model.rope is None or isinstance(drop, torch.nn.Identity):
        return drop(x), None
    if not isinstance(drop, PatchDropout):
        raise ValueError(
            f"patch_drop is a {type(drop).__name__}; accepted with rope: fastvit.layers.PatchDropout, which says which "
            "patches stay"
        )
    kept = drop.draw(x)
    return drop(x, kept), kept


def of_grid(model: ViT, x: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> Positions:
    """Positions of tokens x (B, P + h * w, D), whose patches are a grid of (h, w), or those ``kept`` of it (B, N)."""
    angles = None
    if model.rope is not None:
        cos, sin = _turned(x, grid, _head_dim(model), model.rope)
        angles = (cos, sin) if kept is None else (cos[kept], sin[kept])
    table = None if model.rel_pos_bias is None else model.rel_pos_bias.table_for(grid)
    added: tuple[Tensor, ...] = ()
    if model.layer_pos_embed is not None:  # 0 for prefix tokens that have no positions
        without = model.num_prefix_tokens - model._prefix_positions()
        tables = F.pad(model.layer_pos_embed(grid), (0, 0, without, 0))
        added = tuple(tables[i] for i in range(model.layer_pos_embed.tables))
    return Positions(angles, grid if model.windowed else None, table, added=added)


def of_packed(model: ViT, x: Tensor, images: PackedImages, kept: Tensor | None = None) -> Positions:
    """Positions of packed tokens x (1, total, D), or where patches were dropped, of those ``kept`` of them (total,)."""
    turned = None
    if model.rope is not None:
        turned = _turned_packed(images, model.num_prefix_tokens, _head_dim(model), model.rope, x.dtype)
        turned = turned if kept is None else (turned[0][kept], turned[1][kept])
    return Positions(turned, batches=_batches(model, images) if model.windowed else None)


def _turned_packed(
    images: PackedImages, prefix: int, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of all tokens, (total, d): patches turned as in their own image, prefix tokens not at all."""
    layout, device, dtype = images.layout, images.device, torch.promote_types(dtype, torch.float32)
    place = torch.stack([layout.row, layout.column], 1).to(dtype) + 0.5
    grids = layout.sizes[layout.image] // torch.tensor(images.patch_size, device=device)
    angles = rope.angles(2 * (place / grids) - 1, head_dim, base=base)
    at, total = layout.patch_tokens(prefix), layout.image.shape[0] + len(images) * prefix
    still = (whole(total, head_dim, dtype=dtype, device=device) for whole in (torch.ones, torch.zeros))
    cos, sin = (whole.index_copy(0, at, part) for whole, part in zip(still, angles, strict=True))
    return cos, sin


def _batches(model: ViT, images: PackedImages) -> Batches:
    """The images of each size as a batch, in the order in which sizes come."""
    prefix, shared = model.num_prefix_tokens, model.rel_pos_bias
    counts = Counter(images.grids)  # by first appearance
    each = []
    for grid, count in counts.items():
        table = None if shared is None else shared.table_for(grid)
        each.append(Batch(count, prefix + grid[0] * grid[1], Positions(window=grid, table=table)))
    place = {grid: i for i, grid in enumerate(counts)}
    batch_of = [place[grid] for grid in images.grids]
    if batch_of == sorted(batch_of):
        return Batches(None, None, tuple(each))
    batch = torch.tensor(batch_of).to(images.device, non_blocking=True)  # on a GPU nothing waits for it
    order = batch[images.sequences(prefix).image].argsort(stable=True)
    return Batches(order, order.argsort(), tuple(each))
