"""Images of any sizes end to end, as one sequence of patches: no padding, whatever the mix.

("Patch n' Pack: NaViT", Dehghani et al., 2023.) :func:`pack` looks at every image once, where they are made into a
batch. From there on sizes are tensors: nothing loops over images, waits for the device, or is compiled again for
another mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

Pair = tuple[int, int]


def multiples(step: int, count: int, like: Tensor) -> Tensor:
    """Return 0, step, ... count * step on the device of ``like``: (count + 1,) int32."""
    return step * torch.arange(count + 1, device=like.device, dtype=torch.int32)


class Sequences(NamedTuple):
    """Where the tokens of n images lie in a packed row of them."""

    cu_seqlens: Tensor  # (n + 1,) int32: where each begins, and the end
    longest: int  # tokens of the longest
    image: Tensor  # (total,) int64: the image of each token

    @staticmethod
    def of(cu_seqlens: Tensor, longest: int, total: int) -> Sequences:
        """Return the sequences that begin at ``cu_seqlens``, of ``total`` tokens in all."""
        tokens = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
        return Sequences(cu_seqlens, longest, torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True))

    @property
    def images(self) -> int:
        """Return n, the number of images."""
        return self.cu_seqlens.shape[0] - 1

    def leading(self, count: int) -> Sequences:
        """Return the sequences of the first ``count`` tokens of each image alone."""
        return Sequences.of(multiples(count, self.images, self.image), count, self.images * count)

    def leading_tokens(self, count: int) -> Tensor:
        """Return the indices of each image's first ``count`` tokens, (n * count,) int64."""
        each = torch.arange(count, device=self.image.device)
        return (self.cu_seqlens[:-1].long().unsqueeze(1) + each).flatten()

    def with_leading(self, count: int) -> Sequences:
        """Return the sequences with ``count`` tokens more in front of each image's."""
        cu_seqlens = self.cu_seqlens + multiples(count, self.images, self.image)
        return Sequences.of(cu_seqlens, self.longest + count, self.image.shape[0] + self.images * count)

    def without(self, count: int) -> tuple[Sequences, Tensor]:
        """Return the sequences without each image's first ``count`` tokens, and the indices of the others, int64."""
        cu_seqlens = self.cu_seqlens - multiples(count, self.images, self.image)
        rest = Sequences.of(cu_seqlens, self.longest - count, self.image.shape[0] - self.images * count)
        return rest, torch.arange(rest.image.shape[0], device=self.image.device) + (rest.image + 1) * count


class Layout(NamedTuple):
    """Where n images lie in a buffer of pixels, and their N patches of p x q in the images."""

    starts: Tensor  # (n,) int64: where an image begins
    sizes: Tensor  # (n, 2) int32: its height and width in pixels, whole patches
    cu_patches: Tensor  # (n + 1,) int32: its first patch, and at the end N
    image: Tensor  # (N,) int32: the image of each patch
    row: Tensor  # (N,) int32: its place in the grid of that image's patches
    column: Tensor  # (N,) int32

    def cu_seqlens(self, prefix: int) -> Tensor:
        """Return where each image begins, with ``prefix`` tokens before its patches, and the end: (n + 1,) int32."""
        return self.cu_patches + multiples(prefix, self.starts.shape[0], self.image)

    def patch_tokens(self, prefix: int) -> Tensor:
        """Return the indices of the patches among those tokens, (N,) int64."""
        patches = torch.arange(self.image.shape[0], device=self.image.device)
        return patches + (self.image.long() + 1) * prefix

    def prefix_tokens(self, prefix: int) -> Tensor:
        """Return the indices of the prefix tokens among them, (n, prefix) int64."""
        each = torch.arange(prefix, device=self.image.device)
        return self.cu_seqlens(prefix)[:-1].long().unsqueeze(1) + each

    def pixels(self, channels: int, patch_size: Pair) -> Tensor:
        """Return where the pixels of each patch are, (N, C, p, q) int64."""

        def along(size: int, dims: int) -> Tensor:
            return torch.arange(size, device=self.image.device).view(-1, *[1] * dims)

        (p, q), (height, width) = patch_size, self.sizes[self.image].long().unbind(1)
        first = (self.starts[self.image] + self.row * p * width + self.column * q).view(-1, 1, 1, 1)
        height, width = height.view(-1, 1, 1, 1), width.view(-1, 1, 1, 1)
        return first + (along(channels, 2) * height + along(p, 1)) * width + along(q, 0)


@dataclass(frozen=True, eq=False, repr=False)
class PackedImages:
    """n images of any sizes, (C, H, W) each, whole patches of p x q, N in all. :func:`pack` makes them."""

    pixels: Tensor  # (sum of C * H * W,) floating or uint8: one image after the other
    layout: Layout
    patch_size: Pair  # (p, q)
    channels: int  # C
    max_patches: int  # of the largest image
    grids: tuple[Pair, ...]  # (rows, columns) of each image's patches, on the host

    def __len__(self) -> int:
        return self.layout.starts.shape[0]

    def __repr__(self) -> str:
        patches, (p, q) = self.layout.image.shape[0], self.patch_size
        return f"PackedImages({len(self)} images, {patches} patches of {p}x{q}, {self.pixels.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        """Return the device of the pixels and the layout."""
        return self.pixels.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedImages:
        """Return the images on another device."""
        layout = Layout(*(table.to(device, non_blocking=non_blocking) for table in self.layout))
        return replace(self, pixels=self.pixels.to(device, non_blocking=non_blocking), layout=layout)

    def pin_memory(self) -> PackedImages:
        """Return the images in pinned memory, which ``to("cuda", non_blocking=True)`` copies without waiting."""
        return replace(self, pixels=self.pixels.pin_memory(), layout=Layout(*(t.pin_memory() for t in self.layout)))

    def patches(self) -> Tensor:
        """Return the pixels of every patch, (N, C, p, q)."""
        return self.pixels[self.layout.pixels(self.channels, self.patch_size)]

    def with_patches(self, patches: Tensor) -> PackedImages:
        """Return the images with other values, patch by patch as :meth:`patches` returns them."""
        pixels = patches.new_empty(self.pixels.shape)
        return replace(self, pixels=pixels.index_put((self.layout.pixels(self.channels, self.patch_size),), patches))

    def sequences(self, prefix: int = 0) -> Sequences:
        """Return where the tokens lie when each image's patches come after ``prefix`` tokens of its own."""
        total = self.layout.image.shape[0] + len(self) * prefix
        return Sequences.of(self.layout.cu_seqlens(prefix), self.max_patches + prefix, total)


def _flatten(packed: PackedImages) -> tuple[list[Any], tuple[Pair, int, tuple[Pair, ...]]]:
    return [packed.pixels, packed.layout, packed.max_patches], (packed.patch_size, packed.channels, packed.grids)


def _unflatten(leaves: Any, context: tuple[Pair, int, tuple[Pair, ...]]) -> PackedImages:
    pixels, layout, max_patches = leaves
    patch_size, channels, grids = context
    return PackedImages(pixels, layout, patch_size, channels, max_patches, grids)


_pytree.register_pytree_node(PackedImages, _flatten, _unflatten, serialized_type_name="fastvit.PackedImages")


def pack(images: Sequence[Tensor], patch_size: int | Pair, *, channels: int = 3, pad: bool = False) -> PackedImages:
    """Pack images for :class:`fastvit.ViT`: their pixels are copied once, into one buffer.

    Args:
        images: (C, H, W) each, floating (normalised) or uint8, or uint8 (H, W, C); one dtype and device for all.
        patch_size: (height, width) of the model's patches, or one int.
        channels: C.
        pad: fill floating images up to whole patches at the bottom and on the right with zeros.

    Raises:
        ValueError: an image that doesn't fit; the message names it by its place in the list, and its size.
    """
    p, q = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if len(images) == 0:
        raise ValueError("there are no images to pack")
    first = images[0]
    for i, image in enumerate(images):
        if image.dtype != first.dtype or image.device != first.device:
            raise ValueError(
                f"image {i} is {image.dtype} on {image.device}, image 0 is {first.dtype} on {first.device}; "
                "all must have one dtype and be on one device"
            )
    planes = [_planes(f"image {i}", image, channels, (p, q), pad) for i, image in enumerate(images)]
    sizes = torch.tensor([image.shape[1:] for image in planes])
    grids = sizes // torch.tensor([p, q])
    values, patches = channels * sizes.prod(1), grids.prod(1)
    ends = patches.cumsum(0)
    if ends[-1] >= 2**31:
        raise ValueError(f"the images have {ends[-1]} patches; accepted: fewer than 2^31")
    image_of = torch.repeat_interleave(torch.arange(len(planes)), patches)
    within, columns = torch.arange(len(image_of)) - (ends - patches)[image_of], grids[image_of, 1]
    layout = Layout(
        starts=values.cumsum(0) - values,
        sizes=sizes.int(),
        cu_patches=F.pad(ends, (1, 0)).int(),
        image=image_of.int(),
        row=(within // columns).int(),
        column=(within % columns).int(),
    )
    return PackedImages(
        pixels=torch.cat([image.reshape(-1) for image in planes]),
        layout=Layout(*(table.to(first.device, non_blocking=True) for table in layout)),
        patch_size=(p, q),
        channels=channels,
        max_patches=int(patches.max()),
        grids=tuple((rows, columns) for rows, columns in grids.tolist()),
    )


def _planes(name: str, image: Tensor, channels: int, patch: Pair, pad: bool) -> Tensor:
    """Return the image as (C, H, W), whole patches, or raise a ValueError that names the image and the value."""
    shape = tuple(image.shape)
    if not (image.is_floating_point() or image.dtype == torch.uint8):
        raise ValueError(f"{name} has dtype {image.dtype}; accepted: floating point (normalised), or uint8")
    if image.ndim == 3 and image.dtype == torch.uint8 and shape[0] != channels and shape[2] == channels:
        image = image.permute(2, 0, 1)
    if image.ndim != 3 or image.shape[0] != channels:
        raise ValueError(f"{name} has shape {shape}; expected ({channels}, H, W)")
    (height, width), (p, q) = image.shape[1:], patch
    if height < 1 or width < 1:
        raise ValueError(f"{name} is {height}x{width}: it is empty")
    if image.numel() >= 2**31:
        raise ValueError(f"{name} is {height}x{width} with {channels} channels; accepted: fewer than 2^31 values")
    if height % p == 0 and width % q == 0:
        return image
    if pad and image.is_floating_point():
        return F.pad(image, (0, -width % q, 0, -height % p))
    refused = (
        "only floating images, normalised, are padded: no byte is the zero of all channels"
        if pad
        else ("resize it, or pad images to whole patches (pack(..., pad=True), or a model with dynamic_img_pad=True)")
    )
    raise ValueError(f"{name} is {height}x{width}, not divisible by the patch {p}x{q}; {refused}")
