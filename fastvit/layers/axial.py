"""Attention along one axis of a grid (Ho et al., "Axial Attention in Multidimensional Transformers", 2019)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastvit import ops
from fastvit.layers import fuse
from fastvit.layers.attention import Attention, Window
from fastvit.layers.fuse import Residual
from fastvit.layers.packed import leading
from fastvit.layers.token_context import NO_CONTEXT, TokenContext


@fuse.branch
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
        residual: Residual | None = None,
        context: TokenContext = NO_CONTEXT,
    ) -> Tensor:
        """As :meth:`Attention.branch`, of tokens x (B, h * w, D) that are the patches of ``context.window`` = (h, w).

        Raises:
            ValueError: no window, a mask, or packed images.
        """
        window = context.window
        if window is None or context.attn_mask is not None or context.is_causal or context.sequences is not None:
            raise ValueError("attention along rows or columns takes one grid of patches, and no mask or packed images")
        qkv = self._lines(self._project(x, norm), window)
        options = self._fused_options(qkv, NO_CONTEXT)
        if options is not None and self._is_plain(NO_CONTEXT):
            out = self._fused(ops.attention_qkvpacked, [qkv], qkv[:, :, 0], options, {}, None)
        else:
            out = self._attend(*self._rotated(qkv, NO_CONTEXT), options, {}, NO_CONTEXT)
        out = leading(self._patches(out, window), context.keep).flatten(2)
        return fuse.linear(self.proj, out, norm=self.norm, dropout=self.proj_drop, residual=residual)

    def heads(self, x: Tensor, norm: nn.Module | None, context: TokenContext) -> tuple[Tensor, Tensor, Tensor]:
        """Raise a TypeError: there is no attention of all tokens."""
        raise TypeError(
            "attention along rows and columns has no map of T x T weights; accepted: attention of all tokens"
        )

    def _lines(self, x: Tensor, window: Window) -> Tensor:
        """Return the rows (B * h, w, ...) or columns (B * w, h, ...) of x (B, h * w, ...)."""
        x = x.unflatten(1, window)
        return (x.transpose(1, 2) if self.columns else x).flatten(0, 1)

    def _patches(self, x: Tensor, window: Window) -> Tensor:
        """Return rows (B * h, w, H, d) or columns (B * w, h, H, d) as patches (B, h * w, H, d)."""
        x = x.unflatten(0, (-1, window[1] if self.columns else window[0]))
        return (x.transpose(1, 2) if self.columns else x).flatten(1, 2)
