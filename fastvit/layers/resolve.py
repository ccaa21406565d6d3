"""From a constructor's argument (a name, a class, a partial) to the class of the layer.

timm's own classes become ours where ours has the same arguments, keys and results, so that code which passes
``mlp_layer=timm.layers.SwiGLUPacked`` gets the fused layer. Any other class stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastvit.layers.attention import Attention
from fastvit.layers.block import Block
from fastvit.layers.mlp import Mlp, SwiGLU
from fastvit.layers.norm import LayerNorm
from fastvit.layers.patch_embed import PatchEmbed

Layer = Callable[..., nn.Module]

NORMS: dict[str, Layer] = {"layernorm": LayerNorm, "rmsnorm": functools.partial(nn.RMSNorm, eps=1e-6)}
ATTENTIONS: dict[str, Layer] = {"": Attention, "attn": Attention}

#: classes of timm -> ours with the same arguments, keys and results
TIMM: dict[str, type[nn.Module]] = {
    "timm.layers.attention.Attention": Attention,
    "timm.layers.mlp.Mlp": Mlp,
    "timm.layers.norm.LayerNorm": LayerNorm,
    "timm.layers.patch_embed.PatchEmbed": PatchEmbed,
    "timm.models.vision_transformer.Block": Block,
}


def _name(layer: Any) -> str:
    return f"{getattr(layer, '__module__', '')}.{getattr(layer, '__qualname__', '')}"


def _twin(layer: Layer) -> Layer:
    """Return our class for one of timm's, plain or in a partial, and any other layer as it is."""
    if not isinstance(layer, functools.partial):
        return TIMM.get(_name(layer), layer)
    if _name(layer.func) == "timm.layers.mlp.GluMlp":  # the gate in the first half is SwiGLUPacked
        options = {key: value for key, value in layer.keywords.items() if key != "gate_last"}
        return functools.partial(SwiGLU, **options) if layer.keywords.get("gate_last") is False else layer
    if _name(layer.func) in ("timm.layers.norm.LayerNorm", "timm.layers.mlp.Mlp"):
        return functools.partial(TIMM[_name(layer.func)], *layer.args, **layer.keywords)
    return layer


def resolve(kind: str, layer: Layer | str | None, table: Mapping[str, Layer], default: Layer) -> Layer:
    """Return the class that ``layer`` means.

    Args:
        kind: the argument's name, for the error.
        layer: a name in ``table``, a class or a partial of one, or None for ``default``.

    Raises:
        ValueError: an unknown name; those that are known are listed.
        TypeError: neither a name nor callable.
    """
    if layer is None:
        return default
    if isinstance(layer, str):
        found = table.get(layer.lower() if kind == "act_layer" else layer.lower().replace("_", ""))
        if found is None:
            raise ValueError(f"unknown {kind} {layer!r}; accepted: {', '.join(['a class', *map(repr, table)])}")
        return found
    if not callable(layer):
        raise TypeError(f"{kind} must be a class or a name, got {layer!r}")
    return _twin(layer)
