# ruff: noqa: F401
"""The launchers of the CUDA kernels: :class:`fastvit.ops.launchers.Launchers`, as in kernels/triton/launchers.py."""

from fastvit.cuda.attention import attention_backward, attention_forward
from fastvit.cuda.attention_rows import attention_distance, attention_rows
from fastvit.cuda.elementwise import activation_gradient, scale_rows
from fastvit.cuda.layer_norm import layer_norm_backward, layer_norm_forward
from fastvit.cuda.linear import (
    linear_forward,
    linear_input_gradient,
    linear_weight_gradient,
)
from fastvit.cuda.patch_embed import (
    patch_embed_forward,
    patch_embed_image_gradient,
    patch_embed_row_gradients,
    patch_embed_weight_gradient,
)
from fastvit.cuda.rope import apply_rotary
