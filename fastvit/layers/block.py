"""The pre-norm Transformer block, four ops, and BEiT's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import activations
from fastvit.layers import fuse
from fastvit.layers.attention import Attention, Window
from fastvit.layers.axial import AxialAttention
from fastvit.layers.beit import BeitAttention
from fastvit.layers.fuse import Merge
from fastvit.layers.misc import DropPath, LayerScale
from fastvit.layers.mlp import Mlp, SwiGLU
from fastvit.layers.norm import LayerNorm
from fastvit.layers.packed import leading
from fastvit.layers.pos_embed import RelativeAttention
from fastvit.layers.positions import Positions
from fastvit.packing import Sequences

# A block made of these alone treats each token by itself, but for the attention's own sum over keys.
_ATTENTIONS = (Attention, AxialAttention, BeitAttention, RelativeAttention)
_OURS = (
    *_ATTENTIONS,
    DropPath,
    LayerNorm,
    LayerScale,
    Mlp,
    SwiGLU,
    nn.Dropout,
    nn.Identity,
    nn.LayerNorm,
    nn.Linear,
)


def _by_token(module: nn.Module) -> bool:
    """Whether the module is one of these, or another library's activation that means one, and nobody watches it."""
    return fuse.is_fusable(module, *((type(module),) if activations.name_of(module) else _OURS))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)) (the ViT paper's equations 2 and 3); timm's arguments and keys.

    Args:
        dim: width D.
        num_heads: heads H.
        mlp_ratio: hidden width of the MLP in units of D.
        qkv_bias, proj_bias: whether qkv, and the projection and the MLP, have a bias.
        qk_norm, scale_attn_norm, scale_mlp_norm: extra norms (on queries and keys, before the projection, in the MLP).
        proj_drop, attn_drop, drop_path: dropout rates.
        init_values: start of LayerScale; None leaves it out.
        act_layer, norm_layer, mlp_layer, attn_layer: classes of the pieces. What is not ours runs as a module.
        depth: index of the block, for an ``attn_layer`` that asks for it, and among the positions that blocks add.
        window_size: (h, w) of the patches, for an ``attn_layer`` with a table for them.
    """

    #: what a ViT builds it with by default
    default_attn: Callable[..., nn.Module] = Attention

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        attn_layer: Callable[..., nn.Module] = Attention,
        depth: int = 0,
        window_size: Window | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        asked: dict[str, Any] = {} if window_size is None else {"window_size": window_size}
        if "depth" in inspect.signature(attn_layer).parameters:
            asked["depth"] = depth
        self.depth = depth

        def scale() -> nn.Module:
            return LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()

        def dropped() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn_layer(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            **asked,
            **dd,
        )
        self.ls1 = scale()
        self.drop_path1 = dropped()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(
            in_features=dim,
            hidden_features=int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
            **dd,
        )
        self.ls2 = scale()
        self.drop_path2 = dropped()

    def unwatched(self) -> bool:
        """Whether computing only some tokens is exact and nobody in the block could tell.

        Not with hooks, replaced modules or a subclass, and not with active dropout, whose random numbers would differ.
        """
        return (
            fuse.is_fusable(self, Block, BeitBlock)
            and type(self.attn) in _ATTENTIONS
            and type(self.mlp) in (Mlp, SwiGLU)
            and all(_by_token(module) for child in self.children() for module in child.modules())
            and all(
                fuse.is_inactive(d) for d in (self.attn.attn_drop, self.attn.proj_drop, self.mlp.drop1, self.mlp.drop2)
            )
        )

    def _scales(self) -> tuple[nn.Module | Tensor | None, nn.Module | Tensor | None]:
        """LayerScale of attention and of the MLP."""
        return self.ls1, self.ls2

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        tokens: int | None = None,
        sequences: Sequences | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D), or with ``tokens`` only the first so many of each image, (B, tokens, D).

        With ``sequences``, x (1, total, D) are packed images, which attend to themselves alone.
        """
        options: dict[str, Any] = {}
        if attn_mask is not None or is_causal:
            options.update(attn_mask=attn_mask, is_causal=is_causal)
        if sequences is not None:
            options.update(sequences=sequences)
        if positions is not None:
            options.update(positions=positions)
            if positions.added:  # else the block's number would be a reason to compile each by itself
                x = positions.before(x, self.depth)
        scale1, scale2 = self._scales()
        kept = sequences if sequences is None or tokens is None else sequences.leading(tokens)
        merge = Merge(leading(x, tokens, sequences), scale1, self.drop_path1, kept)
        if fuse.is_fusable(self.attn, *_ATTENTIONS):
            x = self.attn.branch(x, self.norm1, merge, tokens=tokens, **options)
        else:
            y = self.attn(self.norm1(x), **options)
            x = merge.as_modules(leading(y, tokens, sequences))
        merge = Merge(x, scale2, self.drop_path2, kept)
        if fuse.is_fusable(self.mlp, Mlp, SwiGLU):
            return self.mlp.branch(x, self.norm2, merge)
        return merge.as_modules(self.mlp(self.norm2(x)))


class BeitBlock(Block):
    """x + gamma_1 * attention(norm1(x)), then x + gamma_2 * mlp(norm2(x)), timm's arguments and keys.

    BEiT's, and without a window EVA's and DINOv3's.

    Args:
        dim, num_heads, qkv_bias, attn_drop, proj_drop, window_size, attn_head_dim: as in :class:`BeitAttention`.
        mlp_ratio: hidden width of the MLP in units of D. scale_mlp: a norm inside it, as scale_mlp_norm.
        drop_path: rate of stochastic depth.
        init_values: start of gamma_1 and gamma_2 (D,); None leaves them out.
        act_layer, norm_layer, attn_layer: classes.
        **options: as in :class:`Block`.
    """

    default_attn = BeitAttention

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
        window_size: Window | None = None,
        attn_head_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attn_layer: Callable[..., nn.Module] = BeitAttention,
        scale_mlp_norm: bool = False,
        **options: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if attn_head_dim is not None:
            attn_layer = functools.partial(attn_layer, attn_head_dim=attn_head_dim)
        super().__init__(
            dim,
            num_heads,
            mlp_ratio,
            qkv_bias,
            scale_mlp_norm=scale_mlp or scale_mlp_norm,
            proj_drop=proj_drop,
            attn_drop=attn_drop,
            drop_path=drop_path,
            act_layer=act_layer,
            norm_layer=norm_layer,
            attn_layer=attn_layer,
            window_size=window_size,
            **options,
            **dd,
        )
        del self.ls1, self.ls2
        self.init_values = init_values
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.full((dim,), init_values, **dd)) if init_values else None for _ in range(2)
        )

    def reset_parameters(self) -> None:
        """Set gamma_1 and gamma_2 to ``init_values``."""
        for gamma in (self.gamma_1, self.gamma_2):
            if gamma is not None and self.init_values is not None:
                nn.init.constant_(gamma, self.init_values)

    def _scales(self) -> tuple[nn.Module | Tensor | None, nn.Module | Tensor | None]:
        return self.gamma_1, self.gamma_2

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        tokens: int | None = None,
        sequences: Sequences | None = None,
        positions: Positions | None = None,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """As :class:`Block`'s; shared_rel_pos_bias (H, T, T) is timm's name for an attn_mask."""
        attn_mask = shared_rel_pos_bias if attn_mask is None else attn_mask
        return super().forward(x, attn_mask, is_causal, tokens, sequences, positions)


class Blocks(nn.Sequential):
    """Blocks one after the other, all of which are told the same besides."""

    def forward(self, input: Tensor, **told: Any) -> Tensor:
        """input (B, T, D) -> (B, T, D); ``told`` are arguments of every block."""
        for block in self:
            input = block(input, **told)
        return input
