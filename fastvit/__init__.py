"""Vision Transformers on hand-written kernels: ``fastvit.ViT`` with timm's weights and API, and its ops."""

from fastvit import ops, resnet
from fastvit.checkpoints import load_checkpoint
from fastvit.integrations import timm_registry
from fastvit.integrations.accelerate import accelerate
from fastvit.integrations.graphs import graphed
from fastvit.models import ViT, create_model, from_checkpoint, list_models
from fastvit.ops.backends import BackendUnavailable, backend
from fastvit.packing import PackedImages, pack

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "PackedImages",
    "ViT",
    "accelerate",
    "backend",
    "create_model",
    "from_checkpoint",
    "graphed",
    "list_models",
    "load_checkpoint",
    "ops",
    "pack",
    "resnet",
    "timm_registry",
]
