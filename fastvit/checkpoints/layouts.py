"""Whose names the weights of a file have, and the way from theirs to timm's, which are ours, and back.

A layout is a list of renamings. ``{i}`` stands for the number of a block, ``{p}`` for "weight" or "bias". Names are
those inside the tower: whatever stands before the tower's own ("vit.", "visual.", "module.model.") is taken off first,
and what is not in the tower (a classifier beside it, a text tower) has a "/" in front here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Config = Mapping[str, Any]


@cache
def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", "(?P<p>weight|bias)")
    return re.compile(text)


@dataclass(frozen=True)
class Rule:
    """Tensors of theirs, joined along the first dimension, are tensors of ours, cut in as many thirds as ``parts`` say.

    ``shape`` is how theirs differ: "token" (D,) or (1, D) for (1, 1, D), "rows" (N, D) for (1, N, D), "transposed".
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    shape: str = ""
    parts: tuple[int, ...] = (1, 2)

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Theirs to ours."""
        x = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        if self.shape == "token":
            x = x.reshape(1, 1, -1)
        elif self.shape == "rows":
            x = x.reshape(1, *x.shape[-2:])
        elif self.shape == "transposed":
            x = x.T.contiguous()
        if len(self.ours) == 1:
            return [x]
        return [part.clone() for part in x.split([len(x) // 3 * count for count in self.parts])]

    def backward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Ours to theirs, in the first of the shapes that theirs may have."""
        x = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        if self.shape == "token":
            x = x.flatten()
        elif self.shape == "rows":
            x = x[0]
        elif self.shape == "transposed":
            x = x.T.contiguous()
        return [x] if len(self.theirs) == 1 else list(x.chunk(len(self.theirs)))


def _rule(theirs: str | tuple[str, ...], ours: str | tuple[str, ...], shape: str = "") -> Rule:
    return Rule((theirs,) if isinstance(theirs, str) else theirs, (ours,) if isinstance(ours, str) else ours, shape)


def _same(*pairs: tuple[str | tuple[str, ...], str]) -> tuple[Rule, ...]:
    """Rules for weights and biases: ".{p}" is added to both names."""
    rules = []
    for theirs, ours in pairs:
        names = (theirs,) if isinstance(theirs, str) else theirs
        rules.append(Rule(tuple(f"{name}.{{p}}" for name in names), (f"{ours}.{{p}}",)))
    return tuple(rules)


def _block(theirs: str, **names: str | tuple[str, ...]) -> tuple[Rule, ...]:
    """Rules for what is below ``theirs`` in a block; a keyword's double underscore is a dot of our name."""
    pairs = []
    for ours, name in names.items():
        each = (name,) if isinstance(name, str) else name
        pairs.append((tuple(f"{theirs}.{one}" for one in each), f"blocks.{{i}}.{ours.replace('__', '.')}"))
    return _same(*pairs)


@dataclass(frozen=True)
class Layout:
    """One way to name a Vision Transformer's weights.

    Args:
        name: as users call it.
        mark: the tensor that every such file has; what precedes it is the tower's prefix.
        rules: theirs to ours.
        also: a pattern that one more name in the tower matches, where the mark alone does not tell.
        dropped: a pattern of names that are no part of the network that classifies or embeds images.
        tower: the prefix when such a file is written.
        options: arguments of :class:`fastvit.ViT` that shapes don't tell, from the file's configuration.
        finish: what is left to do to our names.
    """

    name: str
    mark: str
    rules: tuple[Rule, ...]
    also: str = ""
    dropped: str = r"(?!)"
    tower: str = ""
    options: Callable[[Config], dict[str, Any]] = lambda config: {}
    finish: Callable[[State], None] = lambda state: None

    def prefix(self, names: Sequence[str]) -> str | None:
        """What precedes the tower's names; None where these are names of another layout."""
        prefixes = [name.removesuffix(self.mark) for name in names if f".{name}".endswith(f".{self.mark}")]
        for prefix in sorted(prefixes, key=len):
            inside = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
            if not self.also or any(re.fullmatch(self.also, name) for name in inside):
                return prefix
        return None

    def to_ours(self, given: Mapping[str, Tensor]) -> tuple[State, list[str], list[str]]:
        """(weights under our names, names of no use, names that nothing is known about)."""
        prefix = self.prefix(list(given)) or ""
        left = {
            name.removeprefix(prefix) if name.startswith(prefix) else f"/{name}": value for name, value in given.items()
        }
        out: State = {}
        for rule in self.rules:
            theirs = rule.theirs if prefix else tuple(name.removeprefix("/") for name in rule.theirs)
            for name in list(left):
                found = _pattern(theirs[0]).fullmatch(name)
                if found:
                    names = [one.format(**found.groupdict()) for one in theirs]
                    absent = [one for one in names if one not in left]
                    if absent:
                        raise ValueError(f"{prefix}{name} goes with {', '.join(absent)}, which is missing")
                    values = rule.forward([left.pop(one) for one in names])
                    out |= zip((one.format(**found.groupdict()) for one in rule.ours), values, strict=True)
        self.finish(out)
        useless = [name for name in left if re.fullmatch(self.dropped, name)]
        unknown = [name for name in left if name not in useless]
        return out, [name.removeprefix("/") for name in useless], [name.removeprefix("/") for name in unknown]

    def from_ours(self, state: Mapping[str, Tensor]) -> State:
        """Weights under our names as a file of this layout has them.

        Raises:
            ValueError: some have no name in it; they are listed.
        """
        left = dict(state)
        out: State = {}
        for rule in self.rules:
            for name in list(left):
                found = _pattern(rule.ours[0]).fullmatch(name)
                if found:
                    names = [one.format(**found.groupdict()) for one in rule.ours]
                    if all(one in left for one in names):
                        values = rule.backward([left.pop(one) for one in names])
                        theirs = (one.format(**found.groupdict()) for one in rule.theirs)
                        out |= zip(map(self._written, theirs), values, strict=True)
        if left:
            raise ValueError(f"the layout {self.name!r} has no names for {', '.join(sorted(left))}")
        return out

    def _written(self, name: str) -> str:
        return name.removeprefix("/") if name.startswith("/") else self.tower + name


_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def _huggingface(eps: float, activation: str) -> Callable[[Config], dict[str, Any]]:
    """What transformers' config.json says, with the defaults of that kind of model."""

    def options(config: Config) -> dict[str, Any]:
        config = config.get("vision_config", config)
        act = config.get("hidden_act", activation)
        if act not in _ACTIVATIONS:
            raise ValueError(f"config.json: hidden_act is {act!r}; accepted: {', '.join(_ACTIVATIONS)}")
        found = {"eps": config.get("layer_norm_eps", eps), "act_layer": _ACTIVATIONS[act]}
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
    )
    return {name: given[name] for name in known if name in given}


def _no_bias_is_zero(state: State) -> None:
    """CLIP's projection to the space that it shares with text is a classifier without a bias."""
    if "head.weight" in state:
        state.setdefault("head.bias", state["head.weight"].new_zeros(len(state["head.weight"])))


def _registers_after_positions(state: State) -> None:
    """DINOv2 adds positions before its registers come in: the class token's is folded into the class token."""
    if "reg_token" in state:
        positions = state["pos_embed"]
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]


_OURS = (
    _rule("cls_token", "cls_token"),
    _rule("reg_token", "reg_token"),
    _rule("pos_embed", "pos_embed"),
    *_same(
        ("patch_embed.proj", "patch_embed.proj"),
        ("norm_pre", "norm_pre"),
        ("norm", "norm"),
        ("fc_norm", "fc_norm"),
        ("head", "head"),
        ("pre_logits.fc", "pre_logits.fc"),
    ),
    *_block(
        "blocks.{i}",
        norm1="norm1",
        attn__qkv="attn.qkv",
        attn__q_norm="attn.q_norm",
        attn__k_norm="attn.k_norm",
        attn__norm="attn.norm",
        attn__proj="attn.proj",
        norm2="norm2",
        mlp__fc1="mlp.fc1",
        mlp__norm="mlp.norm",
        mlp__fc2="mlp.fc2",
    ),
    _rule("blocks.{i}.ls1.gamma", "blocks.{i}.ls1.gamma"),
    _rule("blocks.{i}.ls2.gamma", "blocks.{i}.ls2.gamma"),
    _rule("attn_pool.latent", "attn_pool.latent"),
    *_same(*((f"attn_pool.{part}", f"attn_pool.{part}") for part in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2"))),
)

TIMM = Layout(
    "timm",
    "patch_embed.proj.weight",
    _OURS,
    also=r"blocks\.0\.attn\.qkv\.weight",
    dropped=r"mask_token|decoder_.*|/.*head.*|/logit_.*|/text.*|/student.*|/teacher.*|/predictor.*",
    options=_timm,
)

DINOV2 = Layout(
    "dinov2",
    "patch_embed.proj.weight",
    (
        _rule("register_tokens", "reg_token"),
        *_block("blocks.{i}", mlp__fc1="mlp.w12", mlp__fc2="mlp.w3"),
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
        _rule("class_token", "cls_token"),
        _rule("encoder.pos_embedding", "pos_embed"),
        *_same(
            ("conv_proj", "patch_embed.proj"),
            ("encoder.ln", "norm"),
            ("heads.head", "head"),
            ("heads.pre_logits", "pre_logits.fc"),
        ),
        _rule("encoder.layers.encoder_layer_{i}.self_attention.in_proj_{p}", "blocks.{i}.attn.qkv.{p}"),
        *_block(
            "encoder.layers.encoder_layer_{i}",
            norm1="ln_1",
            attn__proj="self_attention.out_proj",
            norm2="ln_2",
            mlp__fc1="mlp.0",
            mlp__fc2="mlp.3",
        ),
        *_block("encoder.layers.encoder_layer_{i}", mlp__fc1="mlp.linear_1", mlp__fc2="mlp.linear_2"),
    ),
)


def _vit_of_huggingface(name: str, layer: str, also: str, **blocks: str | tuple[str, ...]) -> Layout:
    return Layout(
        name,
        "embeddings.patch_embeddings.projection.weight",
        (
            _rule("embeddings.cls_token", "cls_token"),
            _rule("embeddings.position_embeddings", "pos_embed"),
            *_same(
                ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
                ("layernorm", "norm"),
                ("/classifier", "head"),
            ),
            *_block(layer, norm1="layernorm_before", norm2="layernorm_after", **blocks),
        ),
        also=also,
        dropped=r"embeddings\.mask_token|pooler\..*|/decoder\..*",
        tower="vit.",
        options=_huggingface(1e-12, "gelu"),
    )


HUGGINGFACE = _vit_of_huggingface(
    "huggingface",
    "encoder.layer.{i}",
    r"encoder\.layer\.0\.attention\.attention\.query\.weight",
    attn__qkv=tuple(f"attention.attention.{one}" for one in ("query", "key", "value")),
    attn__proj="attention.output.dense",
    mlp__fc1="intermediate.dense",
    mlp__fc2="output.dense",
)
HUGGINGFACE_5 = _vit_of_huggingface(
    "huggingface-5",
    "layers.{i}",
    r"layers\.0\.attention\.q_proj\.weight",
    attn__qkv=tuple(f"attention.{one}_proj" for one in "qkv"),
    attn__proj="attention.o_proj",
    mlp__fc1="mlp.fc1",
    mlp__fc2="mlp.fc2",
)


def _dinov2_of_huggingface(name: str, also: str, qkv: tuple[str, ...], proj: str) -> Layout:
    layer = "encoder.layer.{i}"
    return Layout(
        name,
        "embeddings.patch_embeddings.projection.weight",
        (
            _rule("embeddings.cls_token", "cls_token"),
            _rule("embeddings.register_tokens", "reg_token"),
            _rule("embeddings.position_embeddings", "pos_embed"),
            *_same(("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("layernorm", "norm")),
            *_block(
                layer, norm1="norm1", norm2="norm2", attn__qkv=qkv, attn__proj=proj, mlp__fc1="mlp.fc1",
                mlp__fc2="mlp.fc2",
            ),
            *_block(layer, mlp__fc1=("mlp.gate_proj", "mlp.up_proj"), mlp__fc2="mlp.down_proj"),
            *_block(layer, mlp__fc1="mlp.weights_in", mlp__fc2="mlp.weights_out"),
            _rule(f"{layer}.layer_scale1.lambda1", "blocks.{i}.ls1.gamma"),
            _rule(f"{layer}.layer_scale2.lambda1", "blocks.{i}.ls2.gamma"),
        ),
        also=also,
        dropped=r"embeddings\.mask_token|/classifier\..*",  # a classifier there reads the class token and the mean
        options=_huggingface(1e-6, "gelu"),
        finish=_registers_after_positions,
    )  # fmt: skip


DINOV2_HUGGINGFACE = _dinov2_of_huggingface(
    "dinov2-huggingface",
    r"encoder\.layer\.0\.layer_scale1\.lambda1",
    tuple(f"attention.attention.{one}" for one in ("query", "key", "value")),
    "attention.output.dense",
)
DINOV2_HUGGINGFACE_5 = _dinov2_of_huggingface(
    "dinov2-huggingface-5",
    r"encoder\.layer\.0\.attention\.q_proj\.weight",
    tuple(f"attention.{one}_proj" for one in "qkv"),
    "attention.o_proj",
)


def _tower_of_huggingface(name: str, rules: tuple[Rule, ...], also: str, eps: float, activation: str) -> Layout:
    """The image tower of CLIP or SigLIP."""
    return Layout(
        name,
        "embeddings.patch_embedding.weight",
        (
            *_same(("embeddings.patch_embedding", "patch_embed.proj"), ("post_layernorm", "norm")),
            _rule("embeddings.position_embedding.weight", "pos_embed", "rows"),
            *_block(
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
        options=_huggingface(eps, activation),
        finish=_no_bias_is_zero,
    )


CLIP_HUGGINGFACE = _tower_of_huggingface(
    "clip-huggingface",
    (
        _rule("embeddings.class_embedding", "cls_token", "token"),
        *_same(("pre_layrnorm", "norm_pre")),  # their spelling
        _rule("/visual_projection.weight", "head.weight"),
    ),
    r"embeddings\.class_embedding",
    1e-5,
    "quick_gelu",
)
SIGLIP_HUGGINGFACE = _tower_of_huggingface(
    "siglip-huggingface",
    (
        _rule("head.probe", "attn_pool.latent"),
        _rule("head.attention.in_proj_{p}", ("attn_pool.q.{p}", "attn_pool.kv.{p}")),
        *_same(
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
        _rule("class_embedding", "cls_token", "token"),
        _rule("positional_embedding", "pos_embed", "rows"),
        _rule("proj", "head.weight", "transposed"),
        _rule("transformer.resblocks.{i}.attn.in_proj_{p}", "blocks.{i}.attn.qkv.{p}"),
        *_same(("conv1", "patch_embed.proj"), ("ln_pre", "norm_pre"), ("ln_post", "norm")),
        *_block(
            "transformer.resblocks.{i}",
            norm1="ln_1",
            attn__proj="attn.out_proj",
            norm2="ln_2",
            mlp__fc1="mlp.c_fc",
            mlp__fc2="mlp.c_proj",
        ),
        _rule("transformer.resblocks.{i}.ls_1.gamma", "blocks.{i}.ls1.gamma"),
        _rule("transformer.resblocks.{i}.ls_2.gamma", "blocks.{i}.ls2.gamma"),
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

# What is seen to be a transformer that a ViT is not: a tensor of it, and why it is refused.
_REFUSED = {
    r"(.*\.)?blocks\.0\.attn\.relative_position_bias_table|(.*\.)?rel_pos_bias\..*|.*relative_position_bias_table": (
        "it is a BEiT, which has relative position biases"
    ),
    r"(.*\.)?(storage_tokens|rope_embed\..*|rope_embeddings\..*)": "it is a DINOv3, which has rotary embeddings",
    r"(.*\.)?dist_token|(.*\.)?embeddings\.distillation_token": "it is a distilled DeiT, which has two classifiers",
    r"(.*\.)?(patch_embed\.backbone|conv_root|block1)\..*": "it is a hybrid, whose patches are a ResNet's features",
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
    accepted = ", ".join(layout.name for layout in LAYOUTS)
    raise ValueError(
        f"its names are those of no layout that is known; accepted: {accepted}. They begin with {sorted(names)[:4]}"
    )


def blocks(state: Mapping[str, Tensor]) -> Iterator[int]:
    """The numbers of the blocks that ``state``, under our names, has weights of."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in state)
    yield from sorted({int(match[1]) for match in found if match})
