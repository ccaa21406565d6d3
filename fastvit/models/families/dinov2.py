"""DINOv2, with and without registers (Oquab et al., 2023; Darcet et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fastvit.checkpoints.configs import huggingface_options
from fastvit.checkpoints.rules import HuggingFace, Layout, Rule, State, block, gated, is_gated, rename, same
from fastvit.models.families.family import Family
from fastvit.models.families.vit import HUGGINGFACE_5_QKV, HUGGINGFACE_QKV, PLAIN, TIMM_RULES


def _registers_after_positions(state: State) -> None:
    """DINOv2 adds positions before its registers come in: the class token's is folded into the class token."""
    if "reg_token" in state:
        positions = state["pos_embed"]
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]


def _no_position_is_zero(state: State) -> None:
    """The other direction of :func:`_registers_after_positions`: the class token's position is part of it already."""
    if "reg_token" in state and "pos_embed" in state:
        positions = state["pos_embed"]
        rows, patches = positions.shape[1], positions.shape[1] - 1 - state["reg_token"].shape[1]
        if patches > 0 and math.isqrt(patches) ** 2 == patches and math.isqrt(rows) ** 2 != rows:
            raise ValueError(f"{rows} positions, some of them for registers, which have none in transformers' DINOv2")
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


DINOV2 = Layout(
    "dinov2",
    "patch_embed.proj.weight",
    (
        rename("register_tokens", "reg_token"),
        *block("blocks.{i}", mlp__fc1="mlp.w12", mlp__fc2="mlp.w3"),
        *TIMM_RULES,
    ),
    also=r"register_tokens|blocks\.0\.mlp\.w12\.weight",
    dropped=r"mask_token|/.*head.*",
    finish=_registers_after_positions,
)


def _mlp_ratio(inner: int, width: int, gated: bool, name: str) -> int:
    """Return mlp_ratio, of which DINOv2 computes its hidden features: of a gated MLP two thirds, in eights."""
    for ratio in range(1, 2 * inner // width + 2):
        if inner == ((int(ratio * width * 2 / 3) + 7) // 8 * 8 if gated else ratio * width):
            return ratio
    raise ValueError(f"{name} has MLPs of {inner} hidden features, which no mlp_ratio of transformers' DINOv2 gives")


def _config(state: State, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    width, inner = state["blocks.0.mlp.fc2.weight"].shape
    gated = is_gated(state)
    registers = {"num_register_tokens": state["reg_token"].shape[1]} if "reg_token" in state else {}
    return {
        "mlp_ratio": _mlp_ratio(inner, width, gated, name),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "use_swiglu_ffn": gated,
        **registers,
    }


def _unused(state: State) -> State:
    cls_token = state["cls_token"]
    return {"embeddings.mask_token": cls_token.new_zeros(cls_token.shape[1:])}


def _kind(state: State) -> HuggingFace:
    registers = "reg_token" in state
    return HuggingFace(
        "dinov2_with_registers" if registers else "dinov2",
        "Dinov2WithRegistersModel" if registers else "Dinov2Model",
        None,  # a classifier there reads the class token and the mean
        (*PLAIN, "ls1.gamma", "ls2.gamma"),
        _config,
        _unused,
        gated=True,
        no_embed_class=registers,
    )


def _dinov2_of_huggingface(name: str, also: str, qkv: tuple[str, ...], proj: str, gates: tuple[Rule, ...]) -> Layout:
    """``gates`` are the rules for its gated MLPs, as they are written."""
    layer = "encoder.layer.{i}"
    return Layout(
        name,
        "embeddings.patch_embeddings.projection.weight",
        (
            rename("embeddings.cls_token", "cls_token"),
            rename("embeddings.register_tokens", "reg_token"),
            rename("embeddings.position_embeddings", "pos_embed"),
            *same(("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("layernorm", "norm")),
            *gates,
            *block(
                layer, norm1="norm1", norm2="norm2", attn__qkv=qkv, attn__proj=proj, mlp__fc1="mlp.fc1",
                mlp__fc2="mlp.fc2",
            ),
            rename(f"{layer}.layer_scale1.lambda1", "blocks.{i}.ls1.gamma"),
            rename(f"{layer}.layer_scale2.lambda1", "blocks.{i}.ls2.gamma"),
        ),
        also=also,
        dropped=r"embeddings\.mask_token|/classifier\..*",  # a classifier there reads the class token and the mean
        options=huggingface_options(1e-6, "gelu"),
        finish=_registers_after_positions,
        begin=_no_position_is_zero,
        huggingface=_kind,
        written=(name.removeprefix("dinov2-"),),
    )  # fmt: skip


_DINOV2_GATED = gated("encoder.layer.{i}", ("mlp.weights_in",), "mlp.weights_out")
_DINOV2_GATED_5 = gated("encoder.layer.{i}", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")

FAMILY = Family(
    layouts=(
        DINOV2,
        _dinov2_of_huggingface(
            "dinov2-huggingface-5",
            r"encoder\.layer\.0\.attention\.q_proj\.weight",
            HUGGINGFACE_5_QKV,
            "attention.o_proj",
            (*_DINOV2_GATED_5, *_DINOV2_GATED),
        ),
        _dinov2_of_huggingface(
            "dinov2-huggingface",
            r"encoder\.layer\.0\.layer_scale1\.lambda1",
            HUGGINGFACE_QKV,
            "attention.output.dense",
            (*_DINOV2_GATED, *_DINOV2_GATED_5),
        ),
    ),
)
