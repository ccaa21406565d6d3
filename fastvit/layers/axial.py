"""Attention along one axis of a grid (Ho et al., "Axial Attention in Multidimensional Transformers", 2019)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastvit import ops
from fastvit.layers import fuse
from fastvit.layers.attention import Attention, Window, head_norm
from fastvit.layers.fuse import Merge
from fastvit.layers.packed import leading
from fastvit.layers.positions import Positions
from fastvit.packing import Sequences


class AxialAttention(Attention):
    """Self-attention of each patch with the patches of its row, or of its column, alone; keys of :class:`Attention`.

    Args:
        dim: width D of the tokens.
        num_heads: heads H.
        columns: whether it goes along columns.
        **options: as in :class:`Attention`.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, columns: bool = False, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.columns = columns

    def branch(
        self,
        x: Tensor,
        norm: nn.Module | None = None,
        merge: Merge | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        tokens: int | None = None,
        sequences: Sequences | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """As :meth:`Attention.branch`, of tokens x (B, h * w, D) that are the patches of ``positions.window`` = (h, w).

        Raises:
            ValueError: no window, a mask, or packed images.
        """
        window = None if positions is None else positions.window
        if window is None or attn_mask is not None or is_causal or sequences is not None:
            raise ValueError("attention along rows or columns takes one grid of patches, and no mask or packed images")
        qkv = self._lines(self._project_in(x, norm), window).unflatten(-1, (3, self.num_heads, self.head_dim))
        options = self._options(qkv, None, False, None)
        if options is not None and fuse.is_identity(self.q_norm) and fuse.is_identity(self.k_norm):
            out: Any = ops.attention_qkvpacked(qkv, **options)
        else:
            q, k, v = qkv.unbind(2)
            q, k = head_norm(self.q_norm, q), head_norm(self.k_norm, k)
            out = self._attend(q, k, v, None, False) if options is None else ops.attention(q, k, v, **options)
        return self._project(leading(self._patches(out, window), tokens, None), merge)

    def _lines(self, x: Tensor, window: Window) -> Tensor:
        """x (B, h * w, C) -> rows (B * h, w, C) or columns (B * w, h, C)."""
        x = x.unflatten(1, window)
        return (x.transpose(1, 2) if self.columns else x).flatten(0, 1)

    def _patches(self, x: Tensor, window: Window) -> Tensor:
        """Rows (B * h, w, H, d) or columns (B * w, h, H, d) -> (B, h * w, H, d)."""
        x = x.unflatten(0, (-1, window[1] if self.columns else window[0]))
        return (x.transpose(1, 2) if self.columns else x).flatten(1, 2)
