"""The plain ViT (Dosovitskiy et al., 2021) and models of its shape: AugReg, DeiT; torchvision's and others'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastvit.checkpoints import backbone
from fastvit.checkpoints.configs import huggingface_options, timm_options
from fastvit.checkpoints.rules import HuggingFace, Layout, Rule, State, block, rename, same
from fastvit.models.families.family import Family, Model

PATCHES = (8, 14, 16, 32)


class Variant(NamedTuple):
    """The sizes that a variant's name stands for."""

    paper: str
    width: int
    depth: int
    mlp: int
    heads: int

    @property
    def mlp_ratio(self) -> float:
        """mlp / width, such that int(width * mlp_ratio) is mlp: half a feature keeps rounding from landing below."""
        exact = self.mlp % self.width == 0
        return self.mlp / self.width if exact else (self.mlp + 0.5) / self.width

    @property
    def arguments(self) -> dict[str, Any]:
        """The same as arguments of :class:`fastvit.ViT`."""
        return {
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
        }


# B, L and H are the ViT paper's (table 1), Ti, S and M DeiT's and timm's, So400m SigLIP's, g and G those of
# "Scaling Vision Transformers" (table 2).
VARIANTS = {
    "tiny": Variant("Ti", 192, 12, 768, 3),
    "small": Variant("S", 384, 12, 1536, 6),
    "medium": Variant("M", 512, 12, 2048, 8),
    "base": Variant("B", 768, 12, 3072, 12),
    "large": Variant("L", 1024, 24, 4096, 16),
    "huge": Variant("H", 1280, 32, 5120, 16),
    "so400m": Variant("So400m", 1152, 27, 4304, 16),
    "giant": Variant("g", 1408, 40, 6144, 16),
    "gigantic": Variant("G", 1664, 48, 8192, 16),
}


def by_width(variants: Mapping[str, Variant]) -> dict[int, int]:
    """Return the attention heads of these variants by width."""
    return {variant.width: variant.heads for variant in variants.values()}


# --- timm's names, which are ours ---

_POSITIONS = (  # of fastvit's own models; timm's have none of these
    *(f"{at}.{part}" for at in ("pos_embed_2d", "layer_pos_embed") for part in ("prefix", "patches", "x", "y")),
    "blocks.{i}.attn.rel_pos_keys",
)
_BLOCKS = ("blocks.{i}", "blocks.{i}.row", "blocks.{i}.column")  # the latter two of an Axial-ViT
_PARTS = (
    *("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.norm", "attn.proj"),
    *("norm2", "mlp.fc1", "mlp.norm", "mlp.fc2"),
)
TIMM_RULES = (
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
    TIMM_RULES,
    also=r"blocks\.0\.(row\.)?attn\.qkv\.weight",
    dropped=r"mask_token|/.*head.*|/logit_.*|/text.*|/student.*|/teacher.*|/predictor.*",
    options=timm_options,
    written=("timm",),
)

# --- torchvision's ---

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
    written=("torchvision",),
)

# --- transformers' ---

TOKEN, NORM, QKV_BIAS = ("cls_token",), ("norm.weight", "norm.bias"), ("attn.qkv.bias",)
POSITIONS, PATCH_BIAS = ("pos_embed",), ("patch_embed.proj.bias",)
PLAIN = (*TOKEN, *POSITIONS, *PATCH_BIAS, *NORM)


def plain_config(state: State, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the entries of config.json that ViT, DeiT and most other kinds have."""
    inner = state["blocks.0.mlp.fc2.weight"].shape[1]
    return {"intermediate_size": inner, "qkv_bias": "blocks.0.attn.qkv.bias" in state}


HUGGINGFACE_VIT = HuggingFace("vit", "ViTModel", "ViTForImageClassification", PLAIN, plain_config)
HUGGINGFACE_LAYER, HUGGINGFACE_5_LAYER = "encoder.layer.{i}", "layers.{i}"
HUGGINGFACE_QKV = tuple(f"attention.attention.{one}" for one in ("query", "key", "value"))
HUGGINGFACE_5_QKV = tuple(f"attention.{one}_proj" for one in "qkv")


def vit_of_huggingface(
    name: str,
    also: str,
    rules: tuple[Rule, ...] = (),
    tower: str = "vit.",
    dropped: str = r"(?!)",
    finish: Callable[[State], None] = lambda state: None,
    mark: str = "embeddings.patch_embeddings.projection.weight",
    last: tuple[Rule, ...] = (),
    kind: HuggingFace = HUGGINGFACE_VIT,
) -> Layout:
    """Return the layout of transformers' ViT, or with ``rules`` a relative's; "huggingface-5" is that of version 5."""
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
                HUGGINGFACE_5_LAYER if today else HUGGINGFACE_LAYER,
                norm1="layernorm_before",
                norm2="layernorm_after",
                attn__qkv=HUGGINGFACE_5_QKV if today else HUGGINGFACE_QKV,
                attn__proj="attention.o_proj" if today else "attention.output.dense",
                mlp__fc1="mlp.fc1" if today else "intermediate.dense",
                mlp__fc2="mlp.fc2" if today else "output.dense",
            ),
            *last,
        ),
        also=also,
        dropped=rf"embeddings\.mask_token|pooler\..*|/decoder\..*|{dropped}",
        tower=tower,
        options=huggingface_options(1e-12, "gelu"),
        finish=finish,
        huggingface=lambda state: kind,
        written=(name,),
    )


HUGGINGFACE_QUERY = r"encoder\.layer\.0\.attention\.attention\.query\.weight"
HUGGINGFACE_5_QUERY = r"layers\.0\.attention\.q_proj\.weight"
HUGGINGFACE = vit_of_huggingface("huggingface", HUGGINGFACE_QUERY)
HUGGINGFACE_5 = vit_of_huggingface("huggingface-5", HUGGINGFACE_5_QUERY)

FAMILY = Family(
    models={
        f"vit_{size}_patch{patch}_224": Model({**variant.arguments, "img_size": 224, "patch_size": patch})
        for size, variant in VARIANTS.items()
        for patch in PATCHES
    },
    aliases={
        f"ViT-{variant.paper}/{patch}": f"vit_{size}_patch{patch}"
        for size, variant in VARIANTS.items()
        for patch in PATCHES
    },
    layouts=(TIMM, TORCHVISION, HUGGINGFACE_5, HUGGINGFACE),
    refused={
        r"(.*\.)?(conv_root|block1)\..*": "it is a hybrid, in names that no layout has",
        r"pixels\.mean": "it is a tokenizer, fastvit.training.pretrain.DVAE",
    },
)
