"""The BiT ResNets that the ViT paper compares with, as timm's ``resnetv2_*_bit``, with its state_dict keys.

"Big Transfer" (Kolesnikov et al., 2020): pre-activation ResNets (He et al., "Identity Mappings in Deep Residual
Networks", 2016) with GroupNorm for BatchNorm and weight-standardised convolutions (Qiao et al., 2019). They are
baselines in plain PyTorch; none of fastvit's ops run in them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvit.layers.misc import DropPath, count, positive, rate

POOLS = ("", "avg", "max", "avgmax")
STEM_CHANNELS, CHANNELS = 64, (256, 512, 1024, 2048)  # of the stem and of each stage's output, at width 1


@torch.fx.wrap
def standardised(weight: Tensor, eps: float) -> Tensor:
    """Return filters (O, I, p, q) shifted and scaled to mean 0 and variance 1 each, in the memory format they have.

    It is LayerNorm without weights over a filter's elements, in whichever order they lie in memory: one kernel, with
    float32 statistics.
    """
    if weight.is_contiguous():
        return F.layer_norm(weight, weight.shape[1:], eps=eps)
    filters = weight.permute(0, 2, 3, 1)  # contiguous where the weights are channels-last
    return F.layer_norm(filters, filters.shape[1:], eps=eps).permute(0, 3, 1, 2)


@torch.fx.wrap
def _accept(images: Tensor, channels: int) -> Tensor:
    """Return ``images``, or raise a ValueError that says what is accepted."""
    if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise ValueError(
            f"images are {tuple(images.shape)} {images.dtype}; accepted: (B, {channels}, H, W), floating, normalised"
        )
    return images


class StdConv2d(nn.Conv2d):
    """A convolution with weight standardisation (Qiao et al., 2019), no bias, padded by half the kernel.

    Args:
        in_channels, out_channels, kernel_size, stride: as in nn.Conv2d.
        eps: added to the variance of a filter; BiT's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        padding = kernel_size // 2
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, bias=False, device=device, dtype=dtype
        )
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', ceil(H / stride), ceil(W / stride)) of x (B, C, H, W), for an odd kernel."""
        return F.conv2d(x, standardised(self.weight, self.eps), None, self.stride, self.padding)


class GroupNormReLU(nn.GroupNorm):
    """GroupNorm over 32 groups (Wu and He, 2018), then ReLU: x (B, C, H, W) -> the same shape.

    On a CPU the result has x's memory format. PyTorch's CUDA kernel returns contiguous tensors: with channels-last
    weights each next convolution converts them back, unless torch.compile chooses the layouts.
    """

    def __init__(
        self, num_channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(32, num_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x))


class Bottleneck(nn.Module):
    """A pre-activation bottleneck: x + conv1x1(conv3x3(conv1x1(x))), with GroupNorm and ReLU before each convolution.

    Args:
        in_channels, out_channels: of the block; a quarter of ``out_channels`` within.
        stride: of the 3x3 convolution, and of the shortcut's.
        downsample: a 1x1 convolution of the normed input as the shortcut (each stage's first block has one).
        drop_path_rate: stochastic depth in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        downsample: bool = False,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        middle = out_channels // 4
        self.downsample = (
            nn.Sequential(OrderedDict(conv=StdConv2d(in_channels, out_channels, 1, stride, **dd)))
            if downsample
            else None
        )
        self.norm1 = GroupNormReLU(in_channels, **dd)
        self.conv1 = StdConv2d(in_channels, middle, 1, **dd)
        self.norm2 = GroupNormReLU(middle, **dd)
        self.conv2 = StdConv2d(middle, middle, 3, stride, **dd)
        self.norm3 = GroupNormReLU(middle, **dd)
        self.conv3 = StdConv2d(middle, out_channels, 1, **dd)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C', ceil(H / stride), ceil(W / stride)) of x (B, C, H, W)."""
        normed = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(normed)
        branch = self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(normed)))))
        return self.drop_path(branch) + shortcut


def run_stages(stages: nn.Sequential, x: Tensor, checkpointing: bool) -> Tensor:
    """Return x (B, C, H, W) after all blocks, which with ``checkpointing`` run again in backward."""
    if not checkpointing:
        return stages(x)
    for stage in stages:
        for block in stage.blocks:
            x = checkpoint(block, x, use_reentrant=False)
    return x


class Head(nn.Module):
    """Pool, dropout, and the classifier as a 1x1 convolution.

    Args:
        in_channels: of the feature map.
        num_classes: 0 leaves the classifier out.
        global_pool: "avg", "max", "avgmax" (their mean) or "" (none: logits of every position).
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if global_pool not in POOLS:
            raise ValueError(f"unknown global_pool {global_pool!r}; accepted: {', '.join(map(repr, POOLS))}")
        self.global_pool = global_pool
        self.drop = nn.Dropout(rate("drop_rate", drop_rate))
        self.fc: nn.Module = nn.Identity()
        if count("num_classes", num_classes):
            self.fc = nn.Conv2d(in_channels, num_classes, 1, device=device, dtype=dtype)

    def pool(self, x: Tensor) -> Tensor:
        """Return the pooled x (B, C, H, W), (B, C, 1, 1), or x where the pool is ""."""
        match self.global_pool:
            case "avg":
                return x.mean((2, 3), keepdim=True)
            case "max":
                return x.amax((2, 3), keepdim=True)
            case "avgmax":
                return 0.5 * (x.amax((2, 3), keepdim=True) + x.mean((2, 3), keepdim=True))
        return x

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, num_classes) of x (B, C, H, W), or (B, C) with ``pre_logits``; (H, W) if unpooled."""
        x = self.drop(self.pool(x))
        if not pre_logits:
            x = self.fc(x)
        return x.flatten(1) if self.global_pool else x


class ResNetV2(nn.Module):
    """A BiT ResNet with timm's names: R50x1 is ``ResNetV2((3, 4, 6, 3))``; see ``create_model`` for the others.

    ``load_state_dict(timm.create_model("resnetv2_50x1_bit").state_dict())`` gives timm's logits. Its weights may be in
    channels-last format (``model.to(memory_format=torch.channels_last)``), and stay so.

    Args:
        layers: blocks of each of the four stages.
        num_classes: rows of the classifier; 0 leaves it out.
        in_chans: channels of the images.
        global_pool: "avg", "max", "avgmax" or "" (no pooling).
        width_factor: multiplies every layer's channels.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        device, dtype: of the parameters.

    Raises:
        ValueError: a value that does not fit; the message names it and what is accepted.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        width_factor: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not isinstance(layers, (tuple, list)) or len(layers) != len(CHANNELS):
            raise ValueError(f"layers must be the numbers of blocks of {len(CHANNELS)} stages, got {layers!r}")
        depths = [positive(f"layers[{i}]", depth) for i, depth in enumerate(layers)]
        width = positive("width_factor", width_factor)
        self.num_classes, self.in_chans = count("num_classes", num_classes), positive("in_chans", in_chans)
        self.grad_checkpointing = False

        channels = STEM_CHANNELS * width
        self.stem = nn.Sequential(
            OrderedDict(
                conv=StdConv2d(in_chans, channels, 7, 2, **dd),
                pad=nn.ConstantPad2d(1, 0.0),  # zeros, where padding within the pool would be -inf
                pool=nn.MaxPool2d(3, 2),
            )
        )
        drop_paths = torch.linspace(0, rate("drop_path_rate", drop_path_rate), sum(depths), device="cpu").tolist()
        self.stages = nn.Sequential()
        for i, (depth, out_channels) in enumerate(zip(depths, CHANNELS, strict=True)):
            blocks = nn.Sequential()
            for j in range(depth):
                stride = 2 if j == 0 and i > 0 else 1
                blocks.append(Bottleneck(channels, out_channels * width, stride, j == 0, drop_paths.pop(0), **dd))
                channels = out_channels * width
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks)))
        self.num_features = self.head_hidden_size = channels
        self.norm = GroupNormReLU(channels, **dd)
        self.head = Head(channels, num_classes, global_pool, drop_rate, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Start all weights anew, as timm: He's normal for convolutions, normal(0.01) for the classifier."""
        for module in self.modules():
            if isinstance(module, StdConv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, GroupNormReLU):
                module.reset_parameters()
        for name, parameter in self.head.named_parameters():
            nn.init.normal_(parameter, std=0.01) if name == "fc.weight" else nn.init.zeros_(parameter)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input in training, and run the block again in backward."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last layer: a 1x1 convolution, or an Identity without classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a zero-initialised one, and the pool where ``global_pool`` names one.

        Raises:
            ValueError: an unknown pool, or a bad number of classes.
        """
        pool = self.head.global_pool if global_pool is None else global_pool
        weight = self.norm.weight
        head = Head(self.num_features, num_classes, pool, self.head.drop.p, device=weight.device, dtype=weight.dtype)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        self.head, self.num_classes = head.train(self.training), num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map of images (B, C, H, W), normed: (B, num_features, ceil(H / 32), ceil(W / 32)).

        Raises:
            ValueError: images of another shape or dtype than accepted.
        """
        x = self.stem(_accept(x, self.in_chans))
        return self.norm(run_stages(self.stages, x, self.grad_checkpointing))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, num_classes) of a feature map, or with ``pre_logits`` the classifier's input (B, C)."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W), floating and normalised."""
        return self.forward_head(self.forward_features(x))
