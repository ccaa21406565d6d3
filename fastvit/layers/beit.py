"""BEiT's block (Bao et al., "BEiT: BERT Pre-Training of Image Transformers", 2022): learned relative positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import ops, reference
from fastvit.layers import fuse
from fastvit.layers.attention import Attention, as_bias
from fastvit.layers.fuse import Merge
from fastvit.layers.misc import DropPath
from fastvit.layers.mlp import Mlp
from fastvit.layers.norm import LayerNorm
from fastvit.packing import Sequences


class BeitAttention(Attention):
    """Self-attention with a table of biases by relative position, looked up inside the kernel; timm's keys.

    timm's ``relative_position_index``, which no checkpoint of timm holds, is not needed: nothing here is T x T.

    Args:
        dim: width D of the tokens.
        num_heads: heads H.
        qkv_bias: biases for queries and values, none for keys.
        attn_drop, proj_drop: dropout rates on the attention weights and on the result.
        window_size: (h, w) of the patches, which come after one class token; None leaves the table out.
        attn_head_dim: width of a head; by default D / H.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: tuple[int, int] | None = None,
        attn_head_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, attn_head_dim, attn_drop=attn_drop, proj_drop=proj_drop, **dd)

        def zeros(*shape: int, wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(shape, **dd)) if wanted else None

        self.q_bias, self.v_bias = (zeros(self.attn_dim, wanted=qkv_bias) for _ in range(2))
        self.window_size = window_size
        h, w = window_size or (1, 1)
        rows = (2 * h - 1) * (2 * w - 1) + 3
        self.relative_position_bias_table = zeros(rows, num_heads, wanted=window_size is not None)

    def _project_in(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        q_bias, v_bias = self.q_bias, self.v_bias
        if q_bias is None or v_bias is None:
            return super()._project_in(x, norm)
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        if fuse.intact(self.qkv, nn.Linear):
            return fuse.folded(ops.linear, x, self.qkv.weight, bias, norm=norm)
        return fuse.linear(self.qkv, x, norm=norm) + bias

    def _options(
        self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, sequences: Sequences | None
    ) -> dict[str, Any] | None:
        options = super()._options(x, attn_mask, is_causal, sequences)
        if options is None or self.relative_position_bias_table is None:
            return options
        if "bias" in options:  # one bias then, T x T as the one that is given
            return options | {"bias": options["bias"] + self._bias()}
        return options | {"rel_pos_table": self.relative_position_bias_table, "window": self.window_size}

    def _bias(self) -> Tensor:
        """The table's biases, (1, H, T, T)."""
        assert self.relative_position_bias_table is not None and self.window_size is not None
        return reference.table_bias(self.relative_position_bias_table, self.window_size)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if self.relative_position_bias_table is not None:
            bias = self._bias()
            attn_mask = bias if attn_mask is None else bias + as_bias(attn_mask, q.dtype)
        return super()._attend(q, k, v, attn_mask, is_causal)


class BeitBlock(nn.Module):
    """x + gamma_1 * attention(norm1(x)), then x + gamma_2 * mlp(norm2(x)), timm's arguments and keys.

    Args:
        dim, num_heads, qkv_bias, attn_drop, proj_drop, window_size, attn_head_dim: as in :class:`BeitAttention`.
        mlp_ratio: hidden width of the MLP in units of D. scale_mlp: a norm inside it.
        drop_path: rate of stochastic depth.
        init_values: start of gamma_1 and gamma_2 (D,); None leaves them out.
        act_layer, norm_layer: classes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        mlp_ratio: float = 4.0,
        scale_mlp: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        window_size: tuple[int, int] | None = None,
        attn_head_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = BeitAttention(dim, num_heads, qkv_bias, attn_drop, proj_drop, window_size, attn_head_dim, **dd)
        self.drop_path1, self.drop_path2 = (DropPath(drop_path) if drop_path > 0 else nn.Identity() for _ in range(2))
        self.norm2 = norm_layer(dim, **dd)
        inner_norm = norm_layer if scale_mlp else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, norm_layer=inner_norm, drop=proj_drop, **dd)
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.full((dim,), init_values, **dd)) if init_values else None for _ in range(2)
        )

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """x (B, 1 + h * w, D) -> the same; shared_rel_pos_bias (H, T, T) is added to the table's biases."""
        merge = Merge(x, self.gamma_1, self.drop_path1)
        if fuse.intact(self.attn, BeitAttention):
            x = self.attn.branch(x, self.norm1, merge, shared_rel_pos_bias)
        else:
            x = merge.as_modules(self.attn(self.norm1(x), shared_rel_pos_bias))
        merge = Merge(x, self.gamma_2, self.drop_path2)
        if fuse.intact(self.mlp, Mlp):
            return self.mlp.branch(x, self.norm2, merge)
        return merge.as_modules(self.mlp(self.norm2(x)))
