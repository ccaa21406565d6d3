"""The tokens between a ViT's blocks, as timm's and DINO's methods give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from fastvit.layers.packed import split
from fastvit.models import packed
from fastvit.packing import PackedImages

Images = Tensor | Sequence[Tensor] | PackedImages


def _take(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Indices of blocks from "all" (None), "the last n" (an int) or a list that may count from the end."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"the last {indices} blocks were asked for; the model has {count}")
        return list(range(count - indices, count))
    out_of_range = [i for i in indices if not -count <= i < count]
    if out_of_range or not indices:
        raise ValueError(f"block indices {out_of_range or indices} are not in {-count}..{count - 1}")
    return [i % count for i in indices]


class Intermediates(nn.Module):
    """What a ViT can do with the tokens between its blocks."""

    blocks: nn.Sequential
    fc_norm: nn.Module
    norm: nn.Module
    num_prefix_tokens: int
    reset_classifier: Any
    _grid: Any
    _run: Any
    _tokens: Any

    def forward_intermediates(
        self,
        x: Images,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """The tokens after some blocks, and the final ones.

        Args:
            x: images (B, C, H, W), or packed ones: then patch tokens are (1, N, D), those of all images, prefix tokens
                (n, P, D), the final tokens (1, total, D).
            indices: blocks to take: all (None), the last n (an int), or a list.
            return_prefix_tokens: return pairs (patch tokens, prefix tokens).
            norm: put the final norm on each.
            stop_early: don't run the blocks after the last one taken.
            output_fmt: "NCHW" (B, D, h, w) or "NLC" (B, N, D).
            intermediates_only: leave out the final tokens.
            output_dict: return a dict with "image_intermediates", "image_intermediates_prefix", "image_features".

        Returns:
            (final tokens (B, T, D), list), the list alone, or the dict.

        Raises:
            ValueError: indices or a format that don't exist.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"unknown output_fmt {output_fmt!r}; accepted: NCHW, NLC")
        taken = _take(len(self.blocks), indices)
        images = packed.images_of(cast(Any, self), x)
        if isinstance(images, PackedImages) and output_fmt == "NCHW":
            raise ValueError("packed images have no common (h, w): their tokens come with output_fmt='NLC'")
        y, told = self._tokens(images)
        found: list[Any] = []
        for i, block in enumerate(list(self.blocks)[: max(taken) + 1 if stop_early else None]):
            y = self._run(block, y, attn_mask, is_causal, told)
            if i in taken:
                found.append(split(self.norm(y) if norm else y, self.num_prefix_tokens, told.get("sequences")))
        prefix = [first for first, _ in found] if self.num_prefix_tokens else None
        outputs = [rest for _, rest in found]
        if output_fmt == "NCHW":
            h, w = self._grid(images)
            outputs = [z.reshape(z.shape[0], h, w, -1).permute(0, 3, 1, 2).contiguous() for z in outputs]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": outputs}
            if prefix is not None and return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(y)
            return result
        found = list(zip(outputs, prefix, strict=True)) if prefix is not None and return_prefix_tokens else outputs
        return found if intermediates_only else (self.norm(y), found)

    def get_intermediate_layers(
        self,
        x: Images,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list[Any]:
        """DINO's name for :meth:`forward_intermediates`: the last n blocks or those listed, NLC (NCHW: reshape)."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of ``indices``, and the norm and the head if asked; returns the indices."""
        kept = _take(len(self.blocks), indices)
        self.blocks = type(self.blocks)(*list(self.blocks)[: max(kept) + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return kept
