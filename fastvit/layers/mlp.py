"""The MLP of a block, on :func:`fastvit.ops.mlp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.layers import fuse
from fastvit.layers.fuse import Residual


def _two(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


@fuse.branch
class Mlp(nn.Module):
    """fc2(norm(act(fc1(x)))), the paper's equation 3; timm's arguments and keys.

    Args:
        in_features, hidden_features, out_features: widths; the last two default to the first.
        act_layer: activation class; by default GELU, and SiLU in a :class:`SwiGLU`.
        norm_layer: norm class between the two matrices, or None.
        bias, drop: one for both matrices or a pair.
    """

    #: hidden features that fc1 makes for each one that fc2 reads
    gating = 1
    #: act_layer by default
    default_act: Callable[[], nn.Module] = nn.GELU
    #: what the ranks of :func:`fastvit.integrations.parallel.plan` divide; a subclass states it for itself
    tensor_parallel = "features"

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden_features or in_features
        if hidden % self.gating:
            raise ValueError(f"hidden_features must be even for a gated MLP, got {hidden}")
        (bias1, bias2), (drop1, drop2) = _two(bias), _two(drop)
        inner = hidden // self.gating
        self.fc1 = nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.act = (act_layer or self.default_act)()
        self.drop1 = nn.Dropout(drop1)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(inner, device=device, dtype=dtype)
        self.fc2 = nn.Linear(inner, out_features or in_features, bias=bias2, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP of x (..., D), (..., D)."""
        return self.branch(x)

    def branch(self, x: Tensor, norm: nn.Module | None = None, residual: Residual | None = None) -> Tensor:
        """Return residual(mlp(norm(x))), the branch of a block, in one op where nothing stands in the way."""
        fc1, fc2 = self.fc1, self.fc2
        if (
            (activation := self._activation())
            and fuse.is_fusable(fc1, nn.Linear)
            and fuse.is_fusable(fc2, nn.Linear)
            and fuse.is_inactive(self.drop1)
            and fuse.is_inactive(self.drop2)
            and fuse.is_identity(self.norm)
        ):
            weights = fc1.weight, fc1.bias, fc2.weight, fc2.bias
            return fuse.fused(ops.mlp, x, *weights, norm=norm, residual=residual, activation=activation)
        x = self.drop1(self._hidden(x, norm))
        between = self.norm if not fuse.is_identity(self.norm) else None
        return fuse.linear(fc2, x, norm=between, dropout=self.drop2, residual=residual)

    def _activation(self) -> str | None:
        """Return the ops' name of the activation between the matrices, or None where no op computes it."""
        return fuse.activation_name(self.act)

    def _hidden(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        return fuse.linear(self.fc1, x, norm=norm, act=self.act)


@fuse.branch
class SwiGLU(Mlp):
    """fc2(act(g) * v) with g, v the halves of fc1(x) (Shazeer, 2020; DINOv2's giant), timm's ``SwiGLUPacked``.

    ``hidden_features`` counts both halves. Only SiLU, the default ``act_layer``, is fused.
    """

    gating = 2
    tensor_parallel = "features"
    default_act = nn.SiLU

    def init_weights(self) -> None:
        """Start the second half of fc1 near zero with a bias of one, as timm does."""
        half = self.fc1.out_features // 2
        with torch.no_grad():
            self.fc1.weight[half:].normal_(std=1e-6)
            if self.fc1.bias is not None:
                self.fc1.bias[half:].fill_(1.0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load timm's ``SwiGLU`` too: its two matrices fc1_g and fc1_x are the halves of fc1."""
        for kind in ("weight", "bias"):
            gate, value = (f"{prefix}fc1_{half}.{kind}" for half in "gx")
            if gate in state_dict and value in state_dict:
                state_dict[f"{prefix}fc1.{kind}"] = torch.cat([state_dict.pop(gate), state_dict.pop(value)])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _activation(self) -> str | None:
        return fuse.activation_name(self.act, gates=True)

    def _hidden(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        gate, value = fuse.linear(self.fc1, x, norm=norm).chunk(2, dim=-1)
        return self.act(gate) * value
