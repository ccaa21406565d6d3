"""Models built from :mod:`fastvit.layers`."""

from fastvit.models.registry import create_model, list_models
from fastvit.models.vit import ViT

__all__ = ["ViT", "create_model", "list_models"]
