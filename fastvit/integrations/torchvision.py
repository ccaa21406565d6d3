"""torchvision's encoder block, whose attention is PyTorch's nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastvit import ops
from fastvit.integrations.twin import Twin
from fastvit.layers import fuse
from fastvit.layers.fuse import Residual

fuse.remember_forward(nn.MultiheadAttention, NonDynamicallyQuantizableLinear)


class EncoderBlock(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x)), with torchvision's keys."""

    ln_1: nn.Module
    self_attention: nn.MultiheadAttention
    dropout: nn.Module
    ln_2: nn.Module
    mlp: nn.Sequential

    def forward(self, input: Tensor) -> Tensor:
        """input (B, T, D) -> (B, T, D)."""
        return self._mlp(self._attention(input))

    def _attention(self, x: Tensor) -> Tensor:
        attention, residual = self.self_attention, Residual(x)
        out = attention.out_proj
        if not (
            fuse.is_fusable(attention, nn.MultiheadAttention)
            and fuse.is_fusable(out, NonDynamicallyQuantizableLinear)
            and attention.batch_first
            and attention.in_proj_weight is not None
            and attention.bias_k is None
            and not attention.add_zero_attn
        ):
            y = self.ln_1(x)
            return x + self.dropout(attention(y, y, y, need_weights=False)[0])
        qkv = fuse.fused(ops.linear, x, attention.in_proj_weight, attention.in_proj_bias, norm=self.ln_1)
        options: dict[str, Any] = {}
        if attention.training and attention.dropout > 0.0:
            options = {"dropout_p": attention.dropout, "seed": torch.randint(2**63 - 1, (1,), device=x.device)}
        y = ops.attention_qkvpacked(qkv.unflatten(-1, (3, attention.num_heads, attention.head_dim)), **options)
        assert isinstance(y, Tensor)
        if fuse.is_inactive(self.dropout):
            return fuse.fused(ops.linear, y.flatten(2), out.weight, out.bias, residual=residual)
        return residual.as_modules(self.dropout(fuse.fused(ops.linear, y.flatten(2), out.weight, out.bias)))

    def _mlp(self, x: Tensor) -> Tensor:
        residual = Residual(x)
        if len(self.mlp) != 5 or not fuse.is_fusable(self.mlp, type(self.mlp)):
            return residual.as_modules(self.mlp(self.ln_2(x)))
        fc1, act, drop1, fc2, drop2 = cast(Any, self.mlp)
        activation = fuse.activation_name(act)
        if (
            activation is not None
            and fuse.is_fusable(fc1, nn.Linear)
            and fuse.is_fusable(fc2, nn.Linear)
            and fuse.is_inactive(drop1)
            and fuse.is_inactive(drop2)
        ):
            weights = fc1.weight, fc1.bias, fc2.weight, fc2.bias
            return fuse.fused(ops.mlp, x, *weights, norm=self.ln_2, residual=residual, activation=activation)
        return residual.as_modules(self.mlp(self.ln_2(x)))


TWINS = {"torchvision.models.vision_transformer.EncoderBlock": Twin(EncoderBlock, reads=("self_attention", "mlp"))}
