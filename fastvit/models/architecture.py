"""What the shapes of weights say about the model that they are of."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastvit.activations import name_of
from fastvit.checkpoints.backbone import layers_of, stem_of
from fastvit.checkpoints.layouts import blocks
from fastvit.checkpoints.sizes import heads_of, position_arguments
from fastvit.layers import BeitBlock, LayerNorm, Mlp, SwiGLU
from fastvit.models.hybrid import HybridEmbed, reduction
from fastvit.models.resnet import CHANNELS, STEM_CHANNELS
from fastvit.models.vit import ViT

log = logging.getLogger("fastvit")

_TABLE = "relative_position_bias_table"


def architecture(
    state: Mapping[str, Tensor], options: Mapping[str, Any], name: str, heads: Mapping[int, int]
) -> dict[str, Any]:
    """Arguments of :class:`fastvit.ViT` for weights under timm's names.

    Args:
        state: the weights.
        options: what the file or the caller says, which goes before what shapes say. ``eps`` is the norms'.
        name: of the file, for messages.
        heads: attention heads by width, where neither anybody nor a tensor says how many there are; 64 features each
            at other widths.

    Raises:
        ValueError: they are no complete ViT's, or the positions fit no grid.
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
        "use_rel_pos_bias": f"blocks.0.attn.{_TABLE}" in state,
        "use_shared_rel_pos_bias": f"rel_pos_bias.{_TABLE}" in state,
    }
    if any(f"blocks.0.{name}" in state for name in ("gamma_1", "attn.q_bias", f"attn.{_TABLE}")):
        found["block_fn"] = BeitBlock
    if hidden == 2 * fc2.shape[1]:
        found["mlp_layer"] = SwiGLU
        options.pop("act_layer", None)
    layers = layers_of(state)
    if layers is not None:
        found["embed_layer"] = partial(HybridEmbed, layers=layers)
        found["in_chans"] = state[f"{stem_of(state)}.conv.weight"].shape[1]
        p, q = (reduction(layers) * side for side in (p, q))  # pixels
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
    return found | position_arguments(state, (p, q), options, name) | options


def untold(model: ViT) -> dict[str, Any]:
    """What :func:`architecture` has to be told of a model, in ``options``: the arguments that shapes don't tell."""
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


def resnet_architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of :class:`fastvit.resnet.ResNetV2` for weights under its names, which are timm's; of an AxialResNet,
    whose attention's keys tell the size of the images, "img_size" and "num_heads" too."""
    stem, classifier = state["stem.conv.weight"], state.get("head.fc.weight")
    depths = [
        sum(f"stages.{i}.blocks.{j}.norm1.weight" in state for j in range(len(state))) for i in range(len(CHANNELS))
    ]
    found: dict[str, Any] = {
        "layers": depths,
        "width_factor": stem.shape[0] // STEM_CHANNELS,
        "in_chans": stem.shape[1],
        "num_classes": 0 if classifier is None else classifier.shape[0],
    }
    attention = "stages.0.blocks.0.conv2"
    if f"{attention}.row.rel_pos_keys" in state:
        keys = [state[f"{attention}.{axis}.rel_pos_keys"] for axis in ("column", "row")]
        found["img_size"] = tuple(4 * ((len(of) + 1) // 2) for of in keys)
        found["num_heads"] = state[f"{attention}.row.qkv.weight"].shape[1] // keys[1].shape[1]
    return found


def _pool(state: Mapping[str, Tensor]) -> str:
    if "attn_pool.latent" in state:
        return "map"
    return "avg" if "fc_norm.weight" in state or "cls_token" not in state else "token"
