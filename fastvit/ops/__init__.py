"""The functional API: every op of a Vision Transformer, fused, on the backend that is there.

Each op is a plain function; :mod:`fastvit.ops.backends` decides which implementation runs.
"""

import torch.fx

from fastvit.ops import backends
from fastvit.ops.attention import attention, attention_qkvpacked
from fastvit.ops.attention_rows import attention_distance, attention_rows
from fastvit.ops.backends import BackendUnavailable, backend
from fastvit.ops.layer_norm import layer_norm
from fastvit.ops.linear import linear
from fastvit.ops.mlp import mlp
from fastvit.ops.patch_embed import patch_embed, patch_embed_packed
from fastvit.ops.rope import rotate

__all__ = [
    "BackendUnavailable",
    "attention",
    "attention_distance",
    "attention_qkvpacked",
    "attention_rows",
    "backend",
    "layer_norm",
    "linear",
    "mlp",
    "patch_embed",
    "patch_embed_packed",
    "rotate",
]

if backends.TRITON_MISSING is None:
    from fastvit.ops import flops  # noqa: F401  (PyTorch's counter complains where there is no Triton)

for _name in (*backends.OPS, "patch_embed_packed"):
    torch.fx.wrap(_name)  # symbolic tracing sees one node per op, not its checks
