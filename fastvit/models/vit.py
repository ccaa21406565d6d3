"""The Vision Transformer of Dosovitskiy et al. (2021), as timm's ``VisionTransformer``, on :mod:`fastvit.ops`."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops
from fastvit.activations import MODULES
from fastvit.checkpoints.load import load_checkpoint, mismatch_advice
from fastvit.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionPoolPrr,
    BeitBlock,
    Block,
    Blocks,
    LayerNorm,
    Mlp,
    PatchDropout,
    PatchEmbed,
    PosEmbed,
    RelativeAttention,
    RelativePositionBias,
    Windowed,
    fuse,
)
from fastvit.layers.attention import head_dim_of
from fastvit.layers.block import run_block, run_blocks
from fastvit.layers.misc import count, positive, rate
from fastvit.layers.packed import split
from fastvit.layers.patch_embed import Size, checked_statistics, image_size, is_fused, normalised
from fastvit.layers.resample import resample_pos_embed
from fastvit.layers.resolve import ATTENTIONS, NORMS, Layer, resolve
from fastvit.layers.token_context import NO_CONTEXT, TokenContext, with_masks
from fastvit.models import intermediates, packed, positions
from fastvit.models.head import LEARNED_POOLS, check_pool, classify, pool_tokens
from fastvit.models.hybrid import HybridEmbed
from fastvit.models.init import check_mode, init_vit
from fastvit.ops import onednn
from fastvit.packing import PackedImages, Sequences

Images = Tensor | list[Tensor] | tuple[Tensor, ...] | PackedImages
Corruption = Callable[[Tensor], Tensor]

# Symbolic tracing (torch.fx) sees a call of each, not its checks.
for _name in ("image_size", "normalised", "resample_pos_embed"):
    torch.fx.wrap(_name)


class ViT(nn.Module):
    """Vision Transformer with timm's constructor, methods, attributes and state_dict keys.

    ``ViT(...).load_state_dict(timm_model.state_dict())`` gives timm's logits. Everything else is as in timm.

    Args:
        img_size: (height, width) of the images, or one int.
        patch_size: (height, width) of a patch, or one int.
        in_chans: channels of the images.
        num_classes: rows of the classifier; 0 leaves it out.
        global_pool: "token" (the class token), "avg", "max", "avgmax", "map" (attention from a learned query), "prr"
            (attention without parameters) or "" (no pooling).
        embed_dim, depth, num_heads, mlp_ratio: width D, blocks, heads, and the MLP's hidden width in units of D.
        qkv_bias, proj_bias: whether qkv, and the projection and the MLP, have biases.
        qk_norm, scale_attn_norm, scale_mlp_norm: extra norms: queries and keys, before the projection, in the MLP.
        init_values: start of LayerScale; None leaves it out.
        class_token, reg_tokens: a class token, and how many register tokens, before the patches.
        pos_embed: "learn", "learn_2d" (a half by column and a half by row), "relative" (relative position keys
            along the sequence, in each block), or "none" or "" for no positions (table 8 of the paper).
        no_embed_class: positions for the patches only.
        pre_norm, final_norm, fc_norm: a norm before the blocks; after them; after the pool instead (None: as it needs).
        pool_include_prefix: let "avg" and "max" pools read the class and register tokens too.
        dynamic_img_size: take any size, resampling the positions. dynamic_img_pad: pad to whole patches as well.
        drop_rate, pos_drop_rate, patch_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout in training.
        weight_init: "" (timm's), "jax" (the paper's, zero head), "jax_nlhb", "moco", "reset" or "skip".
        fix_init: scale the projections down with depth.
        embed_layer, embed_norm_layer, norm_layer, act_layer, block_fn, mlp_layer, attn_layer: classes (or names) of the
            pieces. timm's become ours where they mean the same; any other runs as the module it is, unfused.
        device, dtype: of the parameters.
        pos_embed_at: where learned positions are added: "stem", or before each block its own ("layers"), or the same
            ones before each ("shared").
        rope: base of the periods by which queries and keys of the patches are turned (rotary position embeddings, as
            DINOv3 has them: its base is 100; see :func:`fastvit.ops.rope.axial`), or None.
        use_rel_pos_bias, use_shared_rel_pos_bias: a table of biases by relative position in each block, and one that
            all share (BEiT); for one class token and no registers. Blocks then are BeitBlock by default.
        distilled: a distillation token after the class token, and a classifier for each; the logits are their mean
            (DeiT, Touvron et al., 2021). See :meth:`set_distilled_training`.
        representation_size: width of the pre-training head's hidden tanh layer (section 3.1 of the paper), or None.
        mean, std: of the pixels, in 0..1 units: with them the model takes uint8 images, (B, C, H, W) or (B, H, W, C).
            Floating images are taken as normalised already.

    Raises:
        ValueError: a value that does not fit; the message names it and what is accepted.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        fix_init: bool = False,
        embed_layer: Layer | str | None = None,
        embed_norm_layer: Layer | str | None = None,
        norm_layer: Layer | str | None = None,
        act_layer: Layer | str | None = None,
        block_fn: Layer | None = None,
        mlp_layer: Layer | None = None,
        attn_layer: Layer | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pos_embed_at: str = "stem",
        rope: float | None = None,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = False,
        distilled: bool = False,
        representation_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        embed_dim, depth = positive("embed_dim", embed_dim), positive("depth", depth)
        head_dim = head_dim_of(embed_dim, positive("num_heads", num_heads))
        check_pool(global_pool, class_token, distilled)
        if distilled and representation_size is not None:
            raise ValueError(f"representation_size={representation_size}: a distilled model has no pre-training head")
        reg_tokens, num_classes = count("reg_tokens", reg_tokens), count("num_classes", num_classes)
        if mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be positive, got {mlp_ratio}")
        self.mean, self.std = checked_statistics(mean, std, in_chans)
        norm_layer = resolve("norm_layer", norm_layer, NORMS, LayerNorm)
        mlp_layer = resolve("mlp_layer", mlp_layer, {}, Mlp)
        act_layer = resolve("act_layer", act_layer, MODULES, getattr(mlp_layer, "default_act", nn.GELU))
        norm_after_pool = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.embed_dim = embed_dim
        self.head_hidden_size = representation_size or embed_dim
        self.num_prefix_tokens = int(class_token) + int(distilled) + reg_tokens
        self.num_reg_tokens = reg_tokens
        self.has_class_token = class_token
        self.no_embed_class = no_embed_class
        self.pool_include_prefix = pool_include_prefix or global_pool == "prr"
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.rope = rope
        self.windowed = use_rel_pos_bias or use_shared_rel_pos_bias
        positions.check(
            pos_embed, pos_embed_at, rope=rope, windowed=self.windowed, width=embed_dim, head_dim=head_dim,
            class_token=class_token, reg_tokens=reg_tokens, distilled=distilled, patch_drop_rate=patch_drop_rate,
            dynamic_img_size=dynamic_img_size, attn_layer=attn_layer is not None,
        )  # fmt: skip

        embed_options: dict[str, Any] = {"strict_img_size": False, "output_fmt": "NHWC"} if dynamic_img_size else {}
        if embed_norm_layer is not None:
            embed_options["norm_layer"] = resolve("embed_norm_layer", embed_norm_layer, NORMS, LayerNorm)
        self.patch_embed: Any = resolve("embed_layer", embed_layer, {}, PatchEmbed)(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=not pre_norm,  # the norm would take it away again (CLIP)
            dynamic_img_pad=dynamic_img_pad,
            **embed_options,
            **dd,
        )
        rows = cast(int, self.patch_embed.num_patches) + (0 if no_embed_class else self.num_prefix_tokens)
        grid = cast(tuple[int, int], self.patch_embed.grid_size)

        def tokens(count: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(1, count, embed_dim, **dd)) if count else None

        self.cls_token = tokens(int(class_token))
        self.dist_token = tokens(int(distilled))
        self.reg_token = tokens(reg_tokens)
        at_stem = pos_embed_at == "stem"

        def tables(count: int) -> PosEmbed:
            return PosEmbed(grid, rows - grid[0] * grid[1], embed_dim, count, axes=pos_embed == "learn_2d", **dd)

        self.pos_embed = tokens(rows if pos_embed == "learn" and at_stem else 0)
        self.pos_embed_2d = tables(1) if pos_embed == "learn_2d" and at_stem else None
        self.layer_pos_embed = None if at_stem else tables(depth if pos_embed_at == "layers" else 1)
        self.pos_drop = nn.Dropout(rate("pos_drop_rate", pos_drop_rate))
        self.patch_drop = PatchDropout(patch_drop_rate, self.num_prefix_tokens) if patch_drop_rate else nn.Identity()
        self.norm_pre = norm_layer(embed_dim, **dd) if pre_norm else nn.Identity()
        self.rel_pos_bias = RelativePositionBias(grid, num_heads, **dd) if use_shared_rel_pos_bias else None
        if pos_embed == "relative":
            attn_layer = partial(RelativeAttention, tokens=grid[0] * grid[1] + self.num_prefix_tokens)
        block_layer = resolve("block_fn", block_fn, {}, BeitBlock if self.windowed else Block)
        attn_layer = resolve("attn_layer", attn_layer, ATTENTIONS, getattr(block_layer, "default_attn", Attention))
        drop_paths = torch.linspace(0, rate("drop_path_rate", drop_path_rate), depth, device="cpu").tolist()
        self.blocks = Blocks(
            *[
                block_layer(
                    dim=embed_dim,
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    scale_attn_norm=scale_attn_norm,
                    scale_mlp_norm=scale_mlp_norm,
                    proj_bias=proj_bias,
                    init_values=init_values,
                    proj_drop=rate("proj_drop_rate", proj_drop_rate),
                    attn_drop=rate("attn_drop_rate", attn_drop_rate),
                    drop_path=drop_paths[i],
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    mlp_layer=mlp_layer,
                    attn_layer=attn_layer,
                    depth=i,
                    **({"window_size": grid} if use_rel_pos_bias else {}),
                    **dd,
                )
                for i in range(depth)
            ]
        )
        if self._has_context():
            positions.check_blocks(self.blocks)
        reduction = self.patch_embed.feat_ratio() if hasattr(self.patch_embed, "feat_ratio") else patch_size
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.norm = norm_layer(embed_dim, **dd) if final_norm and not norm_after_pool else nn.Identity()
        self.attn_pool: nn.Module | None = None
        if global_pool == "map":
            self.attn_pool = AttentionPoolLatent(embed_dim, num_heads, mlp_ratio, norm_layer, act_layer, **dd)
        elif global_pool == "prr":
            self.attn_pool = AttentionPoolPrr(embed_dim, num_heads, "token" if class_token else "avg")
        self.fc_norm = norm_layer(embed_dim, **dd) if final_norm and norm_after_pool else nn.Identity()
        self.head_drop = nn.Dropout(rate("drop_rate", drop_rate))
        self.pre_logits: nn.Module = nn.Identity()
        if representation_size is not None:
            hidden = nn.Linear(embed_dim, positive("representation_size", representation_size), **dd)
            self.pre_logits = nn.Sequential(OrderedDict(fc=hidden, act=nn.Tanh()))
        self.head = self._classifier()
        self.head_dist = self._classifier() if distilled else None
        self.distilled_training = False

        self.weight_init_mode = "reset" if check_mode(weight_init) == "skip" else weight_init
        self.fix_init = fix_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Images, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the logits of images.

        Args:
            x: (B, C, H, W) floating and normalised, or uint8 (B, C, H, W) / (B, H, W, C) if the model has mean and std.
                Or images of any sizes, whole patches each: a list of them without B, or what ``fastvit.pack`` made.
            attn_mask, is_causal: as in F.scaled_dot_product_attention, for every block; not with packed images.

        Returns:
            (B, num_classes); the two heads' of a distilled model in distilled training.

        Raises:
            ValueError: images of another shape, size or dtype than accepted.
        """
        if self._unchanged("forward_features"):
            keep = self._prune_to_class_token() if attn_mask is None and not is_causal else None
            tokens, context = self.embed(x, attn_mask, is_causal)  # (B, P + N, D): patches, positions, prefix tokens
            tokens = run_blocks(self.blocks, tokens, context, self.grad_checkpointing, keep)
            tokens, sequences = self.norm(tokens), context.sequences
            if sequences is not None and keep is not None:
                sequences = sequences.leading(keep)
        else:
            x = self._packed(x)
            sequences = x.sequences(self.num_prefix_tokens) if isinstance(x, PackedImages) else None
            tokens = self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.forward_head(tokens) if sequences is None else self.forward_head(tokens, sequences=sequences)

    def forward_features(
        self,
        x: Images,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        corrupt: Corruption | None = None,
    ) -> Tensor:
        """Return all tokens after the last norm: (B, T, D), or (1, total, D) of packed images.

        ``corrupt`` changes the patch embeddings (B, N, D) before positions and prefix tokens come in, as masked
        pre-training does (:mod:`fastvit.training.pretrain`); not those of packed images.
        """
        x, context = self.embed(x, attn_mask, is_causal, corrupt)
        return self.norm(run_blocks(self.blocks, x, context, self.grad_checkpointing))

    def embed(
        self,
        images: Images,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        corrupt: Corruption | None = None,
    ) -> tuple[Tensor, TokenContext]:
        """Return the tokens that enter the blocks, (B, P + N, D) or (1, total, D) of packed images, and their context.

        The arguments are those of :meth:`forward_features`.
        """
        layer, sequences, kept = self.patch_embed, None, None
        if isinstance(images, (list, tuple, PackedImages)):
            if corrupt is not None:
                raise ValueError("corrupt= takes patches (B, N, D): give images as one tensor, not packed ones")
            images = cast(PackedImages, self._packed(images))
            x, sequences, kept = self._embed_packed(images)
        elif (
            corrupt is None  # which comes between the projection and the positions
            and not isinstance(layer, HybridEmbed)
            and is_fused(layer)
            and self._unchanged("_pos_embed", "_positions", "_prefix_tokens")
        ):
            pixels, mean, std = layer.accept(images, self.mean, self.std)
            x = ops.patch_embed(
                pixels,
                layer.proj.weight,
                layer.proj.bias,
                pos_embed=self._positions(self._grid(images)),
                prefix_tokens=self._prefix_tokens(),
                mean=mean,
                std=std,
            )
            x = self.pos_drop(x)
        else:
            dtype = next(layer.parameters()).dtype
            x = layer(normalised(images, self.in_chans, self.mean, self.std, dtype))
            if corrupt is not None:
                x = corrupt(x.flatten(1, -2)).reshape(x.shape)
            x = self._pos_embed(x)
        if sequences is None:
            x, kept = positions.drop_patches(self.patch_drop, x, self.rope is not None)
        x = self.norm_pre(x)
        return x, with_masks(self._context(x, images, sequences, kept), attn_mask, is_causal)

    def pool(self, x: Tensor, pool_type: str | None = None, sequences: Sequences | None = None) -> Tensor:
        """Return the pooled tokens x (B, T, D), (B, D), or all of them where the pool is "".

        Of packed images, tokens (1, total, D) and ``sequences`` (``PackedImages.sequences(num_prefix_tokens)``) ->
        (n, D).

        Raises:
            ValueError: an unknown pool_type, or sequences of another number of tokens.
        """
        skip = 0 if self.pool_include_prefix else self.num_prefix_tokens
        return pool_tokens(x, self.global_pool if pool_type is None else pool_type, skip, sequences, self.attn_pool)

    def forward_head(self, x: Tensor, pre_logits: bool = False, sequences: Sequences | None = None) -> Any:
        """Return the logits of tokens x (B, T, D), (B, num_classes), or with ``pre_logits`` what the classifier reads.

        Of packed images, tokens (1, total, D) with their ``sequences``, as in :meth:`pool`. Of a distilled model the
        mean of what its two heads give, or read; in training after :meth:`set_distilled_training` the logits of both.
        """
        if self.head_dist is None:
            x = self.pool(x) if sequences is None else self.pool(x, sequences=sequences)
            x = self.pre_logits(self.head_drop(self.fc_norm(x)))
            return x if pre_logits else classify(self.head, x)
        tokens, _ = split(x, 2, sequences)
        read, read_dist = (self.head_drop(self.fc_norm(tokens[:, i])) for i in range(2))
        if not pre_logits:
            read, read_dist = classify(self.head, read), classify(self.head_dist, read_dist)
            if self.distilled_training and self.training:
                return read, read_dist
        return (read + read_dist) / 2

    # -- what forward reads -------------------------------------------------------------------------------------

    def _prefix_positions(self) -> int:
        """Return how many rows of pos_embed belong to class and register tokens."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Return (h, w), the patches of these images."""
        layer = self.patch_embed
        if not self.dynamic_img_size:
            return cast(tuple[int, int], layer.grid_size)
        return cast(tuple[int, int], layer.dynamic_feat_size(image_size(images, self.in_chans)))

    def _prefix_tokens(self) -> Tensor | None:
        """Return class, distillation and register tokens, (1, P, D)."""
        parts: tuple[Tensor | None, ...] = (self.cls_token, self.dist_token, self.reg_token)
        tokens = [token for token in parts if token is not None]
        if len(tokens) > 1:
            return torch.cat(tokens, dim=1)
        return tokens[0] if tokens else None

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        """Return the position embeddings of a grid of patches, (1, N or P + N, D)."""
        if self.pos_embed_2d is not None:
            return cast(Tensor, self.pos_embed_2d(grid))
        if self.pos_embed is None or not self.dynamic_img_size:
            return self.pos_embed
        return resample_pos_embed(self.pos_embed, grid, self.patch_embed.grid_size, self._prefix_positions())

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Return patch tokens (B, N, D) or (B, h, w, D) with positions and prefix tokens, (B, P + N, D)."""
        grid = self.patch_embed.grid_size
        if self.dynamic_img_size:
            grid, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        positions = self._positions(grid)
        if positions is not None and self.no_embed_class:
            x = x + positions
        prefix = self._prefix_tokens()
        if prefix is not None:
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
        if positions is not None and not self.no_embed_class:
            x = x + positions
        return self.pos_drop(x)

    def _packed(self, images: Any) -> Any:
        """Return a list of images packed for the patch embedding, and other images as they are."""
        if not isinstance(images, (list, tuple)):
            return images
        return packed.pack_for(self.patch_embed, images, self.in_chans, self.mean, self.std)

    def _embed_packed(self, images: PackedImages) -> tuple[Tensor, Sequences, Tensor | None]:
        """Return the tokens of packed images (1, total, D) that patch dropout leaves, their sequences and indices.

        Raises:
            ValueError: uint8 images without the model's mean and std, or a module that takes no packed images.
        """
        methods = ("_pos_embed", "_positions", "_prefix_tokens", "forward_features")
        packed.check(
            self.patch_embed,
            self.patch_drop,
            self.blocks,
            overridden=next((name for name in methods if not self._unchanged(name)), ""),
            tables=self.pos_embed_2d is not None or self.layer_pos_embed is not None,
            windowed=self.windowed,
        )
        own, prefix = self._prefix_positions(), self._prefix_tokens()
        x = self.pos_drop(packed.embed(self.patch_embed, images, self.pos_embed, own, prefix, self.mean, self.std))
        sequences = images.sequences(self.num_prefix_tokens)
        drop = self.patch_drop
        return drop.of_packed(x, sequences) if isinstance(drop, PatchDropout) else (x, sequences, None)

    def _has_context(self) -> bool:
        """Return whether blocks need to know where their tokens are."""
        return self.rope is not None or self.windowed or self.layer_pos_embed is not None

    def _context(
        self, x: Tensor, images: Tensor | PackedImages, sequences: Sequences | None, kept: Tensor | None
    ) -> TokenContext:
        """Return what blocks need to know of tokens x besides masks; ``kept`` are those that patch dropout left."""
        if not self._has_context():
            return NO_CONTEXT if sequences is None else TokenContext(sequences=sequences)
        prefix, rope = self.num_prefix_tokens, None
        added: tuple[Tensor, ...] = ()
        if self.rope is not None:
            head_dim = cast(Any, self.blocks[0]).attn.head_dim
            if isinstance(images, PackedImages):
                cos, sin = positions.packed_angles(images, prefix, head_dim, self.rope, x.dtype)
            else:
                cos, sin = positions.angles(x, self._grid(images), head_dim, self.rope)
            rope = (cos, sin) if kept is None else (cos[kept], sin[kept])
        if isinstance(images, PackedImages):
            batches = positions.batches_by_size(images, prefix, self.rel_pos_bias) if self.windowed else None
            return TokenContext(sequences=sequences, rope=rope, batches=batches)
        grid = self._grid(images)
        if self.layer_pos_embed is not None:  # 0 for prefix tokens that have no positions
            tables = F.pad(self.layer_pos_embed(grid), (0, 0, prefix - self._prefix_positions(), 0))
            added = tuple(tables[i] for i in range(self.layer_pos_embed.tables))
        return TokenContext(
            rope=rope,
            window=grid if self.windowed else None,
            rel_pos_table=None if self.rel_pos_bias is None else self.rel_pos_bias.table_for(grid),
            layer_pos_embed=added,
        )

    def _unchanged(self, *methods: str) -> bool:
        """Return whether these methods are those of this class, neither overridden nor replaced."""
        return all(getattr(type(self), name) is _METHODS[name] and name not in self.__dict__ for name in methods)

    def _prune_to_class_token(self) -> int | None:
        """Return how many leading tokens the last block has to compute, where the head reads no others; None: all.

        None too where a hook, a replaced module or an overridden method could see the others: see ``Block.can_prune``.
        """
        if self.global_pool != "token" or self.attn_pool is not None or not len(self.blocks):
            return None
        if not self._unchanged("forward_features", "forward_head", "pool"):
            return None
        last = self.blocks[-1]
        unseen = (
            isinstance(last, Block)
            and last.can_prune()
            and fuse.is_fusable(self.blocks, Blocks, nn.Sequential)
            and fuse.is_fusable(self.norm, LayerNorm, nn.LayerNorm, nn.Identity)
        )
        return (1 if self.head_dist is None else 2) if unseen else None

    # -- weights ------------------------------------------------------------------------------------------------

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Start all weights; see :func:`fastvit.models.init.init_vit` for the modes."""
        init_vit(self, check_mode(mode or self.weight_init_mode), reset=needs_reset)

    def load_pretrained(self, checkpoint_path: str | Path, prefix: str = "") -> None:
        """Load weights, the paper's own .npz or others, resampled to this size: :func:`fastvit.load_checkpoint`."""
        load_checkpoint(self, checkpoint_path, prefix=prefix)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as ``nn.Module.load_state_dict``; nothing is resampled, and errors advise on each shape."""
        onednn.drop(self.parameters())
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            advice = mismatch_advice(self, state_dict)
            raise RuntimeError(f"{error}\n{advice}" if advice else str(error)) from error

    def train(self, mode: bool = True) -> Self:
        """Set the mode as ``nn.Module.train``; training drops the copies of weights that CPU inference keeps packed."""
        if mode:
            onednn.drop(self.parameters())
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Apply as ``nn.Module._apply`` (``to``, ``half``, ...); moved weights leave no packed copies behind."""
        onednn.drop(self.parameters())
        return super()._apply(fn, recurse)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay should leave out."""
        learned = re.compile(r"pos_embed_2d\.|layer_pos_embed\.|.*(relative_position_bias_table|rel_pos_keys)$")
        tables = {name for name, _ in self.named_parameters() if learned.match(name)}
        return {"pos_embed", "cls_token", "reg_token", "dist_token"} | tables

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameters by depth, for layer-wise learning rates."""
        more = "|rel_pos_bias" * self.windowed + "|dist_token" * (self.dist_token is not None)
        more += "|layer_pos_embed" * (self.layer_pos_embed is not None)
        return {
            "stem": rf"^cls_token|reg_token|pos_embed|patch_embed|norm_pre{more}",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    # -- changes to the model -----------------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of keeping its activations."""
        self.grad_checkpointing = enable
        if hasattr(self.patch_embed, "set_grad_checkpointing"):
            self.patch_embed.set_grad_checkpointing(enable)

    def _classifier(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = self.patch_embed.proj.weight if hasattr(self.patch_embed, "proj") else next(self.parameters())
        return nn.Linear(self.head_hidden_size, self.num_classes, device=like.device, dtype=like.dtype)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """Return the last layer: a Linear, or an Identity without classes; of a distilled model both."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return the logits of both heads of a distilled model in training, for a loss of each."""
        self.distilled_training = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the pre-training head by one zero-initialised linear layer (section 3.2 of the paper).

        Raises:
            ValueError: an unknown pool, one with weights that this model lacks, or one that a distilled model has not:
                there "" is "token", as in timm.
        """
        num_classes = count("num_classes", num_classes)
        if self.head_dist is not None:
            check_pool(global_pool or "token", self.has_class_token, distilled=True)
        elif global_pool is not None:
            check_pool(global_pool, self.has_class_token)
            if global_pool in LEARNED_POOLS and type(self.attn_pool) is not LEARNED_POOLS[global_pool]:
                raise ValueError(f"global_pool={global_pool!r} has layers of its own; build the model with it")
            if global_pool not in LEARNED_POOLS:
                self.attn_pool = None
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.pre_logits = nn.Identity().train(self.training)
        self.head_hidden_size = self.embed_dim
        for name in ("head",) if self.head_dist is None else ("head", "head_dist"):
            head = self._classifier().train(self.training)
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
            setattr(self, name, head)

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Take images (and patches) of another size from now on; positions, tables and projection are resampled.

        Raises:
            ValueError: a size that patches don't tile; the model stays as it was.
        """
        positions.check_resize(self)
        before = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        grid = self.patch_embed.grid_size
        if grid == before:
            return
        if self.pos_embed is not None:
            rows = resample_pos_embed(self.pos_embed.detach(), grid, before, self._prefix_positions())
            self.pos_embed = nn.Parameter(rows, requires_grad=self.pos_embed.requires_grad)
        for module in self.modules():
            if isinstance(module, Windowed):
                module.set_window_size(grid)
            elif isinstance(module, PosEmbed):
                module.set_grid(grid)

    # -- the tokens between blocks ------------------------------------------------------------------------------

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
        """Return the tokens after some blocks, and the final ones.

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
        if isinstance(x, (list, tuple, PackedImages)) and output_fmt == "NCHW":
            raise ValueError("packed images have no common (h, w): their tokens come with output_fmt='NLC'")
        taken = intermediates.select_blocks(len(self.blocks), indices)
        y, context = self.embed(x, attn_mask, is_causal)
        found = []
        for i, block in enumerate(list(self.blocks)[: max(taken) + 1 if stop_early else None]):
            y = run_block(block, y, context, self.grad_checkpointing)
            if i in taken:
                z = self.norm(y) if norm else y
                found.append(split(z, self.num_prefix_tokens, context.sequences))
        grid = self._grid(cast(Tensor, x)) if output_fmt == "NCHW" else None
        final = None if intermediates_only else self.norm(y)
        return intermediates.arrange(found, final, grid, return_prefix_tokens, output_dict)

    def get_intermediate_layers(
        self,
        x: Images,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list[Any]:
        """Return the tokens after the last n blocks or those listed, NLC or with ``reshape`` NCHW; DINO's name."""
        fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt=fmt, intermediates_only=True, attn_mask=attn_mask
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of ``indices``, and optionally norm and head; return the indices."""
        kept = intermediates.select_blocks(len(self.blocks), indices)
        self.blocks = type(self.blocks)(*list(self.blocks)[: max(kept) + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return kept


_METHODS = {
    name: getattr(ViT, name)
    for name in ("_pos_embed", "_positions", "_prefix_tokens", "forward_features", "forward_head", "pool")
}
