"""fastvit.ViT computes what timm's, torchvision's and Hugging Face's ViTs compute: logits and every gradient.

In float64 the models must agree within what float32 costs the other library's own model, in float32 to 1e-4.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm.layers
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastvit.layers import SwiGLU
from fastvit.models import ViT
from parity import Tensors, assert_parity, randomise

TI, S, B, L = ({"embed_dim": d, "num_heads": h} for d, h in ((192, 3), (384, 6), (768, 12), (1024, 16)))


@pytest.mark.parametrize(
    ("width", "patch", "size", "depth"),
    [
        pytest.param(TI, 16, (224, 224), 3, id="Ti/16 224"),
        pytest.param(S, 14, (140, 224), 2, id="S/14 140x224"),
        pytest.param(B, 32, (384, 384), 2, id="B/32 384"),
        pytest.param(L, 32, (224, 96), 2, id="L/32 224x96"),
        pytest.param(TI, (16, 8), (64, 48), 2, id="Ti/16x8 64x48"),
    ],
)
def test_timm_sizes(width: dict[str, int], patch: Any, size: tuple[int, int], depth: int) -> None:
    options = {**width, "img_size": size, "patch_size": patch, "depth": depth, "num_classes": 7}
    assert_parity(ViT(**options), VisionTransformer(**options), size)


SMALL: dict[str, Any] = {
    "img_size": (32, 48), "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5
}  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {
    "LayerScale": {"init_values": 0.1},
    "qk-norm": {"qk_norm": True},
    "more norms": {"scale_attn_norm": True, "scale_mlp_norm": True, "fc_norm": True},
    "registers": {"reg_tokens": 3},
    "registers without positions": {"reg_tokens": 3, "no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers, no class token": {"class_token": False, "global_pool": "max", "reg_tokens": 2},
    "CLIP": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "timm's GELUTanh": {"act_layer": timm.layers.GELUTanh},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "no final norm": {"final_norm": False},
    "no positions": {"pos_embed": "none"},
    "one block": {"depth": 1},
    "one channel": {"in_chans": 1},
    "pool avg": {"global_pool": "avg"},
    "pool avg with prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "pool max": {"global_pool": "max"},
    "pool avgmax": {"global_pool": "avgmax", "fc_norm": False},
    "pool map": {"global_pool": "map"},
    "pool prr": {"global_pool": "prr"},
    "no pool": {"global_pool": ""},
    "SwiGLU": {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 16 / 3},
    "GeGLU": {"mlp_layer": timm.layers.SwiGLUPacked},
    "SwiGLU in two matrices": {"mlp_layer": timm.layers.SwiGLU, "act_layer": nn.SiLU},
    "RMSNorm": {"norm_layer": "rmsnorm"},
    "norm of the patches": {"embed_norm_layer": "layernorm"},
    "differential attention": {"attn_layer": timm.layers.DiffAttention, "num_heads": 2},
    "timm's layers": {
        "attn_layer": timm.layers.Attention,
        "norm_layer": partial(timm.layers.LayerNorm, eps=1e-3),
        "embed_layer": timm.layers.PatchEmbed,
    },
    "dynamic size": {"dynamic_img_size": True, "img_size": (64, 32)},
    "dynamic size, patches only": {"dynamic_img_size": True, "img_size": (64, 32), "no_embed_class": True},
    "padding": {"dynamic_img_size": True, "dynamic_img_pad": True, "patch_size": 14, "img_size": 28},
    "drop path": {"drop_path_rate": 0.5, "init_values": 1.0},
    "dropout": {"drop_rate": 0.3, "pos_drop_rate": 0.1, "proj_drop_rate": 0.3, "drop_path_rate": 0.2},
    "patch dropout": {"patch_drop_rate": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_timm_options(name: str) -> None:
    options = {**SMALL, **OPTIONS[name]}
    assert_parity(ViT(**options), VisionTransformer(**options), (32, 48))


@pytest.mark.parametrize("masked", ["bool", "float", "causal"])
def test_timm_masks(masked: str) -> None:
    ours, theirs = ViT(**SMALL), randomise(VisionTransformer(**SMALL))
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 48)
    if masked == "causal":
        options: dict[str, Any] = {"is_causal": True}
    else:
        keep = torch.rand(7, 7) > 0.4
        keep.fill_diagonal_(True)
        options = {"attn_mask": keep if masked == "bool" else torch.randn(7, 7)}
    assert (ours(images, **options) - theirs(images, **options)).abs().max() <= 1e-5
    assert (ours(images, **options) - ours(images)).abs().max() > 1e-3


def test_fused_swiglu_is_timms() -> None:
    """Our own SwiGLU needs no act_layer, and has the keys of timm's SwiGLUPacked with SiLU."""
    theirs = VisionTransformer(**SMALL, mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU)
    ours = ViT(**SMALL, mlp_layer=SwiGLU)
    assert type(ours.blocks[0].mlp) is type(ViT(**SMALL, mlp_layer=timm.layers.SwiGLUPacked).blocks[0].mlp)
    assert_parity(ours, theirs, (32, 48))


def from_torchvision(given: Tensors) -> Tensors:
    names = {
        "class_token": "cls_token",
        "conv_proj": "patch_embed.proj",
        "encoder.pos_embedding": "pos_embed",
        "encoder.ln": "norm",
        "heads.head": "head",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj": "attn.proj",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
        "encoder.layers.encoder_layer_": "blocks.",
    }
    out = {}
    for key, value in given.items():
        for old, new in names.items():
            key = key.replace(old, new)
        out[key] = value
    return out


def test_torchvision() -> None:
    from torchvision.models import VisionTransformer as TorchvisionViT

    theirs = TorchvisionViT(64, 16, num_layers=2, num_heads=3, hidden_dim=96, mlp_dim=384, num_classes=6)
    ours = ViT(64, 16, embed_dim=96, depth=2, num_heads=3, num_classes=6)
    assert_parity(ours, theirs, (64, 64), from_torchvision)


def from_hugging_face(given: Tensors) -> Tensors:
    names = {
        "vit.": "",
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layers.": "blocks.",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "attention.": "attn.",
        "layernorm": "norm",
        "classifier": "head",
    }
    out = {}
    for key, value in given.items():
        for old, new in names.items():
            key = key.replace(old, new)
        out[key] = value
    for key in [k for k in out if ".q_proj." in k]:
        parts = [out.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        out[key.replace("q_proj", "qkv")] = torch.cat(parts)
    return out


def hugging_face_config() -> Any:
    from transformers import ViTConfig

    return ViTConfig(
        image_size=64,
        patch_size=16,
        num_hidden_layers=2,
        num_attention_heads=3,
        hidden_size=96,
        intermediate_size=384,
        num_labels=6,
    )


def our_hugging_face(**options: Any) -> ViT:
    norm_layer = partial(nn.LayerNorm, eps=hugging_face_config().layer_norm_eps)
    return ViT(64, 16, embed_dim=96, depth=2, num_heads=3, norm_layer=norm_layer, **options)


def test_hugging_face_classifier() -> None:
    from transformers import ViTForImageClassification

    def forward(model: Any, images: Tensor) -> Tensor:
        return model(images).logits

    theirs = ViTForImageClassification(hugging_face_config())
    assert_parity(our_hugging_face(num_classes=6), theirs, (64, 64), from_hugging_face, forward)


def test_hugging_face_backbone() -> None:
    from transformers import ViTModel

    def forward(model: Any, images: Tensor) -> Tensor:
        return model(images).last_hidden_state

    theirs = ViTModel(hugging_face_config(), add_pooling_layer=False)
    assert_parity(our_hugging_face(num_classes=0, global_pool=""), theirs, (64, 64), from_hugging_face, forward)
