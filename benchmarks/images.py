"""Batches cut from two real photographs, the same ones on every run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor

MEAN = STD = 0.5  # what most ViT checkpoints were trained with


def crops(batch: int, size: int, seed: int = 0) -> Tensor:
    """Return random square crops of scikit-learn's two sample photographs, resized and normalised.

    Args:
        batch: the number of crops; fewer are the first of more.
        size: their height and width in pixels.
        seed: of the random crops.

    Returns:
        (batch, 3, size, size) float32, contiguous, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]

    def uniform(low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=generator))

    cut = []
    for i in range(batch):
        photograph = photographs[i % len(photographs)]  # (3, H, W) uint8
        height, width = photograph.shape[1:]
        side = uniform(min(height, width) // 2, min(height, width))
        top, left = uniform(0, height - side), uniform(0, width - side)
        crop = photograph[None, :, top : top + side, left : left + side].float() / 255
        cut.append(F.interpolate(crop, (size, size), mode="bicubic", antialias=True).clamp(0, 1))
    return (torch.cat(cut) - MEAN) / STD
