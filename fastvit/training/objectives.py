"""Objectives, which a run minimises: the interface that the training loop knows, and classification."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]


class Objective(nn.Module):
    """A model and its loss; its own parameters (heads, mask tokens) are trained with the model's, and are not saved.

    ``forward`` takes a batch, "image" (B, C, H, W) float and what else the data has, and returns scalars: "loss", which
    is minimised, and others, which are logged. In evaluation (``eval()``) all of them are averaged over the test set.
    Random numbers come from PyTorch's global generator alone, whose state is in checkpoints.

    Attributes:
        model: what is trained, and saved in the end.
        progress: how much of the run is done, 0 to 1, which the loop sets before each step, for schedules of a loss.
    """

    model: Any
    progress = 0.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the scalars of a batch, {"loss": (), ...}."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters that weight decay leaves out, besides all vectors."""
        known = getattr(self.model, "no_weight_decay", set)
        return {f"model.{name}" for name in known()}


class Classification(Objective):
    """Cross-entropy of the model's logits with batch["label"] (B,) int64.

    Args:
        model: images (B, C, H, W) -> logits (B, classes).
        classes: how many.
        label_smoothing: share of the target that goes to all classes alike; in training alone.
        mixup: alpha of mixup's Beta distribution (Zhang et al., 2018), 0 for none; in training alone.
    """

    def __init__(self, model: nn.Module, classes: int, label_smoothing: float = 0.0, mixup: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.mix: Any = None
        if mixup:
            from torchvision.transforms.v2 import MixUp

            self.mix = MixUp(alpha=mixup, num_classes=classes)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of a batch and its accuracy, which is of the labels before mixup."""
        images, target = batch["image"], batch["label"]
        if self.training and self.mix is not None:
            images, target = self.mix(images, target)
        logits = self.model(images).float()
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing if self.training else 0.0)
        right = (logits.argmax(1) == batch["label"]).to(torch.float32)
        return {"loss": loss, "accuracy": right.mean()}
