"""What a ViT does besides its forward pass, as timm's: weights, classifiers, other sizes, tokens between blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fastvit.checkpoints.load import load_checkpoint, mismatch_advice
from fastvit.layers import PosEmbed, Windowed
from fastvit.layers.block import run_block
from fastvit.layers.misc import count
from fastvit.layers.packed import split
from fastvit.layers.patch_embed import Size, image_size
from fastvit.layers.resample import resample_pos_embed
from fastvit.models import positions
from fastvit.models.head import LEARNED_POOLS, check_pool
from fastvit.models.init import check_mode, init_vit
from fastvit.ops import onednn
from fastvit.packing import PackedImages

for _name in ("image_size", "resample_pos_embed"):  # symbolic tracing sees a call of each, not its checks
    torch.fx.wrap(_name)

Images = Tensor | list[Tensor] | tuple[Tensor, ...] | PackedImages


def _select_blocks(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Return indices of blocks from "all" (None), "the last n" (an int) or a list that may count from the end."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"indices={indices}: the model has {count} blocks; accepted: 1 to {count}, or a list")
        return list(range(count - indices, count))
    out_of_range = [i for i in indices if not -count <= i < count]
    if out_of_range or not indices:
        raise ValueError(f"block indices {out_of_range or indices} are not in {-count}..{count - 1}")
    return [i % count for i in indices]


class ViTBase(nn.Module):
    """The methods of a ViT around its forward pass. A subclass builds the layers, and says how images become tokens."""

    attn_pool: nn.Module | None
    blocks: nn.Sequential
    cls_token: nn.Parameter | None
    dist_token: nn.Parameter | None
    distilled_training: bool
    dynamic_img_size: bool
    embed_dim: int
    fc_norm: nn.Module
    fix_init: bool
    global_pool: str
    has_class_token: bool
    head: nn.Module
    head_dist: nn.Module | None
    head_hidden_size: int
    in_chans: int
    layer_pos_embed: PosEmbed | None
    no_embed_class: bool
    norm: nn.Module
    num_classes: int
    num_prefix_tokens: int
    patch_embed: Any
    pos_embed: nn.Parameter | None
    pre_logits: nn.Module
    reg_token: nn.Parameter | None
    weight_init_mode: str
    windowed: bool

    def embed(self, images: Images, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """Return the tokens that enter the blocks, and their context."""
        raise NotImplementedError

    def _prefix_positions(self) -> int:
        """Return how many rows of pos_embed belong to class and register tokens."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Return (h, w), the patches of these images."""
        layer = self.patch_embed
        if not self.dynamic_img_size:
            return cast(tuple[int, int], layer.grid_size)
        return cast(tuple[int, int], layer.dynamic_feat_size(image_size(images, self.in_chans)))

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
        taken, prefix = _select_blocks(len(self.blocks), indices), self.num_prefix_tokens
        y, context = self.embed(x, attn_mask, is_causal)
        found: list[tuple[Tensor, Tensor]] = []
        for i, block in enumerate(list(self.blocks)[: max(taken) + 1 if stop_early else None]):
            y = run_block(block, y, context, self.grad_checkpointing)
            if i in taken:
                found.append(split(self.norm(y) if norm else y, prefix, context.sequences))
        firsts, patches = [first for first, _ in found], [rest for _, rest in found]
        if output_fmt == "NCHW":
            h, w = self._grid(cast(Tensor, x))
            patches = [z.reshape(z.shape[0], h, w, -1).permute(0, 3, 1, 2).contiguous() for z in patches]
        return_prefix_tokens = return_prefix_tokens and prefix > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": patches}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = firsts
            if not intermediates_only:
                result["image_features"] = self.norm(y)
            return result
        outputs: list[Any] = list(zip(patches, firsts, strict=True)) if return_prefix_tokens else patches
        return outputs if intermediates_only else (self.norm(y), outputs)

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
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens,
            norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of ``indices``, and optionally norm and head; return the indices."""
        kept = _select_blocks(len(self.blocks), indices)
        self.blocks = type(self.blocks)(*list(self.blocks)[: max(kept) + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return kept
