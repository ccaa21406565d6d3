"""The tokens between a ViT's blocks, as timm's and DINO's methods return them."""

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
    """Return the tokens after some blocks in timm's forms; see :meth:`fastvit.ViT.forward_intermediates`.

    Args:
        found: (prefix tokens (B, P, D), patch tokens (B, N, D)) of each.
        final: all tokens after the last norm, or None to leave them out.
        grid: (h, w), to return patch tokens as (B, D, h, w).
        return_prefix_tokens: return pairs (patch tokens, prefix tokens).
        output_dict: return a dict instead.
    """
    prefix, patches = [first for first, _ in found], [rest for _, rest in found]
    if grid is not None:
        patches = [z.reshape(z.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous() for z in patches]
    if output_dict:
        prefixes = {"image_intermediates_prefix": prefix} if return_prefix_tokens else {}
        features = {} if final is None else {"image_features": final}
        return {"image_intermediates": patches, **prefixes, **features}
    outputs: list[Any] = list(zip(patches, prefix, strict=True)) if return_prefix_tokens else patches
    return outputs if final is None else (final, outputs)
