"""Appendix D.5 of the ViT paper: ViTs and ResNets with attention along rows, then along columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops
from fastvit.layers import Block, TokenContext, fuse
from fastvit.layers.attention import head_dim_of
from fastvit.layers.axial import AxialAttention
from fastvit.layers.misc import pair
from fastvit.layers.patch_embed import Size
from fastvit.layers.token_context import NO_CONTEXT
from fastvit.models.resnet import ResNetV2
from fastvit.models.vit import ViT
from fastvit.packing import PackedImages

Pair = tuple[int, int]


class AxialBlock(nn.Module):
    """A Transformer block along rows and then one along columns, each with an MLP of its own.

    Args:
        attn_layer: must be :class:`AxialAttention`.
        **options: of both blocks, as in :class:`fastvit.layers.Block`.
    """

    default_attn: Callable[..., nn.Module] = AxialAttention

    def __init__(self, *, attn_layer: Callable[..., nn.Module] = AxialAttention, **options: Any) -> None:
        super().__init__()
        if attn_layer is not AxialAttention:
            raise ValueError(f"attn_layer {attn_layer!r} in an axial block; accepted: AxialAttention")
        self.row = Block(attn_layer=attn_layer, **options)
        self.column = Block(attn_layer=partial(attn_layer, columns=True), **options)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        context: TokenContext = NO_CONTEXT,
    ) -> Tensor:
        """Return x (B, h * w, D) after both blocks, the same shape; ``context.window`` is (h, w). Masks are refused."""
        return self.column(self.row(x, attn_mask, is_causal, context), attn_mask, is_causal, context)

    def attention_inputs(self, x: Tensor, context: TokenContext) -> Any:
        """Raise a TypeError: there is no attention of all tokens."""
        return self.row.attention_inputs(x, context)


class AxialViT(ViT):
    """Axial-ViT: a :class:`fastvit.ViT` in which two blocks, along rows and along columns, stand for each of its own.

    There are as many pairs as ``depth`` says. There is no class token, which would be in no row: the pool is "avg".

    Args:
        **options: as in ViT, but for what needs other tokens than the grid's, or all of them in one sequence.

    Raises:
        ValueError: a value that does not fit; the message names it and what is accepted.
    """

    def __init__(self, *, global_pool: str = "avg", **options: Any) -> None:
        without = ("class_token", "reg_tokens", "distilled", "patch_drop_rate", "rope", "fix_init", "block_fn")
        if wrong := [f"{name}={options[name]!r}" for name in without if options.get(name)]:
            raise ValueError(f"an AxialViT reads one whole grid of patches: {', '.join(wrong)} can't be with it")
        super().__init__(**{**options, "class_token": False, "global_pool": global_pool, "block_fn": AxialBlock})

    def _embed_packed(self, images: PackedImages) -> Any:
        raise ValueError("packed images can't pass blocks: rows and columns are those of one grid of patches")

    def _context(self, x: Tensor, images: Any, *_: Any) -> TokenContext:
        return TokenContext(window=self._grid(images))


class AxisAttention(nn.Module):
    """Multi-head self-attention along lines, with relative position keys.

    softmax(q (k + r)^T / sqrt(d)) v in each head, where r are the relative position keys, which heads share. The result
    is not projected.

    Args:
        channels: C, of the input and of the result.
        length: the longest line.
        num_heads: heads H.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        num_heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.length, self.num_heads = length, num_heads
        head_dim = head_dim_of(channels, num_heads)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False, device=device, dtype=dtype)
        self.rel_pos_keys = nn.Parameter(torch.empty(2 * length - 1, head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the weights such that queries, keys and values keep the variance of the input, and keys have one."""
        nn.init.normal_(self.qkv.weight, std=self.qkv.in_features**-0.5)
        nn.init.normal_(self.rel_pos_keys, std=self.rel_pos_keys.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return attention along the lines of x (B, lines, n, C), in its shape; n is at most ``length``."""
        n = x.shape[2]
        if n > self.length:
            raise ValueError(
                f"a line of {n} positions has distances without a key; accepted: up to {self.length} positions. Build "
                "the model with the img_size of the largest image"
            )
        qkv = fuse.linear(self.qkv, x.flatten(0, 1)).unflatten(-1, (3, self.num_heads, -1))
        near = self.rel_pos_keys[self.length - n : self.length + n - 1]
        out: Any = ops.attention_qkvpacked(qkv, rel_pos_keys=near)
        return out.flatten(2).unflatten(0, x.shape[:2])


class AxialAttention2d(nn.Module):
    """What stands for a 3x3 convolution in an axial ResNet: attention along columns, then along rows, then a mean.

    Args:
        channels: C, of the input and of the result.
        size: (height, width) of the largest feature map.
        stride: of the mean over stride x stride positions, which stands for the convolution's.
        num_heads: heads of each attention.
    """

    def __init__(
        self,
        channels: int,
        size: Pair,
        stride: int = 1,
        num_heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.column, self.row = (AxisAttention(channels, n, num_heads, device, dtype) for n in size)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ceil(H / stride), ceil(W / stride)) of x (B, C, H, W)."""
        x = self.column(x.permute(0, 3, 2, 1)).transpose(1, 2)  # (B, H, W, C)
        x = self.row(x).permute(0, 3, 1, 2)
        return F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x


class AxialResNet(ResNetV2):
    """A ResNet in which attention along columns and rows stands for every 3x3 convolution (Wang et al., 2020).

    "Axial-DeepLab: Stand-Alone Axial-Attention for Panoptic Segmentation" replaces them in a ResNet-50, as the ViT
    paper does for a baseline. Here it is the BiT ResNet, and attention with relative position keys; Wang et al.
    have relative queries and values too, and norms of queries, keys, values and scores.

    Args:
        layers: blocks of each of the four stages.
        img_size: (height, width) of the largest images, or one int; smaller ones are taken too.
        num_heads: heads of each attention.
        **options: as in :class:`fastvit.resnet.ResNetV2`.

    Raises:
        ValueError: a value that does not fit; the message names it and what is accepted.
    """

    def __init__(self, layers: Sequence[int], *, img_size: Size = 224, num_heads: int = 8, **options: Any) -> None:
        super().__init__(layers, **options)
        height, width = pair("img_size", img_size)
        size = -(-height // 4), -(-width // 4)  # after the stem
        for stage in self.stages:
            for block in stage.blocks:
                conv = block.conv2
                (stride, _), like = conv.stride, {"device": conv.weight.device, "dtype": conv.weight.dtype}
                block.conv2 = AxialAttention2d(conv.in_channels, size, stride, num_heads, **like)
                size = -(-size[0] // stride), -(-size[1] // stride)

    def init_weights(self) -> None:
        """Start all weights anew: those of attention too."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, AxisAttention):
                module.reset_parameters()
