"""Scikit-learn's 1,797 scanned digits, 8 x 8 pixels, as the other examples train on them."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset, random_split

# A ViT for them: 16 patches of 2 x 2 and a class token.
MODEL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 4, "num_heads": 3}


def load() -> tuple[TensorDataset, TensorDataset]:
    """(training set, 360 test images): images (1, 8, 8) in [-1, 1], labels."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    whole = TensorDataset(images, torch.from_numpy(digits.target))
    return random_split(whole, [len(whole) - 360, 360], torch.Generator().manual_seed(0))
