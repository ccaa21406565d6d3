"""Infer the arguments of :class:`fastvit.ViT` from the names and shapes of weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastvit.activations import name_of
from fastvit.checkpoints.rules import blocks
from fastvit.checkpoints.sizes import heads_of, position_arguments
from fastvit.layers import LayerNorm, Mlp, SwiGLU

log = logging.getLogger("fastvit")


def infer_arguments(
    state: Mapping[str, Tensor],
    options: Mapping[str, Any],
    name: str,
    heads: Mapping[int, int],
    family: Mapping[str, Any],
    reduction: int = 1,
) -> dict[str, Any]:
    """Return the arguments of :class:`fastvit.ViT` for weights under timm's names.

    Args:
        state: the weights.
        options: arguments that the file's configuration or the caller gives; they override the shapes. ``eps`` is the
            norms'.
        name: of the file, for messages.
        heads: attention heads by width, where neither ``options`` nor a tensor tells them; 64 features each at other
            widths.
        family: arguments that the weights' families infer, see :func:`fastvit.models.families.infer`.
        reduction: pixels of the image, on a side, that are one pixel of what patches are cut from.

    Raises:
        ValueError: the weights are not a complete ViT's, or the positions fit no grid.
    """
    patches = state.get("patch_embed.proj.weight")
    numbers = list(blocks(state))
    if patches is None or patches.ndim != 4 or numbers != list(range(len(numbers))) or not numbers:
        have = f"blocks {numbers[:3]}..." if patches is not None else "no patch_embed.proj.weight"
        raise ValueError(f"{name} is no complete Vision Transformer: it has {have}")
    needed = ("norm1.weight", "attn.qkv.weight", "attn.proj.weight", "norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    for needs in needed:
        if f"blocks.0.{needs}" not in state:
            raise ValueError(f"{name} has no {needs} in its blocks")
    options = dict(options)
    width, channels, p, q = patches.shape
    fc1, fc2 = state["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc2.weight"]
    hidden = fc1.shape[0]
    found: dict[str, Any] = {
        "patch_size": (p, q),
        "in_chans": channels,
        "embed_dim": width,
        "depth": len(numbers),
        # half a feature keeps rounding from landing below
        "mlp_ratio": hidden / width if hidden % width == 0 else (hidden + 0.5) / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state or "blocks.0.attn.q_bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "scale_attn_norm": "blocks.0.attn.norm.weight" in state,
        "scale_mlp_norm": "blocks.0.mlp.norm.weight" in state,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in state or "blocks.0.gamma_1" in state else None,
        "class_token": "cls_token" in state,
        "distilled": "dist_token" in state,
        "reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "pre_norm": "norm_pre.weight" in state,
        "final_norm": "norm.weight" in state or "fc_norm.weight" in state,
        "fc_norm": "fc_norm.weight" in state,
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
        "global_pool": _pool(state),
        **family,
    }
    if hidden == 2 * fc2.shape[1]:
        found["mlp_layer"] = SwiGLU
        options.pop("act_layer", None)
    if "pre_logits.fc.weight" in state:
        found["representation_size"] = state["pre_logits.fc.weight"].shape[0]
    if "eps" in options:
        found["norm_layer"] = partial(LayerNorm, eps=options.pop("eps"))
    if options.get("num_heads") is None:
        options["num_heads"] = heads_of(state)
    if options["num_heads"] is None:
        options["num_heads"] = heads.get(width, max(width // 64, 1))
        known = "as models of that width have" if width in heads else "64 features each"
        log.info("%s: %d attention heads, %s; num_heads= says otherwise", name, options["num_heads"], known)
    return found | position_arguments(state, (reduction * p, reduction * q), options, name) | options


def arguments_not_in_shapes(model: Any) -> dict[str, Any]:
    """Return the arguments of a :class:`fastvit.ViT` that :func:`infer_arguments` needs in ``options``."""
    modules = list(model.blocks.modules())
    act = next(m.act for m in modules if isinstance(m, Mlp | SwiGLU))
    found = {
        "img_size": list(model.patch_embed.img_size),
        "num_heads": next(m.num_heads for m in modules if hasattr(m, "num_heads")),
        "global_pool": model.global_pool,
        "pool_include_prefix": model.pool_include_prefix,
        "eps": next(m.eps for m in modules if isinstance(m, nn.LayerNorm)),
        "act_layer": name_of(act),
        "rope": model.rope,
    }
    return {name: value for name, value in found.items() if value is not None}


def _pool(state: Mapping[str, Tensor]) -> str:
    if "attn_pool.latent" in state:
        return "map"
    return "avg" if "fc_norm.weight" in state or "cls_token" not in state else "token"
