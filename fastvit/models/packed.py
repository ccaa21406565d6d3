"""How a ViT reads images of any sizes: packed, as one sequence of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import ops, reference
from fastvit.layers import Attention, Block, DropPath, PatchDropout, PatchEmbed, RelativeAttention, fuse
from fastvit.layers.patch_embed import Statistics, is_fused, known_statistics, normalised
from fastvit.layers.resample import resample_pos_embed_at
from fastvit.packing import PackedImages, pack


def pack_for(embed: Any, images: Sequence[Tensor], channels: int, mean: Statistics, std: Statistics) -> PackedImages:
    """Return a list of images packed for the patch embedding ``embed``.

    Raises:
        ValueError: an image that doesn't fit; the message names it by its place.
    """
    if embed.dynamic_img_pad:  # with the zeros of normalised images
        dtype = next(embed.parameters()).dtype
        images = [normalised(image.unsqueeze(0), channels, mean, std, dtype).squeeze(0) for image in images]
    return pack(images, embed.patch_size, channels=channels, pad=embed.dynamic_img_pad)


def embed(
    layer: Any,
    images: PackedImages,
    pos_embed: Tensor | None,
    prefix_positions: int,
    prefix: Tensor | None,
    mean: Statistics,
    std: Statistics,
) -> Tensor:
    """Return the tokens of packed images, (1, total, D).

    Args:
        layer: the patch embedding.
        pos_embed: (1, prefix_positions + N, D) for the layer's grid, resampled for each image's.
        prefix: (1, P, D), put before the patches of each image.
        mean, std: of uint8 pixels.
    """
    positions = None
    if pos_embed is not None:
        grid, own = layer.grid_size, prefix_positions
        positions = resample_pos_embed_at(pos_embed, images.layout, images.patch_size, grid, own)
        prefix = prefix if prefix is None or not own else prefix + pos_embed[:, :own]
    mean, std = known_statistics(mean, std) if images.pixels.dtype == torch.uint8 else (None, None)
    if is_fused(layer):
        return ops.patch_embed_packed(
            images, layer.proj.weight, layer.proj.bias, pos_embed=positions, prefix_tokens=prefix, mean=mean, std=std
        )
    if mean is not None and std is not None:
        dtype = next(layer.parameters()).dtype
        low, high = (torch.tensor(t, device=images.device) for t in (mean, std))
        images = images.with_patches(reference.normalise_pixels(images.patches(), low, high, dtype))
    x: Tensor = layer(images)
    x = x if positions is None else x + positions
    return x if prefix is None else reference.with_prefix(x[0], images.layout, prefix).unsqueeze(0)


def check(
    patch_embed: nn.Module, drop: nn.Module, blocks: nn.Sequential, *, overridden: str, tables: bool, windowed: bool
) -> None:
    """Raise a ValueError that names the first module which can't know where one image ends and the next begins.

    Args:
        overridden: name of a method that a subclass overrides, or "".
        tables: whether positions are in other tables than one at the stem.
        windowed: whether there are biases by relative position.
    """

    def refuse(name: str, why: str) -> None:
        raise ValueError(f"packed images can't pass {name}: {why}; give the model a tensor of images of one size")

    if not isinstance(patch_embed, PatchEmbed):
        refuse("patch_embed", f"{type(patch_embed).__name__} is no fastvit.layers.PatchEmbed")
    if overridden and overridden != "forward_features":
        refuse(overridden, "it is overridden")
    if tables:
        refuse("pos_embed", "only one table at the stem has rows for images of any size")
    if type(drop) not in (PatchDropout, nn.Identity):
        refuse("patch_drop", f"{type(drop).__name__} is no fastvit.layers.PatchDropout")
    if isinstance(drop, PatchDropout) and drop.training and drop.prob:
        if not fuse.is_fusable(drop, PatchDropout):
            refuse("patch_drop", "it has hooks")
        if overridden:
            refuse("patch_drop", "forward_features is overridden, which can't say which patches stayed")
        if windowed:
            refuse("patch_drop", "biases by relative position are for whole windows")
    for i, block in enumerate(blocks):
        if not isinstance(block, Block):
            refuse(f"blocks.{i}", f"{type(block).__name__} is no fastvit.layers.Block")
        if not isinstance(block.attn, Attention):
            refuse(f"blocks.{i}.attn", f"{type(block.attn).__name__} is no fastvit.layers.Attention")
        if isinstance(block.attn, RelativeAttention):
            refuse(f"blocks.{i}.attn", "its relative position keys are for sequences of one length")
        for name in ("drop_path1", "drop_path2"):
            drop = getattr(block, name)
            if not isinstance(drop, (DropPath, nn.Identity)):
                refuse(f"blocks.{i}.{name}", f"{type(drop).__name__} is no fastvit.layers.DropPath")
