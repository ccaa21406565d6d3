"""Models built from :mod:`fastvit.layers`."""

from fastvit.models.registry import create_model, from_checkpoint, list_models
from fastvit.models.resnet import ResNetV2
from fastvit.models.vit import ViT

__all__ = ["ResNetV2", "ViT", "create_model", "from_checkpoint", "list_models"]
