"""The hybrids of the ViT paper (section 3.1): patches of a ResNet's feature map, with timm's keys.

The backbone is the paper's code's: BiT's standardised convolutions and GroupNorm, in the order of He et al. (2015), and
padded as TensorFlow pads ("SAME"). It runs in plain PyTorch; the transformer behind it is a :class:`fastvit.ViT`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.layers.misc import pair, positive
from fastvit.layers.patch_embed import Size, accept, resized, whole_patches
from fastvit.models.resnet import CHANNELS, STEM_CHANNELS, GroupNormReLU, StdConv2d, run_stages, standardised

Pair = tuple[int, int]

for _name in ("accept", "standardised", "whole_patches"):  # symbolic tracing sees a call, not its checks
    torch.fx.wrap(_name)


@torch.fx.wrap
def same_padded(x: Tensor, kernel: int, stride: int, value: float) -> Tensor:
    """Return x (B, C, H, W) with ``value`` around, for ceil(H / stride) x ceil(W / stride) positions."""
    around: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        around += [total // 2, total - total // 2]
    return F.pad(x, around, value=value) if any(around) else x


class StdConv2dSame(StdConv2d):
    """:class:`StdConv2d`, padded with :func:`same_padded`: with a stride, not by half the kernel on each side."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', ceil(H / stride), ceil(W / stride)) of x (B, C, H, W)."""
        x = same_padded(x, self.kernel_size[0], self.stride[0], 0.0)
        return F.conv2d(x, standardised(self.weight, self.eps), None, self.stride)


class MaxPool2dSame(nn.MaxPool2d):
    """Max pooling that sees nothing outside of the image, padded with :func:`same_padded`."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__(kernel_size, stride)
        self.window = kernel_size, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ceil(H / stride), ceil(W / stride)) of x (B, C, H, W)."""
        return super().forward(same_padded(x, *self.window, -torch.inf))


class Bottleneck(nn.Module):
    """relu(shortcut + norm(conv1x1(relu(norm(conv3x3(relu(norm(conv1x1(x)))))))); the 3x3 convolution has the stride.

    Args:
        in_channels, out_channels: of the block; a quarter of ``out_channels`` within.
        stride: of the 3x3 convolution, and of the shortcut's.
        downsample: a normed 1x1 convolution as the shortcut (each stage's first block has one).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        downsample: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        middle = out_channels // 4
        self.downsample = None
        if downsample:
            conv = StdConv2dSame(in_channels, out_channels, 1, stride, **dd)
            self.downsample = nn.Sequential(OrderedDict(conv=conv, norm=nn.GroupNorm(32, out_channels, **dd)))
        self.conv1 = StdConv2dSame(in_channels, middle, 1, **dd)
        self.norm1 = GroupNormReLU(middle, **dd)
        self.conv2 = StdConv2dSame(middle, middle, 3, stride, **dd)
        self.norm2 = GroupNormReLU(middle, **dd)
        self.conv3 = StdConv2dSame(middle, out_channels, 1, **dd)
        self.norm3 = nn.GroupNorm(32, out_channels, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', ceil(H / stride), ceil(W / stride)) of x (B, C, H, W)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        branch = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return F.relu_(self.norm3(self.conv3(branch)) + shortcut)


class Backbone(nn.Module):
    """The ResNet of a hybrid, which cuts its feature map into patches: the stem, which has stride 4, and some stages.

    Args:
        layers: blocks of each stage, up to four; () leaves the stem alone, which then has no name of its own.
        in_chans: channels of the images.
    """

    def __init__(
        self,
        layers: Sequence[int],
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not isinstance(layers, (tuple, list)) or len(layers) > len(CHANNELS):
            raise ValueError(f"layers must be the numbers of blocks of up to {len(CHANNELS)} stages, got {layers!r}")
        self.layers = tuple(positive(f"layers[{i}]", depth) for i, depth in enumerate(layers))
        self.grad_checkpointing = False
        stem = nn.Sequential(
            OrderedDict(
                conv=StdConv2dSame(in_chans, STEM_CHANNELS, 7, 2, **dd),
                norm=GroupNormReLU(STEM_CHANNELS, **dd),
                pool=MaxPool2dSame(3, 2),
            )
        )
        self.num_features = STEM_CHANNELS
        if not layers:
            for name, module in stem.named_children():
                self.add_module(name, module)
            return
        self.stem, self.stages = stem, nn.Sequential()
        for i, depth in enumerate(self.layers):
            blocks = nn.Sequential()
            for j in range(depth):
                stride = 2 if j == 0 and i > 0 else 1
                blocks.append(Bottleneck(self.num_features, CHANNELS[i], stride, j == 0, **dd))
                self.num_features = CHANNELS[i]
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks)))

    def init_weights(self) -> None:
        """Start all weights, as timm: He's normal for convolutions, and each block as its shortcut."""
        for module in self.modules():
            if isinstance(module, StdConv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input in training, and run the block again in backward."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature map of images (B, C, H, W): (B, C', ceil(H / reduction), ceil(W / reduction))."""
        if not self.layers:
            return self.pool(self.norm(self.conv(x)))
        return run_stages(self.stages, self.stem(x), self.grad_checkpointing)


def reduction(layers: Sequence[int]) -> int:
    """Return the pixels of an image to one of the feature map, on a side: the stem's 4, doubled by each later stage."""
    return 4 * 2 ** max(len(layers) - 1, 0)


def _features(size: Pair, reduction: int) -> Pair:
    """Return (height, width) of the feature map of an image of ``size``."""
    return -(-size[0] // reduction), -(-size[1] // reduction)


def _fits(name: str, size: Pair, patch: Pair, reduction: int) -> None:
    """Raise a ValueError where patches don't tile the feature map of an image of ``size``."""
    height, width = _features(size, reduction)
    if height % patch[0] or width % patch[1]:
        raise ValueError(
            f"{name} {size[0]}x{size[1]} has a feature map of {height}x{width}, which patches of {patch[0]}x{patch[1]} "
            f"don't tile; accepted: multiples of {reduction * patch[0]}x{reduction * patch[1]} pixels, or any size "
            "with dynamic_img_size=True and dynamic_img_pad=True"
        )


@torch.fx.wrap
def _whole(images: Tensor, patch: Pair, reduction: int) -> Tensor:
    """Return images (B, C, H, W), or raise a ValueError where patches don't tile their feature map."""
    _fits("the image", (images.shape[2], images.shape[3]), patch, reduction)
    return images


class HybridEmbed(nn.Module):
    """A ViT's patch embedding that projects patches of a ResNet's feature map; timm's keys.

    ``fastvit.ViT(patch_size=1, embed_layer=partial(HybridEmbed, layers=(3, 4, 9)))`` is the paper's R50+ViT/16.

    Args:
        layers: blocks of each stage of the :class:`Backbone`.
        img_size: (height, width) or one int.
        patch_size: (height, width) of a patch of the feature map, or one int.
        in_chans: channels of the images.
        embed_dim: width D of the tokens.
        bias: whether the projection has a bias.
        output_fmt: "NHWC" returns (B, h, w, D).
        strict_img_size: whether only ``img_size`` is accepted.
        dynamic_img_pad: pad the feature map with zeros to whole patches.

    Raises:
        ValueError: a value that does not fit; the message names it and what is accepted.
    """

    def __init__(
        self,
        layers: Sequence[int],
        img_size: Size = 224,
        patch_size: Size = 1,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        output_fmt: str = "NLC",
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if output_fmt not in ("NLC", "NHWC"):
            raise ValueError(f"unknown output_fmt {output_fmt!r}; accepted: NLC, NHWC")
        self.in_chans = positive("in_chans", in_chans)
        self.flatten = output_fmt == "NLC"
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.backbone = Backbone(layers, in_chans, **dd)
        self.reduction = reduction(layers)
        self._resize(pair("img_size", img_size), pair("patch_size", patch_size))
        self.proj = nn.Conv2d(self.backbone.num_features, embed_dim, self.patch_size, self.patch_size, bias=bias, **dd)

    def _resize(self, size: Pair, patch: Pair) -> None:
        """Set the patch, the size and the grid; a size that is refused leaves all as they were."""
        if not self.dynamic_img_pad:
            _fits("img_size", size, patch, self.reduction)
        self.patch_size, self.img_size = patch, size
        self.grid_size = self.dynamic_feat_size(size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Take images of ``img_size`` from now on; a new ``patch_size`` resamples the projection."""
        patch = self.patch_size if patch_size is None else pair("patch_size", patch_size)
        before = self.patch_size
        self._resize(self.img_size if img_size is None else pair("img_size", img_size), patch)
        if patch != before:
            self.proj = resized(self.proj, patch)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block of the backbone in backward."""
        self.backbone.set_grad_checkpointing(enable)

    def feat_ratio(self, as_scalar: bool = True) -> int | Pair:
        """Return the pixels per token: the larger side, or (height, width)."""
        height, width = (self.reduction * side for side in self.patch_size)
        return max(height, width) if as_scalar else (height, width)

    def dynamic_feat_size(self, img_size: Pair) -> Pair:
        """Return (rows, columns), the patches of an image of ``img_size``."""
        (height, width), (p, q) = _features(img_size, self.reduction), self.patch_size
        return -(-height // p), -(-width // q)

    def accept(self, images: Tensor) -> Tensor:
        """Return the images, or raise a ValueError where their feature map is not whole patches."""
        images, _, _ = accept(images, self.in_chans, (1, 1), self.img_size, self.strict_img_size, False)
        return images if self.dynamic_img_pad else _whole(images, self.patch_size, self.reduction)

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens of floating images (B, C, H, W): (B, N, D), or (B, h, w, D) with ``output_fmt`` "NHWC"."""
        x = self.proj(whole_patches(self.backbone(self.accept(images)), self.patch_size))
        return x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1)
