# ruff: noqa: F401
"""The launchers of the Triton kernels: :class:`fastvit.ops.launchers.Launchers`, as in fastvit/cuda/launchers.py."""

from fastvit.triton.activations import activation_gradient
from fastvit.triton.attention import attention_forward
from fastvit.triton.attention_backward import attention_backward
from fastvit.triton.attention_rows import attention_distance, attention_rows
from fastvit.triton.layer_norm import layer_norm_backward, layer_norm_forward
from fastvit.triton.linear import linear_forward
from fastvit.triton.linear_backward import linear_input_gradient, linear_weight_gradient, scale_rows
from fastvit.triton.patch_embed import (
    patch_embed_forward,
    patch_embed_image_gradient,
    patch_embed_row_gradients,
    patch_embed_weight_gradient,
)
from fastvit.triton.rope import apply_rotary
