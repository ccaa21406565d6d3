"""LayerNorm on :func:`fastvit.ops.layer_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit import ops


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension, with the ViT's eps of 1e-6.

    Args:
        num_channels: width D.
        eps: added to the variance.
        affine: whether there are a weight and a bias (D,).
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps=eps, elementwise_affine=affine, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the result for x (..., D), of the same shape."""
        out: Any = ops.layer_norm(x, self.weight, self.bias, self.eps)
        return out
