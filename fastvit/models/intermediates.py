"""The tokens between a ViT's blocks: which blocks, and in which shape they are returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def select_blocks(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Return indices of blocks from "all" (None), "the last n" (an int) or a list that may count from the end."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"indices={indices}: the model has {count} blocks; accepted: 1 to {count}, or a list")
        return list(range(count - indices, count))
    out_of_range = [i for i in indices if not -count <= i < count]
    if out_of_range or not indices:
        raise ValueError(f"block indices {out_of_range or indices} are not in {-count}..{count - 1}")
    return [i % count for i in indices]


def arrange(
    found: list[tuple[Tensor, Tensor]],
    final: Tensor | None,
    grid: tuple[int, int] | None,
    return_prefix_tokens: bool,
    output_dict: bool,
) -> Any:
    """Return what ``ViT.forward_intermediates`` returns, timm's tuple, list or dict.

    Args:
        found: (prefix tokens (B, P, D), patch tokens (B, N, D)) after each block that is taken.
        final: the tokens after the last norm (B, T, D), or None to leave them out.
        grid: (h, w), to return patch tokens as (B, D, h, w).
    """
    prefixes, patches = [first for first, _ in found], [rest for _, rest in found]
    if grid is not None:
        patches = [z.reshape(z.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous() for z in patches]
    return_prefix_tokens = return_prefix_tokens and prefixes[0].shape[1] > 0
    if output_dict:
        result: dict[str, Any] = {"image_intermediates": patches}
        if return_prefix_tokens:
            result["image_intermediates_prefix"] = prefixes
        return result if final is None else {**result, "image_features": final}
    taken: list[Any] = list(zip(patches, prefixes, strict=True)) if return_prefix_tokens else patches
    return taken if final is None else (final, taken)
