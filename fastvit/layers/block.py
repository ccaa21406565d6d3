"""The pre-norm Transformer block, four ops, and BEiT's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvit import activations
from fastvit.layers import fuse
from fastvit.layers.attention import Attention, Window
from fastvit.layers.beit import BeitAttention
from fastvit.layers.fuse import Residual
from fastvit.layers.misc import DropPath, LayerScale
from fastvit.layers.mlp import Mlp
from fastvit.layers.norm import LayerNorm
from fastvit.layers.packed import leading
from fastvit.layers.token_context import NO_CONTEXT, TokenContext, arguments, with_masks
from fastvit.ops import backends


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
        act_layer, norm_layer, mlp_layer, attn_layer: classes of the pieces. Other classes than ours run as modules.
        depth: index of the block, for an ``attn_layer`` with that argument, and among the positions that blocks add.
        window_size: (h, w) of the patches, for an ``attn_layer`` with a table for them.
    """

    #: attn_layer by default in a ViT
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
        extra: dict[str, Any] = {} if window_size is None else {"window_size": window_size}
        if "depth" in inspect.signature(attn_layer).parameters:
            extra["depth"] = depth
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
            **extra,
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

    def can_prune(self) -> bool:
        """Return whether the block may compute some tokens alone: exact, and without effect on hooks or random numbers.

        Not with hooks, replaced modules or a subclass, and not with active dropout, which would draw other numbers.
        """
        return (
            fuse.is_ours(self)
            and fuse.has_branch(self.attn)
            and fuse.has_branch(self.mlp)
            and all(
                fuse.is_fusable(module, type(module)) if activations.name_of(module) else fuse.is_ours(module)
                for child in self.children()
                for module in child.modules()
            )
            and all(
                fuse.is_inactive(d) for d in (self.attn.attn_drop, self.attn.proj_drop, self.mlp.drop1, self.mlp.drop2)
            )
        )

    def attention_inputs(self, x: Tensor, context: TokenContext) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Return q, k and v (B, T, H, d) of x (B, T, D), and the options of ops.attention.

        Raises:
            TypeError: attention of another class than ours, which may do anything with its norm and qkv.
        """
        attn: Any = self.attn
        if not (fuse.is_known(self) and fuse.is_known(attn) and isinstance(attn, Attention)):
            raise TypeError(
                f"a {type(self).__name__} with {type(attn).__name__} for its attention; accepted: fastvit.layers' "
                "Block or BeitBlock with Attention, BeitAttention or RelativeAttention"
            )
        q, k, v = attn.heads(self._with_positions(x, context), self.norm1, context)
        return q, k, v, {"scale": attn.scale, **attn.relative_options(context)}

    def _scales(self) -> tuple[nn.Module | Tensor | None, nn.Module | Tensor | None]:
        """Return LayerScale of attention and of the MLP."""
        return self.ls1, self.ls2

    def _with_positions(self, x: Tensor, context: TokenContext) -> Tensor:
        """Return x with the position embeddings of this block, where each block adds its own."""
        if len(context.layer_pos_embed) == 0:  # else the block's number would be a reason to compile each by itself
            return x
        return x + context.layer_pos_embed[self.depth % len(context.layer_pos_embed)]

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        context: TokenContext = NO_CONTEXT,
    ) -> Tensor:
        """Return x (B, T, D) after attention and MLP, (B, T, D); of ``context.keep`` tokens alone (B, keep, D).

        Args:
            attn_mask, is_causal: timm's arguments, as in F.scaled_dot_product_attention.
            context: of the tokens; see :class:`fastvit.layers.token_context.TokenContext`.
        """
        context = with_masks(context, attn_mask, is_causal)
        x = self._with_positions(x, context)
        keep, sequences = context.keep, context.sequences
        kept = sequences if sequences is None or keep is None else sequences.leading(keep)
        scale1, scale2 = self._scales()

        residual = Residual(leading(x, keep, sequences), scale1, self.drop_path1, kept)
        if fuse.has_branch(self.attn):
            x = self.attn.branch(x, self.norm1, residual, context)
        else:
            y = self.attn(self.norm1(x), **arguments(context._replace(keep=None)))
            x = residual.as_modules(leading(y, keep, sequences))

        residual = Residual(x, scale2, self.drop_path2, kept)
        if fuse.has_branch(self.mlp):
            return self.mlp.branch(x, self.norm2, residual)
        return residual.as_modules(self.mlp(self.norm2(x)))


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
        context: TokenContext = NO_CONTEXT,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """As :class:`Block`'s; shared_rel_pos_bias (H, T, T) is timm's name for an attn_mask."""
        return super().forward(x, shared_rel_pos_bias if attn_mask is None else attn_mask, is_causal, context)


class Blocks(nn.Sequential):
    """Blocks one after the other, all with the same context."""

    def forward(self, input: Tensor, context: TokenContext = NO_CONTEXT) -> Tensor:
        """Return the tokens input (B, T, D) after all blocks."""
        options = arguments(context)
        for block in self:
            input = block(input, **options)
        return input


def run_block(block: nn.Module, x: Tensor, context: TokenContext, checkpointing: bool = False) -> Tensor:
    """Return block(x), recomputed in backward where ``checkpointing`` is on and there is no mask (as in timm)."""
    options = arguments(context)
    if not checkpointing or context.attn_mask is not None or context.is_causal:
        return block(x, **options)
    if torch.compiler.is_compiling():  # compiled code keeps the setting that it was compiled for
        return checkpoint(block, x, use_reentrant=False, **options)
    chosen = backends.again()  # now; the setting may be another when backward recomputes
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), chosen), **options)


def run_blocks(
    blocks: nn.Sequential, x: Tensor, context: TokenContext, checkpointing: bool = False, keep: int | None = None
) -> Tensor:
    """Return the tokens x (B, T, D) after all blocks; or the first ``keep`` of each image."""
    if keep is None and not checkpointing:
        if not arguments(context):
            return blocks(x)
        if isinstance(blocks, Blocks):  # a model of timm's has a plain Sequential
            return blocks(x, context=context)
    last = len(blocks) - 1
    for i, block in enumerate(blocks):
        if i == last and keep is not None:
            context = context._replace(keep=keep)
        x = run_block(block, x, context, checkpointing)
    return x
