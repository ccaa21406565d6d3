"""BEiT (Bao et al., 2021): predict the visual tokens of patches that are masked in blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.layers.misc import positive, rate
from fastvit.models import ViT
from fastvit.training.objectives import Batch
from fastvit.training.pretrain.dvae import DVAE
from fastvit.training.pretrain.encoder import CorruptedImages

TRIES = 10  # blocks in a row that don't fit, after which a mask is done


def blockwise_masks(
    images: int, grid: tuple[int, int], share: float = 0.4, least: int = 16, aspect: float = 0.3
) -> Tensor:
    """Draw masks of whole blocks of patches, by BEiT's algorithm 1, on the CPU.

    Blocks of ``least`` patches or more, of which each side is at most 1 / aspect times the other, are added as long as
    no more than ``share`` of the patches are masked.

    Args:
        images: how many masks.
        grid: (h, w) patches of an image.

    Returns:
        (images, h, w) bool, True where masked.

    Raises:
        ValueError: an aspect that is not in (0, 1], or blocks that are larger than what may be masked.
    """
    limit = int(rate("share", share) * grid[0] * grid[1])
    if not 0 < aspect <= 1:
        raise ValueError(f"aspect={aspect}: the least ratio of a block's sides is above 0 and at most 1")
    if positive("least", least) > limit:
        raise ValueError(
            f"least={least}: share={share} of {grid[0]}x{grid[1]} patches are {limit}, less than one block"
        )
    masks = torch.zeros(images, *grid, dtype=torch.bool)
    failures = torch.zeros(images, dtype=torch.int64)
    while bool((failures < TRIES).any()):
        free = limit - masks.sum((1, 2))
        drawn, shape, down, right = torch.rand(4, images)
        area = least + drawn * (free - least)
        ratio = (math.log(aspect) * (2 * shape - 1)).exp()
        sides = [(area * ratio).sqrt().round(), (area / ratio).sqrt().round()]
        fits = (sides[0] <= grid[0]) & (sides[1] <= grid[1]) & (failures < TRIES)
        inside = []
        for place, side, length in zip((down, right), sides, grid, strict=True):
            start = (place * (length - side + 1)).floor().unsqueeze(1)
            at = torch.arange(length)
            inside.append((at >= start) & (at < start + side.unsqueeze(1)))
        grown = masks | (inside[0].unsqueeze(2) & inside[1].unsqueeze(1))
        more = grown.sum((1, 2)) - masks.sum((1, 2))
        good = fits & (more > 0) & (more <= free)
        masks = torch.where(good.view(-1, 1, 1), grown, masks)
        failures = torch.where(good, 0, failures + 1)
    return masks


class Beit(CorruptedImages):
    """Masked image modelling: predict the visual tokens of masked patches from their representations.

    Args:
        model: a :class:`fastvit.ViT` with num_classes=0, of the family ``beit_*`` or any other.
        tokenizer: a trained :class:`fastvit.training.pretrain.DVAE`, which stays as it is.
        share, least, aspect: of the masks; see :func:`blockwise_masks`.

    Raises:
        ValueError: masks that don't fit the model's patches, or a tokenizer of images with other channels.
    """

    def __init__(self, model: ViT, tokenizer: DVAE, share: float = 0.4, least: int = 16, aspect: float = 0.3) -> None:
        super().__init__(model)
        if tokenizer.channels != model.in_chans:
            raise ValueError(
                f"the tokenizer reads images of {tokenizer.channels} channels, the model of {model.in_chans}; "
                "accepted: the same"
            )
        blockwise_masks(0, model.patch_embed.grid_size, share, least, aspect)  # refuses what does not fit
        self.tokenizer = tokenizer.requires_grad_(False)
        self.share, self.least, self.aspect = share, least, aspect
        self.predict = self.head(tokenizer.codes)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and "accuracy" over the masked patches of batch["image"] (B, C, H, W), normalised."""
        images = batch["image"]
        grid = self.model.patch_embed.dynamic_feat_size(tuple(images.shape[2:]))
        masks = blockwise_masks(len(images), grid, self.share, self.least, self.aspect).flatten(1)
        chosen = masks.flatten().nonzero().squeeze(1).to(images.device)  # found before it is copied: no waiting
        masks = masks.to(images.device).unsqueeze(-1)
        tokens = self.encode(images, lambda x: torch.where(masks, self.mask_token.to(x.dtype), x))
        logits = self.predict(tokens.flatten(0, 1)[chosen]).float()
        target = self.tokenizer.tokenize(images, grid).flatten()[chosen]
        return {"loss": F.cross_entropy(logits, target), "accuracy": (logits.argmax(-1) == target).float().mean()}
