"""What the shapes of tensors tell of attention: its heads, and its positions with the size of images they are for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastvit.checkpoints.rules import blocks
from fastvit.layers.resample import window_of


def heads_of(state: Mapping[str, Tensor]) -> int | None:
    """How many attention heads weights under timm's names have, where any tensor tells; None where none does.

    Keys of distances and tables of biases have a row or column for each head; the norm of queries is as wide as one.
    """
    attn = "blocks.0.attn"
    if f"{attn}.rel_pos_keys" in state:
        return state[f"{attn}.rel_pos_keys"].shape[0]
    for table in (f"{attn}.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table"):
        if table in state:
            return state[table].shape[1]
    if f"{attn}.q_norm.weight" in state:
        return state[f"{attn}.qkv.weight"].shape[0] // (3 * state[f"{attn}.q_norm.weight"].shape[0])
    return None


def position_arguments(
    state: Mapping[str, Tensor], patch: tuple[int, int], options: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """What :class:`fastvit.ViT` is told of positions for weights under timm's names: "pos_embed", and where that tells
    it "img_size" and "no_embed_class".

    Args:
        state: the weights.
        patch: pixels of one, (height, width), through a backbone too.
        options: what is said of the model; "img_size" goes before a square.
        name: of the file, for messages.

    Raises:
        ValueError: the positions, or the tables of relative ones, fit no grid.
    """
    kind, rows = _kind(state, patch)
    said = {**options, **kind}
    if rows:
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        prefix = registers + ("cls_token" in state) + ("dist_token" in state)
        return kind | _grid(rows, prefix, patch, said, name)
    tables = [value for key, value in state.items() if key.endswith("relative_position_bias_table")]
    return kind | ({"img_size": _size(tables[0].shape[0], patch, options, name)} if tables else {})


def _kind(state: Mapping[str, Tensor], patch: tuple[int, int]) -> tuple[dict[str, Any], int]:
    """What kind of position embeddings there are, and of how many tokens; see fastvit.layers.pos_embed."""
    if "pos_embed" in state:
        return {"pos_embed": "learn"}, state["pos_embed"].shape[1]
    if "blocks.0.attn.rel_pos_keys" in state:
        return {"pos_embed": "relative"}, (state["blocks.0.attn.rel_pos_keys"].shape[1] + 1) // 2
    for at in ("pos_embed_2d", "layer_pos_embed"):
        shapes = {key.removeprefix(f"{at}."): value.shape for key, value in state.items() if key.startswith(f"{at}.")}
        if not shapes:
            continue
        tables, prefix = next(iter(shapes.values()))[0], shapes["prefix"][1] if "prefix" in shapes else 0
        place = "stem" if at == "pos_embed_2d" else "layers" if tables == len(list(blocks(state))) else "shared"
        if "patches" in shapes:
            return {"pos_embed": "learn", "pos_embed_at": place}, prefix + shapes["patches"][1]
        h, w = shapes["y"][1], shapes["x"][1]
        size = h * patch[0], w * patch[1]
        return {"pos_embed": "learn_2d", "pos_embed_at": place, "img_size": size}, prefix + h * w
    return {"pos_embed": "none"}, 0


def _size(rows: int, patch: tuple[int, int], options: Mapping[str, Any], name: str) -> tuple[int, int]:
    """The image size that tables of relative positions are for: what is said of the image, else a square."""
    size: Any = options.get("img_size")
    height, width = size if isinstance(size, Sequence) else (size, size)
    try:
        h, w = window_of(rows, None if size is None else (height // patch[0], width // patch[1]))
    except ValueError as error:
        raise ValueError(f"{name} has {error}: give img_size=") from error
    return h * patch[0], w * patch[1]


def _grid(rows: int, prefix: int, patch: tuple[int, int], options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The image size, and whether prefix tokens have positions: from what is said of the image, else a square."""
    size = options.get("img_size")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        patches = (height // patch[0]) * (width // patch[1])
        if rows - patches in (0, prefix):
            return {"img_size": size, "no_embed_class": bool(prefix) and rows == patches}
    for no_embed_class in (False, True) if prefix else (False,):
        patches = rows - (0 if no_embed_class else prefix)
        side = math.isqrt(max(patches, 0))
        if side and side * side == patches:
            return {"img_size": (side * patch[0], side * patch[1]), "no_embed_class": no_embed_class}
    raise ValueError(f"{name} has {rows} positions, {prefix} of them for prefix tokens, on no square: give img_size=")
