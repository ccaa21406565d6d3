"""The image tower of SigLIP, which pools by attention from a learned query (Zhai et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvit.checkpoints.rules import HuggingFace, State, rename, same
from fastvit.models.families.clip import tower_of_huggingface
from fastvit.models.families.family import Family
from fastvit.models.families.vit import NORM, PATCH_BIAS, POSITIONS, QKV_BIAS


def _config(state: State, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"intermediate_size": state["blocks.0.mlp.fc2.weight"].shape[1]}


_KIND = HuggingFace(
    "siglip_vision_model",
    "SiglipVisionModel",
    None,
    (*POSITIONS, *PATCH_BIAS, *NORM, *QKV_BIAS, "attn_pool.latent"),
    _config,
    square=True,
)
SIGLIP = tower_of_huggingface(
    _KIND,
    (
        rename("head.probe", "attn_pool.latent"),
        rename("head.attention.in_proj_{p}", ("attn_pool.q.{p}", "attn_pool.kv.{p}")),
        *same(
            ("head.attention.out_proj", "attn_pool.proj"),
            ("head.layernorm", "attn_pool.norm"),
            ("head.mlp.fc1", "attn_pool.mlp.fc1"),
            ("head.mlp.fc2", "attn_pool.mlp.fc2"),
        ),
    ),
    r"head\.probe",
    1e-6,
    "gelu_pytorch_tanh",
)

FAMILY = Family(layouts=(SIGLIP,))
