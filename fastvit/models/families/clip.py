"""The image tower of CLIP, OpenAI's and OpenCLIP's (Radford et al., 2021), and the layout that SigLIP's shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvit.checkpoints.configs import huggingface_options
from fastvit.checkpoints.rules import HuggingFace, Layout, Rule, State, block, rename, same
from fastvit.models.families.family import Family
from fastvit.models.families.vit import NORM, POSITIONS, QKV_BIAS, TOKEN


def _no_bias_is_zero(state: State) -> None:
    """CLIP's projection to the space that it shares with text is a classifier without a bias."""
    if "head.weight" in state:
        state.setdefault("head.bias", state["head.weight"].new_zeros(len(state["head.weight"])))


def _zero_is_no_bias(state: State) -> None:
    """The other direction of :func:`_no_bias_is_zero`."""
    if "head.bias" in state and not state["head.bias"].any():
        del state["head.bias"]


def tower_of_huggingface(kind: HuggingFace, rules: tuple[Rule, ...], also: str, eps: float, activation: str) -> Layout:
    """The image tower of CLIP or SigLIP."""
    return Layout(
        f"{kind.model_type.removesuffix('_vision_model')}-huggingface",
        "embeddings.patch_embedding.weight",
        (
            *same(("embeddings.patch_embedding", "patch_embed.proj"), ("post_layernorm", "norm")),
            rename("embeddings.position_embedding.weight", "pos_embed", "rows"),
            *block(
                "encoder.layers.{i}",
                norm1="layer_norm1",
                attn__qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                attn__proj="self_attn.out_proj",
                norm2="layer_norm2",
                mlp__fc1="mlp.fc1",
                mlp__fc2="mlp.fc2",
            ),
            *rules,
        ),
        also=also,
        dropped=r"embeddings\.position_ids|/text_.*|/logit_.*",
        tower="vision_model.",
        options=huggingface_options(eps, activation),
        finish=_no_bias_is_zero,
        begin=_zero_is_no_bias,
        huggingface=lambda state: kind,
        written=("huggingface", "huggingface-5"),
    )


def _config(state: State, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    projection = {"projection_dim": len(state["head.weight"])} if "head.weight" in state else {}
    return {"intermediate_size": state["blocks.0.mlp.fc2.weight"].shape[1], **projection}


_KIND = HuggingFace(
    "clip_vision_model",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    (*TOKEN, *POSITIONS, *NORM, *QKV_BIAS, "norm_pre.weight", "norm_pre.bias"),
    _config,
    square=True,
    labels=False,
)
CLIP = tower_of_huggingface(
    _KIND,
    (
        rename("embeddings.class_embedding", "cls_token", "token"),
        *same(("pre_layrnorm", "norm_pre")),  # their spelling
        rename("/visual_projection.weight", "head.weight"),
    ),
    r"embeddings\.class_embedding",
    1e-5,
    "quick_gelu",
)

OPENCLIP = Layout(
    "openclip",
    "conv1.weight",
    (
        rename("class_embedding", "cls_token", "token"),
        rename("positional_embedding", "pos_embed", "rows"),
        rename("proj", "head.weight", "transposed"),
        rename("transformer.resblocks.{i}.attn.in_proj_{p}", "blocks.{i}.attn.qkv.{p}"),
        *same(("conv1", "patch_embed.proj"), ("ln_pre", "norm_pre"), ("ln_post", "norm")),
        *block(
            "transformer.resblocks.{i}",
            norm1="ln_1",
            attn__proj="attn.out_proj",
            norm2="ln_2",
            mlp__fc1="mlp.c_fc",
            mlp__fc2="mlp.c_proj",
        ),
        rename("transformer.resblocks.{i}.ls_1.gamma", "blocks.{i}.ls1.gamma"),
        rename("transformer.resblocks.{i}.ls_2.gamma", "blocks.{i}.ls2.gamma"),
    ),
    also=r"transformer\.resblocks\.0\.ln_1\.weight",
    dropped=r"/(transformer|token_embedding|positional_embedding|ln_final|text|logit|text_projection|attn_mask).*",
    options=lambda config: {
        "eps": 1e-5,
        "act_layer": "quick_gelu" if config.get("model_cfg", config).get("quick_gelu") else "gelu",
    },
    finish=_no_bias_is_zero,
)

FAMILY = Family(layouts=(CLIP, OPENCLIP))
