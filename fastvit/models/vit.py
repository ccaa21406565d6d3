"""The Vision Transformer of Dosovitskiy et al. (2021), as timm's ``VisionTransformer``, on :mod:`fastvit.ops`."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
from fastvit.layers.misc import count, positive, rate
from fastvit.layers.patch_embed import Size, image_size, normalised, pixel_statistics
from fastvit.layers.pos_embed import check_pos_embed
from fastvit.layers.resample import resample_pos_embed
from fastvit.layers.resolve import ATTENTIONS, NORMS, Layer, resolve
from fastvit.models import packed, positions
from fastvit.models.head import Head, check_pool
from fastvit.models.hybrid import HybridEmbed
from fastvit.models.init import check_mode, init_vit
from fastvit.models.intermediates import Images, Intermediates
from fastvit.ops import backends, onednn
from fastvit.packing import PackedImages, Sequences

Corruption = Callable[[Tensor], Tensor]

# Symbolic tracing (torch.fx) sees a call of each, not its checks.
for _name in ("image_size", "normalised", "pixel_statistics", "resample_pos_embed"):
    torch.fx.wrap(_name)


class ViT(Intermediates, Head):
    """Vision Transformer with timm's constructor, methods, attributes and state_dict keys.

    ``ViT(...).load_state_dict(timm_model.state_dict())`` gives timm's logits. What is not listed is as in timm.

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
        pos_embed: "learn", "learn_2d" (a half by column and a half by row), "relative" (keys of distances along the
            sequence, in each block), or "none" or "" for no positions (table 8 of the paper).
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
        check_pos_embed(pos_embed, pos_embed_at, embed_dim)
        reg_tokens, num_classes = count("reg_tokens", reg_tokens), count("num_classes", num_classes)
        if mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be positive, got {mlp_ratio}")
        self.mean, self.std = self._pixel_statistics(mean, std, in_chans)
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
        positions.check(self, head_dim, patch_drop_rate, pos_embed_at)

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
            positions.check_relative(self, attn_layer is not None)
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
        positions.check_blocks(self)
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

    @staticmethod
    def _pixel_statistics(
        mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
    ) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """mean and std as tuples: the ops take them so, and no .half() or .to() can round or move them."""
        if mean is None and std is None:
            return None, None
        values = [tuple(float(v) for v in t) if t is not None else () for t in (mean, std)]
        if any(len(t) != channels for t in values) or min(values[1]) <= 0:
            raise ValueError(f"mean={mean} and std={std} must be given together, {channels} values each, std positive")
        return values[0], values[1]

    # -- weights ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Start all weights; see :func:`fastvit.models.init.init_vit` for the modes."""
        mode = check_mode(mode or self.weight_init_mode)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        if self.dist_token is not None:
            nn.init.trunc_normal_(self.dist_token, std=0.02)
        init_vit(self, mode, num_classes=self.num_classes, reset=needs_reset)
        if self.fix_init:
            for i, block in enumerate(self.blocks):
                scale = (2.0 * (i + 1)) ** 0.5
                block.attn.proj.weight.div_(scale)
                block.mlp.fc2.weight.div_(scale)

    def load_pretrained(self, checkpoint_path: str | Path, prefix: str = "") -> None:
        """Load weights, the paper's own .npz or others, resampled to this size: :func:`fastvit.load_checkpoint`."""
        load_checkpoint(self, checkpoint_path, prefix=prefix)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``: nothing is resampled, and an error says what to do about each shape."""
        onednn.drop(self.parameters())
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            advice = mismatch_advice(self, state_dict)
            raise RuntimeError(f"{error}\n{advice}" if advice else str(error)) from error

    def train(self, mode: bool = True) -> ViT:
        """As ``nn.Module.train``; going to training drops the copies of weights that CPU inference keeps packed."""
        if mode:
            onednn.drop(self.parameters())
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> ViT:
        """As ``nn.Module._apply`` (``to``, ``half``, ...): moved weights leave no packed copies behind."""
        onednn.drop(self.parameters())
        return super()._apply(fn, recurse)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave out."""
        learned = re.compile(r"pos_embed_2d\.|layer_pos_embed\.|.*(relative_position_bias_table|rel_pos_keys)$")
        tables = {name for name, _ in self.named_parameters() if learned.match(name)}
        return {"pos_embed", "cls_token", "reg_token", "dist_token"} | tables

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
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

    # -- forward ------------------------------------------------------------------------------------------------

    def _prefix_positions(self) -> int:
        """How many rows of pos_embed belong to class and register tokens."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def _prefix_tokens(self) -> Tensor | None:
        """Class, distillation and register tokens, (1, P, D)."""
        tokens: tuple[Tensor | None, ...] = (self.cls_token, self.dist_token, self.reg_token)
        given = [token for token in tokens if token is not None]
        if len(given) > 1:
            return torch.cat(given, dim=1)
        return given[0] if given else None

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        """Position embeddings for a grid of patches, (1, N or P + N, D)."""
        if self.pos_embed_2d is not None:
            return cast(Tensor, self.pos_embed_2d(grid))
        if self.pos_embed is None or not self.dynamic_img_size:
            return self.pos_embed
        return resample_pos_embed(self.pos_embed, grid, self.patch_embed.grid_size, self._prefix_positions())

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add positions and prefix tokens to patch tokens: (B, N, D) or (B, h, w, D) -> (B, P + N, D)."""
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

    def _embed(self, images: Tensor, corrupt: Corruption | None = None) -> Tensor:
        """images -> tokens (B, T, D), with all patches and before ``norm_pre``."""
        embed = self.patch_embed
        ours = not isinstance(embed, HybridEmbed) and fuse.is_fusable(embed, PatchEmbed)  # a backbone is never fused
        fused = ours and embed.fusable() and self._unchanged("_pos_embed", "_positions", "_prefix_tokens")
        fused = fused and corrupt is None  # which comes between the projection and the positions
        dtype = next(embed.parameters()).dtype
        keep = fused and not embed.dynamic_img_pad
        images = normalised(images, self.in_chans, self.mean, self.std, keep, dtype)
        if fused:
            images = embed.accept(images)
            mean, std = pixel_statistics(images, self.mean, self.std)
            x = ops.patch_embed(
                images,
                embed.proj.weight,
                embed.proj.bias,
                pos_embed=self._positions(self._grid(images)),
                prefix_tokens=self._prefix_tokens(),
                mean=mean,
                std=std,
            )
            return self.pos_drop(x)
        x = embed(images)
        if corrupt is not None:
            x = corrupt(x.flatten(1, -2)).reshape(x.shape)
        return self._pos_embed(x)

    def _unchanged(self, *methods: str) -> bool:
        """Whether these methods are the ones below, neither overridden nor replaced."""
        return all(getattr(type(self), name) is _METHODS[name] and name not in self.__dict__ for name in methods)

    def _tokens_read(self) -> int | None:
        """How many leading tokens the last block may work for alone, with nobody to notice but the clock; None for all.

        Not where a hook, a replaced module or an overridden method could see the others; see ``Block.unwatched``.
        """
        if self.global_pool != "token" or self.attn_pool is not None or not len(self.blocks):
            return None
        if not self._unchanged("forward_features", "forward_head", "pool"):
            return None
        last = self.blocks[-1]
        unseen = (
            type(last) in (Block, BeitBlock)
            and last.unwatched()
            and fuse.is_fusable(self.blocks, Blocks, nn.Sequential)
            and fuse.is_fusable(self.norm, LayerNorm, nn.LayerNorm, nn.Identity)
        )
        return (1 if self.head_dist is None else 2) if unseen else None

    def _encode(
        self,
        x: Tensor | PackedImages,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        tokens: int | None = None,
        corrupt: Corruption | None = None,
    ) -> tuple[Tensor, Sequences | None]:
        """images -> normed tokens (B, T, D), or only the first ``tokens`` of each image; and, if packed, whose."""
        x, told = self._tokens(x, corrupt)
        unmasked = attn_mask is None and not is_causal
        whole = not told or isinstance(self.blocks, Blocks)  # a model of timm's has a plain Sequential
        if unmasked and tokens is None and whole and not self.grad_checkpointing:
            return self.norm(self.blocks(x, **told)), told.get("sequences")
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = self._run(block, x, attn_mask, is_causal, told, tokens if i == last else None)
        sequences = told.get("sequences")
        return self.norm(x), sequences if sequences is None or tokens is None else sequences.leading(tokens)

    def _tokens(self, x: Tensor | PackedImages, corrupt: Corruption | None = None) -> tuple[Tensor, dict[str, Any]]:
        """The tokens that enter the blocks, (B, T, D) or packed (1, total, D); and what blocks are told besides.

        That is where the images are ("sequences"), if packed, and where the tokens are ("positions"), if they ask.
        """
        placed = positions.told(self)
        if isinstance(x, PackedImages):
            if corrupt is not None:
                raise ValueError("corrupt= takes patches (B, N, D): give images as one tensor, not packed ones")
            tokens, sequences, kept = packed.embed(self, x)
            told: dict[str, Any] = {"sequences": sequences}
            return tokens, told | ({"positions": positions.of_packed(self, tokens, x, kept)} if placed else {})
        tokens, kept = positions.drop_patches(self, self._embed(x, corrupt))
        tokens = self.norm_pre(tokens)
        return tokens, {"positions": positions.of_grid(self, tokens, self._grid(x), kept)} if placed else {}

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w): the patches of these images."""
        embed = self.patch_embed
        if not self.dynamic_img_size:
            return cast(tuple[int, int], embed.grid_size)
        return cast(tuple[int, int], embed.dynamic_feat_size(image_size(images, self.in_chans)))

    def _run(
        self,
        block: nn.Module,
        x: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        told: Mapping[str, Any],
        tokens: int | None = None,
    ) -> Tensor:
        """One block, checkpointed if that is on and no mask is given (as in timm)."""
        if attn_mask is not None or is_causal:
            return block(x, attn_mask=attn_mask, is_causal=is_causal, **told)
        options = dict(told) if tokens is None else {**told, "tokens": tokens}
        if self.grad_checkpointing:
            if torch.compiler.is_compiling():  # compiled code keeps the setting that it was compiled for
                return checkpoint(block, x, use_reentrant=False, **options)
            chosen = backends.again()  # now; the setting may be another when backward recomputes
            return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), chosen), **options)
        return block(x, **options)

    def forward_features(
        self,
        x: Images,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        corrupt: Corruption | None = None,
    ) -> Tensor:
        """images (B, C, H, W) -> all tokens after the last norm, (B, T, D); packed images -> (1, total, D).

        ``corrupt`` changes the patch embeddings (B, N, D) before positions and prefix tokens come in, as masked
        pre-training does (:mod:`fastvit.training.pretrain`); not those of packed images.
        """
        return self._encode(packed.images_of(self, x), attn_mask, is_causal, corrupt=corrupt)[0]

    def forward(self, x: Images, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images to logits.

        Args:
            x: (B, C, H, W) floating and normalised, or uint8 (B, C, H, W) / (B, H, W, C) if the model has mean and std.
                Or images of any sizes, whole patches each: a list of them without B, or what ``fastvit.pack`` made.
            attn_mask, is_causal: as in F.scaled_dot_product_attention, for every block; not with packed images.

        Returns:
            (B, num_classes); the two heads' of a distilled model in distilled training.

        Raises:
            ValueError: images of another shape, size or dtype than accepted.
        """
        x = packed.images_of(self, x)
        tokens = self._tokens_read() if attn_mask is None and not is_causal else None
        if self._unchanged("forward_features"):
            y, sequences = self._encode(x, attn_mask, is_causal, tokens)
        else:
            y = self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
            sequences = x.sequences(self.num_prefix_tokens) if isinstance(x, PackedImages) else None
        return self.forward_head(y) if sequences is None else self.forward_head(y, sequences=sequences)


_METHODS = {
    name: getattr(ViT, name)
    for name in ("_pos_embed", "_positions", "_prefix_tokens", "forward_features", "forward_head", "pool")
}
