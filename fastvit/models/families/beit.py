"""BEiT and BEiT v2: learned biases by relative position (Bao et al., 2022; Peng et al., 2022)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastvit.checkpoints.configs import timm_options
from fastvit.checkpoints.rules import HuggingFace, Layout, Rule, State, gated, rename, same
from fastvit.layers import BeitBlock
from fastvit.models.families.family import IMAGENET, Family, Model
from fastvit.models.families.vit import (
    HUGGINGFACE_5_LAYER,
    HUGGINGFACE_5_QKV,
    HUGGINGFACE_LAYER,
    HUGGINGFACE_QKV,
    PATCH_BIAS,
    TIMM_RULES,
    TOKEN,
    VARIANTS,
    Variant,
    vit_of_huggingface,
)

_TABLE = "relative_position_bias_table"
GAMMA_RULES = (
    rename("blocks.{i}.gamma_1", "blocks.{i}.gamma_1"),
    rename("blocks.{i}.gamma_2", "blocks.{i}.gamma_2"),
    rename("blocks.{i}.attn.q_bias", "blocks.{i}.attn.q_bias"),
    rename("blocks.{i}.attn.v_bias", "blocks.{i}.attn.v_bias"),
)
_TABLES = tuple(
    rename(f"{module}.relative_position_bias_table", f"{module}.relative_position_bias_table")
    for module in ("blocks.{i}.attn", "rel_pos_bias")
)
GATED_RULES = gated("blocks.{i}", ("mlp.fc1_g", "mlp.fc1_x"), "mlp.fc2")

TIMM = Layout(  # and BEiT's own
    "timm",
    "patch_embed.proj.weight",
    (*GAMMA_RULES, *_TABLES, *GATED_RULES, *TIMM_RULES),
    also=rf"blocks\.0\.attn\.{_TABLE}|rel_pos_bias\.{_TABLE}",
    dropped=r"mask_token|lm_head\..*|.*\.relative_position_index",
    options=timm_options,
    written=("timm",),
)


def _config(state: State, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {
        "intermediate_size": state["blocks.0.mlp.fc2.weight"].shape[1],
        "layer_scale_init_value": 0.1 if "blocks.0.gamma_1" in state else 0.0,
        "use_absolute_position_embeddings": "pos_embed" in state,
        "use_mean_pooling": "fc_norm.weight" in state,
        "use_relative_position_bias": f"blocks.0.attn.{_TABLE}" in state,
        "use_shared_relative_position_bias": f"rel_pos_bias.{_TABLE}" in state,
    }


_KIND = HuggingFace(
    "beit", "BeitModel", "BeitForImageClassification", (*TOKEN, *PATCH_BIAS, "attn.q_bias", "attn.v_bias"), _config
)


def separate_qkv(layer: str, q: str, k: str, v: str) -> tuple[Rule, ...]:
    """Return rules for queries, keys and values in matrices of their own, of which keys have no bias."""
    return (
        rename(tuple(f"{layer}.{one}.weight" for one in (q, k, v)), "blocks.{i}.attn.qkv.weight"),
        rename(f"{layer}.{q}.bias", "blocks.{i}.attn.q_bias"),
        rename(f"{layer}.{v}.bias", "blocks.{i}.attn.v_bias"),
    )


def _beit_of_huggingface(name: str, layer: str, qkv: tuple[str, ...], own: str, shared: str) -> Layout:
    start = re.escape(layer.format(i=0))
    return vit_of_huggingface(
        name,
        rf"{start}\.lambda_1|{start}\.{re.escape(own)}\.{_TABLE}|{re.escape(shared)}\.{_TABLE}",
        (
            *separate_qkv(layer, *qkv),
            *(rename(f"{layer}.lambda_{k}", f"blocks.{{i}}.gamma_{k}") for k in (1, 2)),
            rename(f"{layer}.{own}.{_TABLE}", f"blocks.{{i}}.attn.{_TABLE}"),
            rename(f"{shared}.{_TABLE}", f"rel_pos_bias.{_TABLE}"),
            *same(("pooler.layernorm", "fc_norm")),
        ),
        tower="beit.",
        dropped=r".*\.relative_position_index|/lm_head\..*",
        last=same(("/layernorm", "norm")),  # the pre-training model's, which has it beside the tower
        kind=_KIND,
    )


def _arguments(variant: Variant, img_size: int, init_values: float) -> dict[str, Any]:
    return {
        **variant.arguments,
        "img_size": img_size,
        "patch_size": 16,
        "global_pool": "avg",
        "init_values": init_values,
        "pos_embed": "none",
        "use_rel_pos_bias": True,
        "fix_init": True,
    }


def _infer(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of models with BEiT's blocks, DINOv3 among them."""
    return {
        "block_fn": BeitBlock,
        "use_rel_pos_bias": f"blocks.0.attn.{_TABLE}" in state,
        "use_shared_rel_pos_bias": f"rel_pos_bias.{_TABLE}" in state,
    }


FAMILY = Family(
    models={
        f"beit{version}_{size}_patch16_{pixels}": Model(
            _arguments(VARIANTS[size], pixels, 0.1 if version + size == "base" else 1e-5), IMAGENET if version else {}
        )
        for version, size, sizes in (
            ("", "base", (224, 384)),
            ("", "large", (224, 384, 512)),
            ("v2", "base", (224,)),
            ("v2", "large", (224,)),
        )
        for pixels in sizes
    },
    layouts=(
        TIMM,
        _beit_of_huggingface(
            "huggingface-5", HUGGINGFACE_5_LAYER, HUGGINGFACE_5_QKV, "relative_position_bias", "shared_position_bias"
        ),
        _beit_of_huggingface(
            "huggingface",
            HUGGINGFACE_LAYER,
            HUGGINGFACE_QKV,
            "attention.attention.relative_position_bias",
            "encoder.relative_position_bias",
        ),
    ),
    recognise=lambda names: (
        any(name in names for name in ("blocks.0.gamma_1", "blocks.0.attn.q_bias", f"blocks.0.attn.{_TABLE}"))
        or f"rel_pos_bias.{_TABLE}" in names
    ),
    infer=_infer,
)
