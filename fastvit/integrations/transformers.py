"""transformers' MLPs and norms, and ``attn_implementation="fastvit"``, which its attention layers call."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.checkpoints.layouts import LAYOUTS
from fastvit.integrations.twin import Twin
from fastvit.layers import LayerNorm, fuse
from fastvit.layers.attention import mask_arguments

NAME = "fastvit"
_BEFORE = "_fastvit_attention"  # in a model's __dict__: the attn_implementation that it had


class Mlp(nn.Module):
    """fc2(act(fc1(x))) with transformers' keys."""

    fc1: Any
    activation_fn: nn.Module
    fc2: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (B, T, D) -> (B, T, D)."""
        fc1, fc2, activation = self.fc1, self.fc2, fuse.activation_name(self.activation_fn)
        if activation is not None and fuse.is_fusable(fc1, nn.Linear) and fuse.is_fusable(fc2, nn.Linear):
            return ops.mlp(hidden_states, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=activation)
        return fuse.linear(fc2, fuse.linear(fc1, hidden_states, act=self.activation_fn))


# The kinds of models whose attention is tested against SDPA's: model_type -> the prefix of its classes.
_KINDS = {
    kind.model_type.removesuffix("_vision_model"): kind.model.removesuffix("Model").removesuffix("Vision")
    for layout in LAYOUTS
    if layout.huggingface is not None
    for kind in (layout.huggingface({}), layout.huggingface({"reg_token": torch.empty(0)}))
    if kind.accelerated
}
TWINS = {
    **{f"transformers.models.{file}.modeling_{file}.{name}MLP": Twin(Mlp) for file, name in _KINDS.items()},
    "torch.nn.modules.normalization.LayerNorm": Twin(LayerNorm),
}


def register() -> str:
    """Let transformers' models take ``attn_implementation="fastvit"``; calling it again changes nothing.

    Masks are as for "sdpa". Causal attention, or attention that returns its weights, runs on transformers' own SDPA.

    Returns:
        The name, for ``from_pretrained(..., attn_implementation=register())``.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without one the mask would silently be None
    return NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for a layer of transformers: (B, H, T, d) each, and SDPA's mask -> (B, T, H, d)."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unlike = causal or query.shape[1] != key.shape[1] or any(
        kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap")
    )  # fmt: skip
    if unlike or kwargs.get("output_attentions"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return out
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    options: dict[str, Any] = {"scale": scaling}
    if attention_mask is not None:
        options |= mask_arguments(attention_mask, k)
    if dropout > 0.0:
        options |= {"dropout_p": dropout, "seed": torch.randint(2**63 - 1, (1,), device=q.device)}
    y = ops.attention(q, k, v, **options)
    assert isinstance(y, Tensor)
    return y, None


def _is_transformers(model: nn.Module) -> bool:
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def _kinds(model: nn.Module) -> bool:
    """Return whether the attention of this kind of model is tested against SDPA's."""
    return getattr(getattr(model, "config", None), "model_type", "").split("_vision")[0] in _KINDS


def set_attention(model: Any) -> None:
    """Set a transformers model's ``attn_implementation`` to fastvit's attention."""
    if _is_transformers(model) and _kinds(model) and attention_of(model) != NAME:
        model.__dict__[_BEFORE] = attention_of(model)
        model.set_attn_implementation(register())


def reset_attention(model: Any) -> None:
    """Undo :func:`set_attention`."""
    before = model.__dict__.pop(_BEFORE, None)
    if before is not None:
        model.set_attn_implementation(before)


def attention_of(model: Any) -> str | None:
    """Return a transformers model's ``attn_implementation``; None for another library's model."""
    return model.config._attn_implementation if _is_transformers(model) else None
