"""Vision Transformers on hand-written kernels: ``fastvit.ViT`` with timm's weights and API, and its ops."""

from fastvit import ops
from fastvit.ops.backends import BackendUnavailable, backend

__version__ = "0.1.0"

__all__ = ["BackendUnavailable", "backend", "ops"]
