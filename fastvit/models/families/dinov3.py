"""DINOv3: rotary positions, registers, LayerScale, no bias of keys (Siméoni et al., 2025)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastvit.checkpoints.configs import huggingface_options, timm_options
from fastvit.checkpoints.rules import Config, HuggingFace, Layout, State, block, gated, is_gated, rename, same
from fastvit.layers import BeitBlock, LayerNorm, SwiGLU
from fastvit.models.families.beit import GAMMA_RULES, GATED_RULES, separate_qkv
from fastvit.models.families.family import IMAGENET, Family, Model
from fastvit.models.families.vit import (
    HUGGINGFACE_5_QKV,
    NORM,
    PATCH_BIAS,
    TIMM_RULES,
    TOKEN,
    VARIANTS,
    Variant,
    by_width,
)

# Sizes, and whether their MLPs have a gate; mlp is the width of each half.
SIZES = {
    **{size: (VARIANTS[size], False) for size in ("tiny", "small", "base", "large")},
    "small_plus": (VARIANTS["small"], True),
    "huge_plus": (Variant("H+", 1280, 32, 5120, 20), True),
    "7b": (Variant("7B", 4096, 40, 8192, 32), True),
}
_HEADS = by_width({size: variant for size, (variant, _) in SIZES.items()})
_DINOV3: dict[str, Any] = {"eps": 1e-5, "rope": 100.0, "dynamic_img_size": True}


def _without_positions(state: State) -> None:
    if "pos_embed" in state:
        raise ValueError(
            "it has gamma_1 and pos_embed, as EVA and the Perception Encoder do: DINOv3's rotary embeddings are the "
            "only ones that fastvit.ViT has"
        )


TIMM = Layout(
    "timm",
    "patch_embed.proj.weight",
    (*GAMMA_RULES, *GATED_RULES, *TIMM_RULES),
    also=r"blocks\.0\.gamma_1",
    options=lambda config: {**_DINOV3, "global_pool": "avg", **timm_options(config)},
    finish=_without_positions,
    written=("timm",),
    heads=_HEADS,
)


def _queries_and_values_have_biases(state: State) -> None:
    """DINOv3's keys have a bias that is masked."""
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:
        q, _, v = state.pop(name).chunk(3)
        state[name.replace("qkv.bias", "q_bias")], state[name.replace("qkv.bias", "v_bias")] = q.clone(), v.clone()


DINOV3 = Layout(
    "dinov3",
    "patch_embed.proj.weight",
    (
        rename("storage_tokens", "reg_token"),
        rename("blocks.{i}.ls1.gamma", "blocks.{i}.gamma_1"),
        rename("blocks.{i}.ls2.gamma", "blocks.{i}.gamma_2"),
        *gated("blocks.{i}", ("mlp.w1", "mlp.w2"), "mlp.w3"),
        *TIMM_RULES,
    ),
    also=r"storage_tokens|rope_embed\.periods",
    dropped=r"mask_token|rope_embed\..*|blocks\.\d+\.attn\.qkv\.bias_mask|local_cls_norm\..*|/.*head.*",
    options=lambda config: dict(_DINOV3),
    finish=_queries_and_values_have_biases,
    heads=_HEADS,
)


def _config(state: State, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    gated = is_gated(state)
    return {
        "intermediate_size": state["blocks.0.mlp.fc2.weight"].shape[1],
        "num_register_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "query_bias": "blocks.0.attn.q_bias" in state,
        "value_bias": "blocks.0.attn.v_bias" in state,
        "rope_theta": options["rope"],
        "use_gated_mlp": gated,
        **({"hidden_act": "silu"} if gated else {}),
    }


def _unused(state: State) -> State:
    cls_token = state["cls_token"]
    none = {} if "reg_token" in state else {"embeddings.register_tokens": cls_token[:, :0].clone()}
    return {"embeddings.mask_token": cls_token.new_zeros(cls_token.shape), **none}


_KIND = HuggingFace(
    "dinov3_vit", "DINOv3ViTModel", None, (*TOKEN, *PATCH_BIAS, *NORM, "gamma_1", "gamma_2"), _config, _unused,
    gated=True, accelerated=False,
)  # fmt: skip


def _no_registers_are_none(state: State) -> None:
    if "reg_token" in state and state["reg_token"].shape[1] == 0:
        del state["reg_token"]


def _dinov3_of_huggingface(name: str, layer: str) -> Layout:
    def options(config: Config) -> dict[str, Any]:
        found = huggingface_options(1e-5, "gelu")(config)
        if config.get("use_gated_mlp") and found["act_layer"] != "silu":
            raise ValueError(f"config.json: hidden_act is {config.get('hidden_act')!r} in a gated MLP; accepted: silu")
        return {**_DINOV3, **found, "rope": float(config.get("rope_theta", _DINOV3["rope"]))}

    return Layout(
        name,
        "embeddings.patch_embeddings.weight",
        (
            rename("embeddings.cls_token", "cls_token"),
            rename("embeddings.register_tokens", "reg_token"),
            *same(("embeddings.patch_embeddings", "patch_embed.proj"), ("norm", "norm")),
            *separate_qkv(layer, *HUGGINGFACE_5_QKV),
            *gated(layer, ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
            *block(
                layer, norm1="norm1", norm2="norm2", attn__proj="attention.o_proj", mlp__fc1="mlp.up_proj",
                mlp__fc2="mlp.down_proj",
            ),
            rename(f"{layer}.layer_scale1.lambda1", "blocks.{i}.gamma_1"),
            rename(f"{layer}.layer_scale2.lambda1", "blocks.{i}.gamma_2"),
        ),
        also=re.escape(layer.format(i=0)) + r"\.norm1\.weight",
        dropped=r"embeddings\.mask_token",
        options=options,
        finish=_no_registers_are_none,
        huggingface=lambda state: _KIND,
        written=(name,),
        heads=_HEADS,
    )  # fmt: skip


def _arguments(variant: Variant, gated: bool, biases: bool) -> dict[str, Any]:
    return {
        **variant.arguments,
        "img_size": 256,
        "patch_size": 16,
        "num_classes": 0,
        "global_pool": "avg",
        "fc_norm": False,
        "qkv_bias": biases,
        "init_values": 1e-5,
        "reg_tokens": 4,
        "pos_embed": "none",
        "rope": 100.0,
        "block_fn": BeitBlock,
        "norm_layer": partial(LayerNorm, eps=1e-5),
        "dynamic_img_size": True,
        "fix_init": True,
        **({"mlp_layer": SwiGLU, "mlp_ratio": 2 * variant.mlp_ratio} if gated else {}),
    }


FAMILY = Family(
    models={
        f"vit_{size}_patch16_dinov3{biases}": Model(
            _arguments(variant, gated, bool(biases)), {**IMAGENET, "crop_pct": 1.0}
        )
        for size, (variant, gated) in SIZES.items()
        for biases in ("", "_qkvb")
        if size + biases not in ("tiny", "7b_qkvb")  # which nobody has
    },
    layouts=(
        DINOV3,
        TIMM,
        _dinov3_of_huggingface("huggingface-5", "model.layer.{i}"),
        _dinov3_of_huggingface("huggingface", "layer.{i}"),
    ),
)
