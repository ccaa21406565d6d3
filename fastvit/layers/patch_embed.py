"""Images to patch tokens on :func:`fastvit.ops.patch_embed`, and the checks of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops
from fastvit.layers import fuse
from fastvit.layers.misc import pair, positive
from fastvit.layers.resample import resample_patch_embed
from fastvit.packing import PackedImages

Size = int | tuple[int, int]
Statistics = tuple[float, ...] | None  # of pixels: C values, in 0..1 units


def fits(name: str, size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Raise a ValueError where patches of ``patch`` don't tile ``size``."""
    if size[0] % patch[0] or size[1] % patch[1]:
        low = tuple(max(s // p, 1) * p for s, p in zip(size, patch, strict=True))
        high = tuple(math.ceil(s / p) * p for s, p in zip(size, patch, strict=True))
        raise ValueError(
            f"{name} {size[0]}x{size[1]} is not divisible by the patch {patch[0]}x{patch[1]}. Either pad images to "
            "whole patches, with dynamic_img_size=True and dynamic_img_pad=True, or resize them and call "
            f"set_input_size(({low[0]}, {low[1]})) or set_input_size(({high[0]}, {high[1]}))"
        )


@torch.fx.wrap
def image_size(images: Tensor, channels: int) -> tuple[int, int]:
    """Return (height, width) of images (B, C, H, W), or uint8 (B, H, W, C)."""
    channels_last = images.dtype == torch.uint8 and images.shape[1] != channels
    return (images.shape[1], images.shape[2]) if channels_last else (images.shape[2], images.shape[3])


def checked_statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[Statistics, Statistics]:
    """Return mean and std as tuples, which no .half() or .to() can round or move, or raise a ValueError."""
    if mean is None and std is None:
        return None, None
    values = [tuple(float(v) for v in t) if t is not None else () for t in (mean, std)]
    if any(len(t) != channels for t in values) or min(values[1]) <= 0:
        raise ValueError(f"mean={mean} and std={std} must come together, {channels} values each, std positive")
    return values[0], values[1]


def known_statistics(mean: Statistics, std: Statistics) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std for uint8 images, or raise a ValueError where the model has none."""
    if mean is None or std is None:
        raise ValueError(
            "uint8 images need the model's mean= and std= (in 0..1 units); floating images are taken as "
            "normalised already"
        )
    return mean, std


@torch.fx.wrap
def normalised(images: Tensor, channels: int, mean: Statistics, std: Statistics, dtype: torch.dtype) -> Tensor:
    """Return floating images as they are, and uint8 ones as (image / 255 - mean) / std, (B, C, H, W) in ``dtype``."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        return images
    mean, std = known_statistics(mean, std)
    if images.shape[1] != channels:
        images = images.permute(0, 3, 1, 2)
    low, high = (torch.tensor(t, device=images.device).view(-1, 1, 1) for t in (mean, std))
    return ((images / 255 - low) / high).to(dtype)


@torch.fx.wrap
def whole_patches(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return x (B, C, H, W) with zeros at the bottom and on the right up to whole patches."""
    down, right = -x.shape[2] % patch[0], -x.shape[3] % patch[1]
    return F.pad(x, (0, right, 0, down)) if down or right else x


@torch.fx.wrap
def accept(
    images: Tensor,
    channels: int,
    patch: tuple[int, int],
    size: tuple[int, int] | None,
    strict: bool,
    pad: bool,
    mean: Statistics = None,
    std: Statistics = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Statistics, Statistics]:
    """Return images, mean and std as ops.patch_embed takes them, or raise a ValueError that says what is accepted.

    Args:
        images: (B, C, H, W) floating, or uint8 (B, C, H, W) / (B, H, W, C), which stays uint8 unless it is padded.
        channels: C.
        patch: (height, width) of a patch.
        size: the model's (height, width), or None for any.
        strict: whether only ``size`` is accepted.
        pad: fill up to whole patches at the bottom and on the right with zeros.
        mean, std: C values in 0..1 units, of uint8 images alone: None is returned for floating ones.
        dtype: of uint8 images that are padded.
    """
    if images.dtype != torch.uint8:
        mean = std = None  # normalised already
    elif pad:
        images, mean, std = normalised(images, channels, mean, std, dtype), None, None
    elif images.ndim == 4:
        known_statistics(mean, std)
    if images.ndim != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, {channels}, H, W)")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(f"images have dtype {images.dtype}; accepted: floating point (normalised), or uint8")
    if images.shape[1] != channels and not (images.dtype == torch.uint8 and images.shape[3] == channels):
        raise ValueError(
            f"images have shape {tuple(images.shape)}: {images.shape[1]} channels; the model takes in_chans={channels}"
        )
    channels_last = images.shape[1] != channels
    height, width = images.shape[1:3] if channels_last else images.shape[2:]
    if size is not None and strict and (height, width) != size:
        if not pad:
            fits("the image's size", (height, width), patch)
        raise ValueError(
            f"the image is {height}x{width} and the model takes {size[0]}x{size[1]}; call "
            f"set_input_size(({height}, {width})), or build the model with dynamic_img_size=True to take any size"
        )
    if height < 1 or width < 1:
        raise ValueError(f"the image is {height}x{width}: it is empty")
    if not pad:
        fits("the image's size", (height, width), patch)
        return images, mean, std
    return whole_patches(images, patch), mean, std


def is_fused(layer: Any) -> bool:
    """Return whether a patch embedding is ours, a plain strided convolution as in ops.patch_embed and nothing after."""
    return fuse.is_fusable(layer, PatchEmbed) and layer.is_plain() and fuse.is_identity(layer.norm)


def resized(proj: nn.Conv2d, patch: tuple[int, int]) -> nn.Conv2d:
    """Return the projection of patches of another size, resampled (FlexiViT)."""
    new = nn.Conv2d(proj.in_channels, proj.out_channels, patch, patch, bias=proj.bias is not None, device="meta").train(
        proj.training
    )
    weight = resample_patch_embed(proj.weight.detach(), patch)
    new.weight, new.bias = nn.Parameter(weight, requires_grad=proj.weight.requires_grad), proj.bias
    return new


class PatchEmbed(nn.Module):
    """Cut images into patches and project each to a token, the ViT paper's equation 1; timm's arguments and keys.

    Args:
        img_size: (height, width) or one int; None takes any.
        patch_size: (height, width) or one int.
        in_chans: channels C of the image.
        embed_dim: width D of the tokens.
        norm_layer: norm class for the tokens, or None.
        flatten: False returns (B, D, h, w).
        output_fmt: "NLC", "NHWC" or "NCHW" instead of ``flatten``.
        bias: whether the projection has a bias.
        strict_img_size: whether only ``img_size`` is accepted.
        dynamic_img_pad: pad images with zeros to whole patches.
    """

    def __init__(
        self,
        img_size: Size | None = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if output_fmt not in (None, "NLC", "NHWC", "NCHW"):
            raise ValueError(f"unknown output_fmt {output_fmt!r}; accepted: NLC, NHWC, NCHW")
        self.patch_size = pair("patch_size", patch_size)
        self.in_chans = positive("in_chans", in_chans)
        self.output_fmt = output_fmt or ("NLC" if flatten else "NCHW")
        self.flatten = self.output_fmt == "NLC"
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self._resize(None if img_size is None else pair("img_size", img_size), self.patch_size)
        self.proj = nn.Conv2d(
            in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, device=device, dtype=dtype
        )
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim, device=device, dtype=dtype)

    def _resize(self, size: tuple[int, int] | None, patch: tuple[int, int]) -> None:
        """Set the patch, the size and the grid; a size that is refused leaves all as they were."""
        grid = None
        if size is not None:
            if size[0] < patch[0] or size[1] < patch[1]:
                raise ValueError(f"img_size {size[0]}x{size[1]} is smaller than one patch of {patch[0]}x{patch[1]}")
            if self.strict_img_size or not self.dynamic_img_pad:
                fits("img_size", size, patch)
            grid = (size[0] // patch[0], size[1] // patch[1])
        self.patch_size, self.img_size, self.grid_size = patch, size, grid
        self.num_patches = None if grid is None else grid[0] * grid[1]

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Take images of ``img_size`` from now on; a new ``patch_size`` resamples the projection (FlexiViT)."""
        before = self.patch_size
        new_patch = before if patch_size is None else pair("patch_size", patch_size)
        self._resize(self.img_size if img_size is None else pair("img_size", img_size), new_patch)
        if new_patch != before:
            self.proj = resized(self.proj, new_patch)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return the pixels per token: the larger side of a patch, or (height, width)."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, columns), the patches of an image of ``img_size``."""
        if self.dynamic_img_pad:
            return -(-img_size[0] // self.patch_size[0]), -(-img_size[1] // self.patch_size[1])
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def accept(self, images: Tensor, mean: Statistics, std: Statistics) -> tuple[Tensor, Statistics, Statistics]:
        """Return images, mean and std as ops.patch_embed takes them, or raise a ValueError; see ``accept`` above."""
        size, strict, pad = self.img_size, self.strict_img_size, self.dynamic_img_pad
        return accept(images, self.in_chans, self.patch_size, size, strict, pad, mean, std, self.proj.weight.dtype)

    def is_plain(self) -> bool:
        """Return whether the projection is the strided convolution that ops.patch_embed computes."""
        proj = self.proj
        return (
            fuse.is_fusable(proj, nn.Conv2d)
            and proj.stride == proj.kernel_size == self.patch_size
            and proj.padding == (0, 0)
            and proj.groups == 1
            and proj.dilation == (1, 1)
        )

    def forward(self, images: Tensor | PackedImages) -> Tensor:
        """Return the patches of images (B, C, H, W) as ``output_fmt``: (B, N, D), (B, h, w, D), (B, D, h, w).

        Pixels of uint8 images are divided by 255. Packed images give the patches of all, (1, N, D).

        Raises:
            ValueError: a number of channels or a size that is not accepted.
        """
        if isinstance(images, PackedImages):
            if self.is_plain():
                return self.norm(ops.patch_embed_packed(images, self.proj.weight, self.proj.bias))
            return self.norm(self.proj(images.patches()).flatten(1).unsqueeze(0))
        images, mean, std = self.accept(images, (0.0,) * self.in_chans, (1.0,) * self.in_chans)
        if self.is_plain():
            x = ops.patch_embed(images, self.proj.weight, self.proj.bias, mean=mean, std=std)  # (B, N, D)
            if not self.flatten:
                x = x.unflatten(1, (images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1]))
        else:
            x = self.proj(images).permute(0, 2, 3, 1)
            x = x.flatten(1, 2) if self.flatten else x
        if self.output_fmt == "NCHW":
            x = x.permute(0, 3, 1, 2)
        return self.norm(x)
