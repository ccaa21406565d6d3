"""The size of the images that weights are for, from the rows of their positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastvit.checkpoints.resample import window_of


def image_arguments(state: Mapping[str, Tensor], options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Arguments of :class:`fastvit.ViT`, img_size and no_embed_class, as far as weights under timm's names tell them.

    Args:
        state: the weights.
        options: what is said of the model; "img_size" goes before a square.
        name: of the file, for messages.

    Raises:
        ValueError: the positions, or the tables of relative ones, fit no grid.
    """
    p, q = state["patch_embed.proj.weight"].shape[2:]
    if "pos_embed" in state:
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        prefix = registers + ("cls_token" in state) + ("dist_token" in state)
        return _grid(state["pos_embed"].shape[1], prefix, (p, q), options, name)
    tables = [value for key, value in state.items() if key.endswith("relative_position_bias_table")]
    return {"img_size": _size(tables[0].shape[0], (p, q), options, name)} if tables else {}


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
