"""The base of objectives on corrupted images: the encoder, the [mask] embedding, pixels as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastvit.models import ViT
from fastvit.training.objectives import Objective


class Pixels(nn.Module):
    """Normalised images back in 0..1.

    Args:
        mean, std: C values each, which the images were normalised with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ValueError(
                f"mean={mean} and std={std}: as many values each as the images have channels, std positive"
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return normalised images (B, C, H, W) in 0..1."""
        return images * self.std + self.mean


class CorruptedImages(Objective):
    """An objective on images of which some patches are corrupted.

    Args:
        model: a :class:`fastvit.ViT` without a classifier, any pool.

    Raises:
        ValueError: a model with a classifier, or one that drops patches.
    """

    model: ViT

    def __init__(self, model: ViT) -> None:
        super().__init__()
        if model.num_classes:
            raise ValueError(
                f"the model has a classifier of {model.num_classes} classes, which pre-training would leave untrained: "
                "build it with num_classes=0"
            )
        if not isinstance(model.patch_drop, nn.Identity):
            raise ValueError(
                "the model drops patches, whose places a prediction needs: build it with patch_drop_rate=0"
            )
        self.model = model
        like = model.patch_embed.proj.weight
        self.mask_token = nn.Parameter(torch.empty(model.embed_dim, device=like.device, dtype=like.dtype))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def head(self, outputs: int) -> nn.Linear:
        """Return a linear layer from a patch's representation, initialised as BEiT's."""
        layer = nn.Linear(self.model.embed_dim, outputs).to(self.mask_token)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        return layer

    def encode(self, images: Tensor, corrupt: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the patches' representations (B, N, D) of images (B, C, H, W), after the last norm.

        ``corrupt`` changes the patch embeddings (B, N, D). A model that pools before its last norm (BEiT) has it on
        each patch here, so that fine-tuning finds that norm trained too.
        """
        tokens = self.model.fc_norm(self.model.forward_features(images, corrupt=corrupt))
        return tokens[:, self.model.num_prefix_tokens :]
