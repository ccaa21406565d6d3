"""Models built from :mod:`fastvit.layers`."""

from fastvit.models.axial import AxialResNet, AxialViT
from fastvit.models.hybrid import HybridEmbed
from fastvit.models.registry import create_model, from_checkpoint, list_models
from fastvit.models.resnet import ResNetV2
from fastvit.models.vit import ViT

__all__ = [
    "AxialResNet",
    "AxialViT",
    "HybridEmbed",
    "ResNetV2",
    "ViT",
    "create_model",
    "from_checkpoint",
    "list_models",
]
