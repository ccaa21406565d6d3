"""How a ViT reads images of any sizes: packed, as one sequence of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvit import ops, reference
from fastvit.layers import Attention, Block, DropPath, PatchDropout, PatchEmbed, RelativeAttention, fuse
from fastvit.layers.patch_embed import known_statistics, normalised
from fastvit.layers.resample import resample_pos_embed_at
from fastvit.packing import PackedImages, Sequences, pack

if TYPE_CHECKING:
    from fastvit.models.vit import ViT


def images_of(model: ViT, images: Any) -> Tensor | PackedImages:
    """``images`` as they are, or a list of them packed for the model's patch embedding.

    Raises:
        ValueError: an image in the list that doesn't fit; it is named by its place.
    """
    if not isinstance(images, (list, tuple)):
        return images
    embed = model.patch_embed
    if embed.dynamic_img_pad:  # with the zeros of normalised images
        dtype = next(embed.parameters()).dtype
        images = [
            normalised(image.unsqueeze(0), model.in_chans, model.mean, model.std, False, dtype).squeeze(0)
            for image in images
        ]
    return pack(images, embed.patch_size, channels=model.in_chans, pad=embed.dynamic_img_pad)


def embed(model: ViT, packed: PackedImages) -> tuple[Tensor, Sequences, Tensor | None]:
    """The tokens that enter the blocks, (1, total, D), where the images are in them, and which patch dropout left.

    Raises:
        ValueError: uint8 images without the model's mean and std, or a module that takes no packed images.
    """
    _check(model)
    layer, prefix, positions = model.patch_embed, model._prefix_tokens(), None
    if model.pos_embed is not None:
        own = model._prefix_positions()
        positions = resample_pos_embed_at(model.pos_embed, packed.layout, packed.patch_size, layer.grid_size, own)
        prefix = prefix if prefix is None or not own else prefix + model.pos_embed[:, :own]
    mean, std = known_statistics(model.mean, model.std) if packed.pixels.dtype == torch.uint8 else (None, None)
    if fuse.is_fusable(layer, PatchEmbed) and layer.fusable():
        x = ops.patch_embed_packed(
            packed, layer.proj.weight, layer.proj.bias, pos_embed=positions, prefix_tokens=prefix, mean=mean, std=std
        )
    else:
        if mean is not None and std is not None:
            dtype = next(layer.parameters()).dtype
            low, high = (torch.tensor(t, device=packed.device) for t in (mean, std))
            packed = packed.with_patches(reference.normalise_pixels(packed.patches(), low, high, dtype))
        x = layer(packed)
        x = x if positions is None else x + positions
        x = x if prefix is None else reference.with_prefix(x[0], packed.layout, prefix).unsqueeze(0)
    x, sequences, kept = model.pos_drop(x), packed.sequences(model.num_prefix_tokens), None
    if isinstance(model.patch_drop, PatchDropout):
        x, sequences, kept = model.patch_drop.of_packed(x, sequences)
    return model.norm_pre(x), sequences, kept


def _check(model: ViT) -> None:
    """Raise a ValueError that names the first module which can't know where one image ends and the next begins."""

    def refuse(name: str, why: str) -> None:
        raise ValueError(f"packed images can't pass {name}: {why}; give the model a tensor of images of one size")

    if not isinstance(model.patch_embed, PatchEmbed):
        refuse("patch_embed", f"{type(model.patch_embed).__name__} is no fastvit.layers.PatchEmbed")
    for method in ("_pos_embed", "_positions", "_prefix_tokens"):
        if not model._unchanged(method):
            refuse(method, "it is overridden")
    if model.pos_embed_2d is not None or model.layer_pos_embed is not None:
        refuse("pos_embed", "only one table at the stem has rows for images of any size")
    drop = model.patch_drop
    if type(drop) not in (PatchDropout, torch.nn.Identity):
        refuse("patch_drop", f"{type(drop).__name__} is no fastvit.layers.PatchDropout")
    if isinstance(drop, PatchDropout) and drop.training and drop.prob:
        if not fuse.is_fusable(drop, PatchDropout):
            refuse("patch_drop", "it has hooks")
        if not model._unchanged("forward_features"):
            refuse("patch_drop", "forward_features is overridden, which can't say which patches stayed")
        if model.windowed:
            refuse("patch_drop", "biases by relative position are for whole windows")
    for i, block in enumerate(model.blocks):
        if not isinstance(block, Block):
            refuse(f"blocks.{i}", f"{type(block).__name__} is no fastvit.layers.Block")
        if not isinstance(block.attn, Attention):
            refuse(f"blocks.{i}.attn", f"{type(block.attn).__name__} is no fastvit.layers.Attention")
        if isinstance(block.attn, RelativeAttention):
            refuse(f"blocks.{i}.attn", "its keys of distances are for sequences of one length")
        for name in ("drop_path1", "drop_path2"):
            drop = getattr(block, name)
            if not isinstance(drop, (DropPath, torch.nn.Identity)):
                refuse(f"blocks.{i}.{name}", f"{type(drop).__name__} is no fastvit.layers.DropPath")
