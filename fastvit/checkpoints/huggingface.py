"""A folder that transformers' own ``from_pretrained`` takes: the weights, and the configuration that goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fastvit.activations import HUGGINGFACE
from fastvit.checkpoints.layouts import blocks
from fastvit.checkpoints.rules import Layout, State, is_gated
from fastvit.checkpoints.sizes import position_arguments

_ALL = (
    *("patch_embed.proj.weight", "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
    *("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
)


class _Kind(NamedTuple):
    """A kind of model in transformers.

    Args:
        model: its class without a classifier.
        classifier: its class with one, None where it has none that reads what ours does.
        needs: our names of what all such models have, besides :data:`_ALL`.
    """

    model: str
    classifier: str | None
    needs: tuple[str, ...]


_TOKEN, _NORM, _QKV = ("cls_token",), ("norm.weight", "norm.bias"), ("attn.qkv.bias",)
_POSITIONS, _PATCHES = ("pos_embed",), ("patch_embed.proj.bias",)
_SCALES, _PLAIN = ("ls1.gamma", "ls2.gamma"), (*_TOKEN, *_POSITIONS, *_PATCHES, *_NORM)
_KINDS = {
    "vit": _Kind("ViTModel", "ViTForImageClassification", _PLAIN),
    "deit": _Kind("DeiTModel", "DeiTForImageClassificationWithTeacher", _PLAIN),
    "beit": _Kind(
        "BeitModel", "BeitForImageClassification", (*_TOKEN, *_PATCHES, "attn.q_bias", "attn.v_bias")
    ),
    "dinov2": _Kind("Dinov2Model", None, (*_PLAIN, *_SCALES)),
    "dinov2_with_registers": _Kind("Dinov2WithRegistersModel", None, (*_PLAIN, *_SCALES)),
    "dinov3_vit": _Kind("DINOv3ViTModel", None, (*_TOKEN, *_PATCHES, *_NORM, "gamma_1", "gamma_2")),
    "clip_vision_model": _Kind(
        "CLIPVisionModel", "CLIPVisionModelWithProjection",
        (*_TOKEN, *_POSITIONS, *_NORM, *_QKV, "norm_pre.weight", "norm_pre.bias"),
    ),
    "siglip_vision_model": _Kind(
        "SiglipVisionModel", None, (*_POSITIONS, *_PATCHES, *_NORM, *_QKV, "attn_pool.latent")
    ),
}  # fmt: skip


def folder_of(
    state: State, layout: Layout, options: Mapping[str, Any], num_heads: int, name: str
) -> tuple[State, dict[str, Any]]:
    """(tensors of model.safetensors, config.json) for weights under our names.

    Args:
        layout: one that has names for all of them, of a kind that transformers knows.
        options: arguments of :class:`fastvit.ViT` that shapes don't tell, and "eps" of its norms.
        name: of the source, for messages.

    Raises:
        ValueError: that kind has something which the weights have not, or computes something else with them.
    """
    tensors = layout.from_ours(state)
    model_type = layout.model_type
    if model_type == "dinov2" and "reg_token" in state:
        model_type = "dinov2_with_registers"
    kind = _KINDS[model_type]
    classified = "head.weight" in state
    absent = [each for each in (*_ALL, *kind.needs) if each not in state and f"blocks.0.{each}" not in state]
    if absent:
        raise ValueError(f"{name} has no {', '.join(absent)}, which transformers' {kind.model} has")
    if is_gated(state) and not model_type.startswith("dino"):
        raise ValueError(f"{name} has gated MLPs, which transformers' {kind.model} has not")
    pool = "avg" if "fc_norm.weight" in state else "token"
    if classified and options.get("global_pool", pool) != pool:
        raise ValueError(
            f"{name}: global_pool is {options['global_pool']!r}; accepted with these weights in transformers' "
            f"{kind.classifier}: {pool!r}"
        )
    config = _common(state, options, num_heads) | _image(state, options, model_type, name)
    config |= {"model_type": model_type, "architectures": [kind.classifier if classified else kind.model]}
    config |= _own(state, options, model_type, name)
    if classified and model_type != "clip_vision_model":
        labels = [f"LABEL_{i}" for i in range(len(state["head.weight"]))]
        config |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return tensors | _unused(state, model_type), config


def _common(state: State, options: Mapping[str, Any], num_heads: int) -> dict[str, Any]:
    act = options.get("act_layer", "gelu")
    theirs = {ours: name for name, ours in reversed(HUGGINGFACE.items())}  # the first of several
    if act not in theirs:
        raise ValueError(f"act_layer is {act!r}; accepted: {', '.join(theirs)}")
    width, channels, p, q = state["patch_embed.proj.weight"].shape
    return {
        "dtype": str(state["patch_embed.proj.weight"].dtype).removeprefix("torch."),
        "hidden_act": theirs[act],
        "hidden_size": width,
        "layer_norm_eps": options.get("eps", 1e-6),
        "num_attention_heads": num_heads,
        "num_channels": channels,
        "num_hidden_layers": len(list(blocks(state))),
        "patch_size": p if p == q else [p, q],
    }


def _image(state: State, options: Mapping[str, Any], model_type: str, name: str) -> dict[str, Any]:
    """image_size, of a model to which it matters."""
    p, q = state["patch_embed.proj.weight"].shape[2:]
    found = position_arguments(state, (p, q), options, name) | {k: v for k, v in options.items() if k == "img_size"}
    if found.get("no_embed_class", False) != (model_type == "dinov2_with_registers"):
        raise ValueError(
            f"{name} has {state['pos_embed'].shape[1]} positions; transformers' {_KINDS[model_type].model} has one for "
            "the class token, and none for registers"
        )
    if "img_size" not in found:
        return {}
    size = found["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    if model_type in ("clip_vision_model", "siglip_vision_model") and height != width:
        raise ValueError(f"{name} is for images of {height}x{width}; transformers' {model_type} takes square ones")
    return {"image_size": height if height == width else [height, width]}


def _own(state: State, options: Mapping[str, Any], model_type: str, name: str) -> dict[str, Any]:
    """What only this kind of model is told."""
    width, inner = state["blocks.0.mlp.fc2.weight"].shape
    gated = is_gated(state)
    qkv_bias = "blocks.0.attn.qkv.bias" in state
    match model_type:
        case "vit" | "deit":
            return {"intermediate_size": inner, "qkv_bias": qkv_bias}
        case "beit":
            return {
                "intermediate_size": inner,
                "layer_scale_init_value": 0.1 if "blocks.0.gamma_1" in state else 0.0,
                "use_absolute_position_embeddings": "pos_embed" in state,
                "use_mean_pooling": "fc_norm.weight" in state,
                "use_relative_position_bias": "blocks.0.attn.relative_position_bias_table" in state,
                "use_shared_relative_position_bias": "rel_pos_bias.relative_position_bias_table" in state,
            }
        case "dinov2" | "dinov2_with_registers":
            registers = {"num_register_tokens": state["reg_token"].shape[1]} if "reg_token" in state else {}
            return {
                "mlp_ratio": _ratio(inner, width, gated, name),
                "qkv_bias": qkv_bias,
                "use_swiglu_ffn": gated,
                **registers,
            }
        case "dinov3_vit":
            return {
                "intermediate_size": inner,
                "num_register_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
                "query_bias": "blocks.0.attn.q_bias" in state,
                "value_bias": "blocks.0.attn.v_bias" in state,
                "rope_theta": options["rope"],
                "use_gated_mlp": gated,
                **({"hidden_act": "silu"} if gated else {}),
            }
        case "clip_vision_model":
            projection = {"projection_dim": len(state["head.weight"])} if "head.weight" in state else {}
            return {"intermediate_size": inner, **projection}
    return {"intermediate_size": inner}


def _ratio(inner: int, width: int, gated: bool, name: str) -> int:
    """mlp_ratio, from which DINOv2's hidden features are computed: of a gated MLP two thirds, in eights."""
    for ratio in range(1, 2 * inner // width + 2):
        if inner == ((int(ratio * width * 2 / 3) + 7) // 8 * 8 if gated else ratio * width):
            return ratio
    raise ValueError(f"{name} has MLPs of {inner} hidden features, which no mlp_ratio of transformers' DINOv2 gives")


def _unused(state: State, model_type: str) -> dict[str, Tensor]:
    """What such a model holds in any case and does not read: as it starts there."""
    cls_token: Tensor = state.get("cls_token", state["patch_embed.proj.weight"])
    if model_type.startswith("dinov2"):
        return {"embeddings.mask_token": cls_token.new_zeros(cls_token.shape[1:])}
    if model_type != "dinov3_vit":
        return {}
    none = {} if "reg_token" in state else {"embeddings.register_tokens": cls_token[:, :0].clone()}
    return {"embeddings.mask_token": cls_token.new_zeros(cls_token.shape), **none}
