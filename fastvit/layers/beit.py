"""BEiT's attention (Bao et al., "BEiT: BERT Pre-Training of Image Transformers", 2022): learned relative positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit.layers import fuse
from fastvit.layers.attention import Attention, Window
from fastvit.layers.resample import resample_rel_pos_table
from fastvit.layers.token_context import TokenContext

torch.fx.wrap("resample_rel_pos_table")  # symbolic tracing sees one call: it may not know the window


class Windowed:
    """Methods of a module that has a table of biases for a window of patches, after one class token."""

    window_size: Window | None
    relative_position_bias_table: nn.Parameter | None

    def table_for(self, window: Window) -> Tensor | None:
        """Return the table ((2h-1)(2w-1)+3, H), interpolated for another window of patches; None without one."""
        table, own = self.relative_position_bias_table, self.window_size
        return None if table is None or own is None else resample_rel_pos_table(table, window, own)

    def set_window_size(self, window: Window) -> None:
        """Hold the table for another window from now on."""
        table = self.relative_position_bias_table
        if table is not None and window != self.window_size:
            new = resample_rel_pos_table(table.detach(), window, self.window_size or window)
            self.relative_position_bias_table = nn.Parameter(new, requires_grad=table.requires_grad)
            self.window_size = window


def _table(window: Window, heads: int, **dd: Any) -> nn.Parameter:
    return nn.Parameter(torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1) + 3, heads, **dd))


class RelativePositionBias(Windowed, nn.Module):
    """One table of biases by relative position that all blocks share; timm's keys.

    Args:
        window_size: (h, w) of the patches, which come after one class token.
        num_heads: heads H.
    """

    def __init__(
        self,
        window_size: Window,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.relative_position_bias_table = _table(window_size, num_heads, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Set all biases to 0."""
        assert self.relative_position_bias_table is not None
        nn.init.zeros_(self.relative_position_bias_table)


@fuse.branch
class BeitAttention(Windowed, Attention):
    """Self-attention with a table of biases by relative position, looked up inside the kernel; timm's keys.

    Queries and values have biases, and keys none: so it is in EVA and DINOv3 too, which have no table.
    timm's ``relative_position_index``, which no checkpoint of timm holds, is not needed: nothing here is T x T.

    Args:
        dim: width D of the tokens.
        num_heads: heads H.
        qkv_bias: biases for queries and values, none for keys.
        attn_drop, proj_drop: dropout rates on the attention weights and on the result.
        window_size: (h, w) of the patches, which come after one class token; None leaves the table out.
        attn_head_dim: width of a head; by default D / H.
        **options: as in :class:`Attention`.
    """

    tensor_parallel = "heads"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: Window | None = None,
        attn_head_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, attn_head_dim, attn_drop=attn_drop, proj_drop=proj_drop, **options, **dd)
        self.q_bias, self.v_bias = (
            nn.Parameter(torch.zeros(self.attn_dim, **dd)) if qkv_bias else None for _ in range(2)
        )
        self.window_size = window_size
        self.relative_position_bias_table = None if window_size is None else _table(window_size, num_heads, **dd)

    def reset_parameters(self) -> None:
        """Set all biases to 0."""
        for bias in (self.q_bias, self.v_bias, self.relative_position_bias_table):
            if bias is not None:
                nn.init.zeros_(bias)

    def _qkv_bias(self) -> Tensor | None:
        q_bias, v_bias = self.q_bias, self.v_bias
        if q_bias is None or v_bias is None:
            return None
        return torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])

    def relative_options(self, context: TokenContext) -> dict[str, Any]:
        """Return the arguments of ops.attention for this block's table, and the one that all blocks share."""
        shared, window = context.rel_pos_table, context.window or self.window_size
        own = None if window is None else self.table_for(window)
        if own is None:
            return super().relative_options(context)
        return {"rel_pos_table": own if shared is None else own + shared, "window": window}
