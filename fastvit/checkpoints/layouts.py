"""Whose names the weights of a file have, and the way from theirs to timm's, which are ours, and back.

What a layout is, is in :mod:`fastvit.checkpoints.rules`; here is each that is known. Several may have one name, that of
a library whose kinds of models have names of their own: which one it is, is seen from the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit import activations
from fastvit.checkpoints import backbone
from fastvit.checkpoints.rules import Config, Layout, Rule, State, block, gated, rename, same


def _huggingface(eps: float, activation: str) -> Callable[[Config], dict[str, Any]]:
    """What transformers' config.json says, with the defaults of that kind of model."""

    def options(config: Config) -> dict[str, Any]:
        config = config.get("vision_config", config)
        act = config.get("hidden_act", activation)
        if act not in activations.HUGGINGFACE:
            accepted = ", ".join(activations.HUGGINGFACE)
            raise ValueError(f"config.json: hidden_act is {act!r}; accepted: {accepted}")
        found = {"eps": config.get("layer_norm_eps", eps), "act_layer": activations.HUGGINGFACE[act]}
        for theirs, ours in (("num_attention_heads", "num_heads"), ("image_size", "img_size")):
            if theirs in config:
                found[ours] = config[theirs]
        return found

    return options


def _timm(config: Config) -> dict[str, Any]:
    """What the config.json of a timm model says beside its weights."""
    given = dict(config.get("model_args", {}))
    if "global_pool" in config:
        given.setdefault("global_pool", config["global_pool"])
    known = (
        "img_size",
        "num_heads",
        "global_pool",
        "class_token",
        "no_embed_class",
        "init_values",
        "fc_norm",
        "act_layer",
        "eps",
        "rope",
        "pool_include_prefix",
    )
    return {name: given[name] for name in known if name in given}


def _no_bias_is_zero(state: State) -> None:
    """CLIP's projection to the space that it shares with text is a classifier without a bias."""
    if "head.weight" in state:
        state.setdefault("head.bias", state["head.weight"].new_zeros(len(state["head.weight"])))


def _zero_is_no_bias(state: State) -> None:
    """The other direction of :func:`_no_bias_is_zero`."""
    if "head.bias" in state and not state["head.bias"].any():
        del state["head.bias"]


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


_POSITIONS = (  # of fastvit's own models; timm's have none of these
    *(f"{at}.{part}" for at in ("pos_embed_2d", "layer_pos_embed") for part in ("prefix", "patches", "x", "y")),
    "blocks.{i}.attn.rel_pos_keys",
)
_BLOCKS = ("blocks.{i}", "blocks.{i}.row", "blocks.{i}.column")  # the latter two of an Axial-ViT
_PARTS = (
    *("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.norm", "attn.proj"),
    *("norm2", "mlp.fc1", "mlp.norm", "mlp.fc2"),
)
_OURS = (
    rename("cls_token", "cls_token"),
    rename("dist_token", "dist_token"),
    rename("reg_token", "reg_token"),
    rename("pos_embed", "pos_embed"),
    *same(
        ("patch_embed.proj", "patch_embed.proj"),
        ("norm_pre", "norm_pre"),
        ("norm", "norm"),
        ("fc_norm", "fc_norm"),
        ("head", "head"),
        ("head_dist", "head_dist"),
        ("pre_logits.fc", "pre_logits.fc"),
    ),
    *same(*((f"{block}.{part}", f"{block}.{part}") for block in _BLOCKS for part in _PARTS)),
    *(rename(f"{block}.{ls}.gamma", f"{block}.{ls}.gamma") for block in _BLOCKS for ls in ("ls1", "ls2")),
    *backbone.RULES,
    *(rename(name, name) for name in _POSITIONS),
    rename("attn_pool.latent", "attn_pool.latent"),
    *same(*((f"attn_pool.{part}", f"attn_pool.{part}") for part in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2"))),
)

TIMM = Layout(
    "timm",
    "patch_embed.proj.weight",
    _OURS,
    also=r"blocks\.0\.(row\.)?attn\.qkv\.weight",
    dropped=r"mask_token|decoder_.*|/.*head.*|/logit_.*|/text.*|/student.*|/teacher.*|/predictor.*",
    options=_timm,
)

_GAMMAS = (
    rename("blocks.{i}.gamma_1", "blocks.{i}.gamma_1"),
    rename("blocks.{i}.gamma_2", "blocks.{i}.gamma_2"),
    rename("blocks.{i}.attn.q_bias", "blocks.{i}.attn.q_bias"),
    rename("blocks.{i}.attn.v_bias", "blocks.{i}.attn.v_bias"),
)
_TABLES = tuple(
    rename(f"{module}.relative_position_bias_table", f"{module}.relative_position_bias_table")
    for module in ("blocks.{i}.attn", "rel_pos_bias")
)
_TIMM_GATED = gated("blocks.{i}", ("mlp.fc1_g", "mlp.fc1_x"), "mlp.fc2")

TIMM_BEIT = Layout(  # and BEiT's own
    "timm",
    "patch_embed.proj.weight",
    (*_GAMMAS, *_TABLES, *_TIMM_GATED, *_OURS),
    also=r"blocks\.0\.attn\.relative_position_bias_table|rel_pos_bias\.relative_position_bias_table",
    dropped=r"mask_token|lm_head\..*|.*\.relative_position_index",
    options=_timm,
)

_DINOV3: dict[str, Any] = {"eps": 1e-5, "rope": 100.0, "dynamic_img_size": True}


def _without_positions(state: State) -> None:
    if "pos_embed" in state:
        raise ValueError(
            "it has gamma_1 and pos_embed, as EVA and the Perception Encoder do: DINOv3's rotary embeddings are the "
            "only ones that fastvit.ViT has"
        )


TIMM_DINOV3 = Layout(
    "timm",
    "patch_embed.proj.weight",
    (*_GAMMAS, *_TIMM_GATED, *_OURS),
    also=r"blocks\.0\.gamma_1",
    options=lambda config: {**_DINOV3, "global_pool": "avg", **_timm(config)},
    finish=_without_positions,
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
        *_OURS,
    ),
    also=r"storage_tokens|rope_embed\.periods",
    dropped=r"mask_token|rope_embed\..*|blocks\.\d+\.attn\.qkv\.bias_mask|local_cls_norm\..*|/.*head.*",
    options=lambda config: dict(_DINOV3),
    finish=_queries_and_values_have_biases,
)

DINOV2 = Layout(
    "dinov2",
    "patch_embed.proj.weight",
    (
        rename("register_tokens", "reg_token"),
        *block("blocks.{i}", mlp__fc1="mlp.w12", mlp__fc2="mlp.w3"),
        *_OURS,
    ),
    also=r"register_tokens|blocks\.0\.mlp\.w12\.weight",
    dropped=r"mask_token|/.*head.*",
    finish=_registers_after_positions,
)

_CONV = ("patch_embeddings.projection", "patch_embed.proj")
TORCHVISION = Layout(
    "torchvision",
    "conv_proj.weight",
    (
        rename("class_token", "cls_token"),
        rename("encoder.pos_embedding", "pos_embed"),
        *same(
            ("conv_proj", "patch_embed.proj"),
            ("encoder.ln", "norm"),
            ("heads.head", "head"),
            ("heads.pre_logits", "pre_logits.fc"),
        ),
        rename("encoder.layers.encoder_layer_{i}.self_attention.in_proj_{p}", "blocks.{i}.attn.qkv.{p}"),
        *block(
            "encoder.layers.encoder_layer_{i}",
            norm1="ln_1",
            attn__proj="self_attention.out_proj",
            norm2="ln_2",
            mlp__fc1="mlp.0",
            mlp__fc2="mlp.3",
        ),
        *block("encoder.layers.encoder_layer_{i}", mlp__fc1="mlp.linear_1", mlp__fc2="mlp.linear_2"),
    ),
)


_HUGGINGFACE_LAYER, _HUGGINGFACE_5_LAYER = "encoder.layer.{i}", "layers.{i}"
_HUGGINGFACE_QKV = tuple(f"attention.attention.{one}" for one in ("query", "key", "value"))
_HUGGINGFACE_5_QKV = tuple(f"attention.{one}_proj" for one in "qkv")


def _vit_of_huggingface(
    name: str,
    also: str,
    rules: tuple[Rule, ...] = (),
    tower: str = "vit.",
    dropped: str = r"(?!)",
    finish: Callable[[State], None] = lambda state: None,
    mark: str = "embeddings.patch_embeddings.projection.weight",
    last: tuple[Rule, ...] = (),
) -> Layout:
    """ViT's names in transformers, "huggingface-5" today's; its relatives have ``rules`` that go first or last."""
    today = name == "huggingface-5"
    return Layout(
        name,
        mark,
        (
            *rules,
            rename("embeddings.cls_token", "cls_token"),
            rename("embeddings.position_embeddings", "pos_embed"),
            *same(
                ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
                ("layernorm", "norm"),
                ("/classifier", "head"),
            ),
            *block(
                _HUGGINGFACE_5_LAYER if today else _HUGGINGFACE_LAYER,
                norm1="layernorm_before",
                norm2="layernorm_after",
                attn__qkv=_HUGGINGFACE_5_QKV if today else _HUGGINGFACE_QKV,
                attn__proj="attention.o_proj" if today else "attention.output.dense",
                mlp__fc1="mlp.fc1" if today else "intermediate.dense",
                mlp__fc2="mlp.fc2" if today else "output.dense",
            ),
            *last,
        ),
        also=also,
        dropped=rf"embeddings\.mask_token|pooler\..*|/decoder\..*|{dropped}",
        tower=tower,
        options=_huggingface(1e-12, "gelu"),
        finish=finish,
        model_type=tower.removesuffix("."),
    )


_HUGGINGFACE_QUERY = r"encoder\.layer\.0\.attention\.attention\.query\.weight"
_HUGGINGFACE_5_QUERY = r"layers\.0\.attention\.q_proj\.weight"
HUGGINGFACE = _vit_of_huggingface("huggingface", _HUGGINGFACE_QUERY)
HUGGINGFACE_5 = _vit_of_huggingface("huggingface-5", _HUGGINGFACE_5_QUERY)


def _a_token_that_no_head_reads(state: State) -> None:
    """One classifier beside a distillation token reads the class token, and the other token is as a register."""
    if "head.weight" in state and "head_dist.weight" not in state:
        state["reg_token"] = state.pop("dist_token")


def _deit_of_huggingface(name: str, also: str) -> Layout:
    return _vit_of_huggingface(
        name,
        also,
        (
            rename("embeddings.distillation_token", "dist_token"),
            *same(("/cls_classifier", "head"), ("/distillation_classifier", "head_dist")),
        ),
        tower="deit.",
        finish=_a_token_that_no_head_reads,
        mark="embeddings.distillation_token",
    )


DEIT_HUGGINGFACE = _deit_of_huggingface("huggingface", _HUGGINGFACE_QUERY)
DEIT_HUGGINGFACE_5 = _deit_of_huggingface("huggingface-5", _HUGGINGFACE_5_QUERY)


def _apart(layer: str, q: str, k: str, v: str) -> tuple[Rule, ...]:
    """Rules for the queries, keys and values of a block, of which keys have no bias."""
    return (
        rename(tuple(f"{layer}.{one}.weight" for one in (q, k, v)), "blocks.{i}.attn.qkv.weight"),
        rename(f"{layer}.{q}.bias", "blocks.{i}.attn.q_bias"),
        rename(f"{layer}.{v}.bias", "blocks.{i}.attn.v_bias"),
    )


def _beit_of_huggingface(name: str, layer: str, qkv: tuple[str, ...], own: str, shared: str) -> Layout:
    table = "relative_position_bias_table"
    start = re.escape(layer.format(i=0))
    return _vit_of_huggingface(
        name,
        rf"{start}\.lambda_1|{start}\.{re.escape(own)}\.{table}|{re.escape(shared)}\.{table}",
        (
            *_apart(layer, *qkv),
            *(rename(f"{layer}.lambda_{k}", f"blocks.{{i}}.gamma_{k}") for k in (1, 2)),
            rename(f"{layer}.{own}.{table}", f"blocks.{{i}}.attn.{table}"),
            rename(f"{shared}.{table}", f"rel_pos_bias.{table}"),
            *same(("pooler.layernorm", "fc_norm")),
        ),
        tower="beit.",
        dropped=r".*\.relative_position_index|/lm_head\..*",
        last=same(("/layernorm", "norm")),  # the pre-training model's, which has it beside the tower
    )


BEIT_HUGGINGFACE = _beit_of_huggingface(
    "huggingface",
    _HUGGINGFACE_LAYER,
    _HUGGINGFACE_QKV,
    "attention.attention.relative_position_bias",
    "encoder.relative_position_bias",
)
BEIT_HUGGINGFACE_5 = _beit_of_huggingface(
    "huggingface-5", _HUGGINGFACE_5_LAYER, _HUGGINGFACE_5_QKV, "relative_position_bias", "shared_position_bias"
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
        options=_huggingface(1e-6, "gelu"),
        finish=_registers_after_positions,
        begin=_no_position_is_zero,
        model_type="dinov2",
    )  # fmt: skip


_DINOV2_GATED = gated("encoder.layer.{i}", ("mlp.weights_in",), "mlp.weights_out")
_DINOV2_GATED_5 = gated("encoder.layer.{i}", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
DINOV2_HUGGINGFACE = _dinov2_of_huggingface(
    "dinov2-huggingface",
    r"encoder\.layer\.0\.layer_scale1\.lambda1",
    _HUGGINGFACE_QKV,
    "attention.output.dense",
    (*_DINOV2_GATED, *_DINOV2_GATED_5),
)
DINOV2_HUGGINGFACE_5 = _dinov2_of_huggingface(
    "dinov2-huggingface-5",
    r"encoder\.layer\.0\.attention\.q_proj\.weight",
    _HUGGINGFACE_5_QKV,
    "attention.o_proj",
    (*_DINOV2_GATED_5, *_DINOV2_GATED),
)


def _no_registers_are_none(state: State) -> None:
    if "reg_token" in state and state["reg_token"].shape[1] == 0:
        del state["reg_token"]


def _dinov3_of_huggingface(name: str, layer: str) -> Layout:
    def options(config: Config) -> dict[str, Any]:
        found = _huggingface(1e-5, "gelu")(config)
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
            *_apart(layer, *_HUGGINGFACE_5_QKV),
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
        model_type="dinov3_vit",
    )  # fmt: skip


DINOV3_HUGGINGFACE = _dinov3_of_huggingface("huggingface", "layer.{i}")
DINOV3_HUGGINGFACE_5 = _dinov3_of_huggingface("huggingface-5", "model.layer.{i}")


def _tower_of_huggingface(kind: str, rules: tuple[Rule, ...], also: str, eps: float, activation: str) -> Layout:
    """The image tower of CLIP or SigLIP."""
    return Layout(
        f"{kind}-huggingface",
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
        options=_huggingface(eps, activation),
        finish=_no_bias_is_zero,
        begin=_zero_is_no_bias,
        model_type=f"{kind}_vision_model",
    )


CLIP_HUGGINGFACE = _tower_of_huggingface(
    "clip",
    (
        rename("embeddings.class_embedding", "cls_token", "token"),
        *same(("pre_layrnorm", "norm_pre")),  # their spelling
        rename("/visual_projection.weight", "head.weight"),
    ),
    r"embeddings\.class_embedding",
    1e-5,
    "quick_gelu",
)
SIGLIP_HUGGINGFACE = _tower_of_huggingface(
    "siglip",
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

# Those that need the more are asked first.
LAYOUTS = (
    DINOV3,
    TIMM_BEIT,
    TIMM_DINOV3,
    BEIT_HUGGINGFACE_5,
    BEIT_HUGGINGFACE,
    DEIT_HUGGINGFACE_5,
    DEIT_HUGGINGFACE,
    DINOV3_HUGGINGFACE_5,
    DINOV3_HUGGINGFACE,
    DINOV2,
    TIMM,
    TORCHVISION,
    DINOV2_HUGGINGFACE_5,
    HUGGINGFACE_5,
    DINOV2_HUGGINGFACE,
    HUGGINGFACE,
    CLIP_HUGGINGFACE,
    SIGLIP_HUGGINGFACE,
    OPENCLIP,
)

# What is seen to be another model than a ViT: a tensor of it, and why it is refused.
_REFUSED = {
    r"(.*\.)?patch_embed\.backbone\.(?!(stem\.|stages\.|conv\.|norm\.)).*": (
        "its patches are the features of another network than BiT's ResNet"
    ),
    r"(.*\.)?(conv_root|block1)\..*": "it is a hybrid, in names that no layout has",
    r"stages\.\d+\.blocks\..*": "it is a ResNet, of fastvit.resnet",
    r"pixels\.mean": "it is a tokenizer, fastvit.training.pretrain.DVAE",
}


def unwrapped(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same without what precedes every name, as a wrapper's "module." does."""
    found = dict(given)
    while all("." in name for name in found) and len({name.split(".")[0] for name in found}) == 1:
        found = {name.split(".", 1)[1]: value for name, value in found.items()}
    return found


def recognise(names: Sequence[str]) -> Layout:
    """The layout of a file with tensors of these names.

    Raises:
        ValueError: none is; it says what is accepted, and how the names begin.
    """
    for pattern, reason in _REFUSED.items():
        found = next((name for name in names if re.fullmatch(pattern, name)), None)
        if found is not None:
            raise ValueError(f"{reason} ({found}): fastvit.ViT has no such thing")
    for layout in LAYOUTS:
        if layout.prefix(names) is not None:
            return layout
    accepted = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
    raise ValueError(
        f"its names are those of no layout that is known; accepted: {accepted}. They begin with {sorted(names)[:4]}"
    )


# transformers' names for models other than its ViT have not changed, or are told apart.
_OF_HUGGINGFACE = {
    "huggingface": ("huggingface", "dinov2-huggingface", "clip-huggingface", "siglip-huggingface"),
    "huggingface-5": ("huggingface-5", "dinov2-huggingface-5", "clip-huggingface", "siglip-huggingface"),
}


def named(name: str, state: Mapping[str, Tensor]) -> Layout:
    """The layout of that name that has names for all of ``state``, which is under ours; else the plainest."""
    names = _OF_HUGGINGFACE.get(name, (name,))
    candidates = [layout for one in names for layout in reversed(LAYOUTS) if layout.name == one]
    return next((layout for layout in candidates if layout.names(state)), candidates[0])


def blocks(state: Mapping[str, Tensor]) -> Iterator[int]:
    """The numbers of the blocks that ``state``, under our names, has weights of."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in state)
    yield from sorted({int(match[1]) for match in found if match})
