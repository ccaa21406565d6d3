"""Vision Transformers on hand-written kernels: ``fastvit.ViT`` with timm's weights and API, and its ops."""

from fastvit import ops, resnet
from fastvit.models import ViT, create_model, list_models
from fastvit.ops.backends import BackendUnavailable, backend

__version__ = "0.1.0"

__all__ = ["BackendUnavailable", "ViT", "backend", "create_model", "list_models", "ops", "resnet"]
