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
    Block,
    LayerNorm,
    Mlp,
    PatchEmbed,
    SwiGLU,
)
from fastvit.layers.misc import DropPath, LayerScale, PatchDropout
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


TWINS = {
    "timm.models.vision_transformer.VisionTransformer": Twin(ViT, attributes=_vit),
    "timm.models.vision_transformer.Block": Twin(Block),
    "timm.layers.attention.Attention": Twin(Attention, {"gate": None}),
    "timm.layers.attention_pool.AttentionPoolLatent": Twin(
        AttentionPoolLatent,
        {
            "pos_embed": None,
            "latent_len": 1,
            "pool": "token",
            "fused_attn": True,
            "q_norm": nn.Identity,
            "k_norm": nn.Identity,
        },
    ),
    "timm.layers.mlp.Mlp": Twin(Mlp),
    "timm.layers.mlp.GluMlp": Twin(SwiGLU, {"gate_last": False, "chunk_dim": -1}),
    "timm.layers.norm.LayerNorm": Twin(LayerNorm, {"_fast_norm": False}),
    "timm.layers.patch_embed.PatchEmbed": Twin(PatchEmbed, attributes=_patch_embed),
    "timm.layers.layer_scale.LayerScale": Twin(LayerScale),
    "timm.layers.drop.DropPath": Twin(DropPath, {"scale_by_keep": True}),
    "timm.layers.patch_dropout.PatchDropout": Twin(PatchDropout, {"ordered": False}),
    "timm.models.beit.Attention": Twin(BeitAttention, attributes=_beit_attention),
    "timm.models.beit.Block": Twin(BeitBlock),
}
