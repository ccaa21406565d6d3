"""The context of the tokens x: masks, positions and sequences in one tuple, which each layer passes to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastvit.packing import Sequences


class Batch(NamedTuple):
    """Some of the images that are packed in a row, all of one size."""

    images: int
    tokens: int  # of each
    context: TokenContext  # the window and the table of that size


class Batches(NamedTuple):
    """Packed images of several sizes as one batch for each size."""

    order: Tensor | None  # (total,) int64: the tokens batch by batch; None where they lie so
    back: Tensor | None  # (total,) int64: from that order to the packed one
    each: tuple[Batch, ...]


class TokenContext(NamedTuple):
    """Masks, positions and sequences of tokens x (B, T, D), or (1, total, D) where images are packed."""

    attn_mask: Tensor | None = None  # as in F.scaled_dot_product_attention, broadcasts to (B, H, T, T)
    is_causal: bool = False
    sequences: Sequences | None = None  # where each packed image lies; it attends to itself alone
    rope: tuple[Tensor, Tensor] | None = None  # (cos, sin) of the patches, as ops.rotate takes them
    window: tuple[int, int] | None = None  # (h, w): the grid of the patches, where layers depend on it
    rel_pos_table: Tensor | None = None  # biases by relative position in that window, which all blocks share
    batches: Batches | None = None  # packed images by size, where each size has a window of its own
    layer_pos_embed: tuple[Tensor, ...] = ()  # (T, D) that each block adds to its input; one where all share it
    keep: int | None = None  # the block computes only the first so many tokens of each image; None: all

    def masks_alone(self) -> bool:
        """Return whether there is at most a mask, which any block of timm's signature takes."""
        return (
            self.sequences is None
            and self.rope is None
            and self.window is None
            and self.batches is None
            and len(self.layer_pos_embed) == 0  # Dynamo traces no `not` of a tuple
            and self.keep is None
        )


NO_CONTEXT = TokenContext()


def with_masks(context: TokenContext, attn_mask: Tensor | None, is_causal: bool) -> TokenContext:
    """Return the context of a call with timm's arguments, which replace its masks unless both are left out."""
    if attn_mask is not None or is_causal:
        return context._replace(attn_mask=attn_mask, is_causal=is_causal)
    return context


def arguments(context: TokenContext) -> dict[str, Any]:
    """Return the keyword arguments that carry a context: none, timm's masks, or ``context`` for a block of ours."""
    if not context.masks_alone():
        return {"context": context}
    if context.attn_mask is None and not context.is_causal:
        return {}
    return {"attn_mask": context.attn_mask, "is_causal": context.is_causal}
