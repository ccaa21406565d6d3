"""Masked patch prediction, the ViT paper's self-supervision (appendix B.1.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.layers.misc import positive, rate
from fastvit.models import ViT
from fastvit.training.objectives import Batch
from fastvit.training.pretrain.encoder import CorruptedImages, Pixels

MASKED, SWAPPED = 0.8, 0.1  # of the corrupted patches; the rest is kept as it is
LEVELS = 8  # of a channel: 3 bits


class Corruption(NamedTuple):
    """The patches of each image to predict, and what replaces them.

    Args:
        chosen: (B, M), the patches to predict.
        masked: (B, N) bool, where the [mask] embedding goes.
        source: (B, N), the patch whose embedding stands there otherwise: another one's, or its own.
    """

    chosen: Tensor
    masked: Tensor
    source: Tensor

    @classmethod
    def draw(cls, images: int, patches: int, share: float, device: torch.device | str = "cpu") -> Corruption:
        """Choose round(share * patches) patches of each image; of these 80% are masked, 10% another's, 10% kept.

        Each patch's fate is drawn on its own (as words' are in BERT), from PyTorch's generator on ``device``.

        Raises:
            ValueError: a share that is none, or that leaves nothing to predict or nothing to swap with.
        """
        count = round(rate("share", share) * patches)
        if count < 1 or patches < 2:
            raise ValueError(f"share={share} of {patches} patches corrupts {count}; it takes 1 at least, of 2 patches")
        chosen = torch.rand(images, patches, device=device).argsort(1)[:, :count]
        fate = torch.rand(images, count, device=device)
        other = (chosen + torch.randint(1, patches, (images, count), device=device)) % patches
        swapped = (fate >= MASKED) & (fate < MASKED + SWAPPED)
        masked = torch.zeros(images, patches, dtype=torch.bool, device=device).scatter(1, chosen, fate < MASKED)
        source = torch.arange(patches, device=device).repeat(images, 1)
        return cls(chosen, masked, source.scatter(1, chosen, torch.where(swapped, other, chosen)))

    def apply(self, x: Tensor, mask_token: Tensor) -> Tensor:
        """Return patch embeddings (B, N, D) corrupted; mask_token (D,)."""
        swapped = x.gather(1, self.source.unsqueeze(-1).expand_as(x))
        return torch.where(self.masked.unsqueeze(-1), mask_token.to(x.dtype), swapped)


def mean_colours(pixels: Tensor, patch: tuple[int, int], cells: int = 1) -> Tensor:
    """Return the mean colour of each patch, 3 bits a channel, as one number; or of ``cells`` x ``cells`` parts of it.

    Args:
        pixels: (B, C, H, W) in 0..1.
        patch: (height, width), which tiles the image and is tiled by cells.

    Returns:
        (B, N, cells * cells) int64 below 8 ** C; the first channel's bits are the highest.
    """
    levels = (F.avg_pool2d(pixels, (patch[0] // cells, patch[1] // cells)) * LEVELS).long().clamp(0, LEVELS - 1)
    digits = LEVELS ** torch.arange(levels.shape[1] - 1, -1, -1, device=pixels.device)
    colours = (levels * digits.view(-1, 1, 1)).sum(1)  # (B, h * cells, w * cells)
    return F.pixel_unshuffle(colours.unsqueeze(1), cells).flatten(2).transpose(1, 2)


class Colours(NamedTuple):
    """3-bit mean colours of ``cells`` x ``cells`` parts: option 1 of the paper with one, option 2 with 4 x 4."""

    cells: int

    def outputs(self, patch: tuple[int, int], channels: int) -> int:
        """Return how many numbers the head has for a patch."""
        if patch[0] % self.cells or patch[1] % self.cells:
            raise ValueError(f"a patch of {patch[0]}x{patch[1]} has no {self.cells}x{self.cells} equal parts")
        return int(self.cells**2 * LEVELS**channels)

    def of(self, images: Tensor, pixels: Tensor, patch: tuple[int, int]) -> Tensor:
        """Return the targets (B, N, ...) of images (B, C, H, W), normalised and in 0..1."""
        return mean_colours(pixels, patch, self.cells)

    def scores(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the loss and other metrics of a prediction (B, M, outputs)."""
        logits = prediction.unflatten(-1, (self.cells**2, -1)).flatten(0, 2)
        right = logits.argmax(-1) == target.flatten()
        return {"loss": F.cross_entropy(logits, target.flatten()), "accuracy": right.float().mean()}


class Regression:
    """All of the patch's normalised pixels by L2: option 3 of the paper. Methods are those of :class:`Colours`."""

    def outputs(self, patch: tuple[int, int], channels: int) -> int:
        return channels * patch[0] * patch[1]

    def of(self, images: Tensor, pixels: Tensor, patch: tuple[int, int]) -> Tensor:
        return F.unfold(images, patch, stride=patch).transpose(1, 2)

    def scores(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(prediction, target)}


TARGETS: dict[str, Colours | Regression] = {"colour": Colours(1), "colours": Colours(4), "pixels": Regression()}


class MaskedPatches(CorruptedImages):
    """Corrupt half of the patch embeddings and predict something of each corrupted patch from its representation.

    The embeddings are corrupted before positions are added, so every patch knows where it is.

    Args:
        model: a :class:`fastvit.ViT` with num_classes=0.
        mean, std: C values each, which images were normalised with: colours are of pixels in 0..1.
        target: "colour", the mean 3-bit colour (512 classes of RGB), which the paper's final results are of;
            "colours", those of 4 x 4 parts of the patch; "pixels", regression by L2.
        share: of the patches that are corrupted.
    """

    def __init__(
        self, model: ViT, mean: Sequence[float], std: Sequence[float], target: str = "colour", share: float = 0.5
    ) -> None:
        super().__init__(model)
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}; accepted: {', '.join(map(repr, TARGETS))}")
        self.target = TARGETS[target]
        Corruption.draw(0, model.patch_embed.num_patches, share)  # refuses a share that does not fit
        self.share = share
        self.pixels = Pixels(mean, std)
        self.patch: tuple[int, int] = model.patch_embed.feat_ratio(as_scalar=False)  # in pixels, of a hybrid too
        self.predict = self.head(self.target.outputs(self.patch, positive("in_chans", model.in_chans)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and, of colours, "accuracy" over the corrupted patches of batch["image"] (B, C, H, W).

        Raises:
            ValueError: images that are no whole patches: a model may pad them, and has no target there.
        """
        images = batch["image"]
        if images.shape[2] % self.patch[0] or images.shape[3] % self.patch[1]:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]}; accepted: whole patches of "
                f"{self.patch[0]}x{self.patch[1]} pixels"
            )
        target = self.target.of(images, self.pixels(images), self.patch)
        corruption = Corruption.draw(target.shape[0], target.shape[1], self.share, images.device)

        def at_chosen(x: Tensor) -> Tensor:
            return x.gather(1, corruption.chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

        tokens = self.encode(images, lambda x: corruption.apply(x, self.mask_token))
        return self.target.scores(self.predict(at_chosen(tokens)).float(), at_chosen(target))
