"""timm's state dicts in the layouts of the other libraries."""

from __future__ import annotations

import re

from torch import Tensor

Weights = dict[str, Tensor]


def to_torchvision(weights: Weights) -> Weights:
    """timm's state_dict in torchvision's layout."""
    rules = [
        (r"^cls_token$", "class_token"),
        (r"^pos_embed$", "encoder.pos_embedding"),
        (r"^patch_embed\.proj\.", "conv_proj."),
        (r"^norm\.", "encoder.ln."),
        (r"^head\.", "heads.head."),
        (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.encoder_layer_\1.ln_\2."),
        (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_"),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.encoder_layer_\1.self_attention.out_proj."),
        (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layers.encoder_layer_\1.mlp.0."),
        (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layers.encoder_layer_\1.mlp.3."),
    ]
    return {_rename(key, rules): value for key, value in weights.items()}


def to_hugging_face(weights: Weights) -> Weights:
    """timm's state_dict in the layout of transformers 5's ViTForImageClassification."""
    rules = [
        (r"^cls_token$", "vit.embeddings.cls_token"),
        (r"^pos_embed$", "vit.embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
        (r"^norm\.", "vit.layernorm."),
        (r"^head\.", "classifier."),
        (r"^blocks\.(\d+)\.norm1\.", r"vit.layers.\1.layernorm_before."),
        (r"^blocks\.(\d+)\.norm2\.", r"vit.layers.\1.layernorm_after."),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"vit.layers.\1.attention.o_proj."),
        (r"^blocks\.(\d+)\.mlp\.", r"vit.layers.\1.mlp."),
    ]
    renamed = {}
    for key, value in weights.items():
        if ".attn.qkv." in key:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[re.sub(r"^blocks\.(\d+)\.attn\.qkv", rf"vit.layers.\1.attention.{letter}_proj", key)] = part
        else:
            renamed[_rename(key, rules)] = value
    return renamed


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key, found = re.subn(pattern, replacement, key)
        if found:
            return key
    raise ValueError(f"no rule for the weight {key!r}")
