"""timm's classes and the classes of fastvit that have the same attributes."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvit.integrations.twin import Twin
from fastvit.layers import (
    Attention,
    AttentionPoolLatent,
    BeitAttention,
    BeitBlock,
    DropPath,
    LayerNorm,
    LayerScale,
    PatchDropout,
    PatchEmbed,
    SwiGLU,
)
from fastvit.layers.resolve import TIMM
from fastvit.models import ViT


def _vit(model: Any) -> dict[str, Any]:
    return {
        "mean": None,
        "std": None,
        "pre_logits": nn.Identity(),
        "rope": None,
        "windowed": False,
        "pos_embed_2d": None,
        "layer_pos_embed": None,
        "dist_token": None,
        "head_dist": None,
    }


def _patch_embed(embed: Any) -> dict[str, Any]:
    return {"in_chans": embed.proj.in_channels, "output_fmt": "NLC" if embed.flatten else embed.output_fmt.value}


def _beit_attention(attention: Any) -> dict[str, Any]:
    width = attention.qkv.out_features // 3
    norms = {name: nn.Identity() for name in ("q_norm", "k_norm", "norm")}
    return {"attn_dim": width, "head_dim": width // attention.num_heads, **norms}


_KINDS: dict[str, type[nn.Module]] = {
    **TIMM,
    "timm.models.vision_transformer.VisionTransformer": ViT,
    "timm.layers.attention_pool.AttentionPoolLatent": AttentionPoolLatent,
    "timm.layers.mlp.GluMlp": SwiGLU,
    "timm.layers.layer_scale.LayerScale": LayerScale,
    "timm.layers.drop.DropPath": DropPath,
    "timm.layers.patch_dropout.PatchDropout": PatchDropout,
    "timm.models.beit.Attention": BeitAttention,
    "timm.models.beit.Block": BeitBlock,
}
_OPTIONS: dict[type[nn.Module], dict[str, Any]] = {
    ViT: {"attributes": _vit},
    PatchEmbed: {"attributes": _patch_embed},
    BeitAttention: {"attributes": _beit_attention},
    Attention: {"usual": {"gate": None}},
    AttentionPoolLatent: {
        "usual": {
            "pos_embed": None,
            "latent_len": 1,
            "pool": "token",
            "fused_attn": True,
            "q_norm": nn.Identity,
            "k_norm": nn.Identity,
        }
    },
    SwiGLU: {"usual": {"gate_last": False, "chunk_dim": -1}},
    LayerNorm: {"usual": {"_fast_norm": False}},
    DropPath: {"usual": {"scale_by_keep": True}},
    PatchDropout: {"usual": {"ordered": False}},
}
TWINS = {name: Twin(kind, **_OPTIONS.get(kind, {})) for name, kind in _KINDS.items()}
