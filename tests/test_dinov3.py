"""DINOv3 in fastvit.ViT is timm's and Hugging Face's: logits and every gradient, at more than one image size."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor

import fastvit
from fastvit.models.families import FAMILIES
from parity import Tensors, assert_parity, randomise

SIZES = {"depth": 2, "embed_dim": 64, "num_heads": 2, "patch_size": 8, "num_classes": 5}
NAMES = [
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "vit_small_plus_patch16_dinov3",
    "vit_small_plus_patch16_dinov3_qkvb",
    "vit_base_patch16_dinov3",
    "vit_huge_plus_patch16_dinov3_qkvb",
    "vit_7b_patch16_dinov3",
]


def packed_gates(given: Tensors) -> Tensors:
    """timm's names, with its fc1_g and fc1_x as the halves of our fc1."""
    out = {name: value for name, value in given.items() if "fc1_" not in name}
    for name in given:
        if "fc1_g" in name:
            out[name.replace("fc1_g", "fc1")] = torch.cat([given[name], given[name.replace("fc1_g", "fc1_x")]])
    return out


@pytest.mark.parametrize("size", [(32, 48), (40, 24)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_timm(name: str, size: tuple[int, int]) -> None:
    ours, theirs = fastvit.create_model(name, **SIZES), timm.create_model(name, **SIZES)
    assert_parity(ours, theirs, size, packed_gates)


@pytest.mark.parametrize("rate", [0.25, 0.7])
@pytest.mark.parametrize("options", [{}, {"global_pool": "token", "dynamic_img_size": False}], ids=str)
def test_patch_dropout_is_timms(options: dict[str, Any], rate: float) -> None:
    """The same patches, which both draw alike, each with the angles of its place."""
    options = {**SIZES, **options, "img_size": (32, 48), "patch_drop_rate": rate}
    name = "vit_small_patch16_dinov3_qkvb"
    assert_parity(fastvit.create_model(name, **options), timm.create_model(name, **options), (32, 48))


def test_timms_class_token_pool_and_fixed_size() -> None:
    options = {**SIZES, "global_pool": "token", "dynamic_img_size": False, "img_size": (32, 48)}
    name = "vit_small_patch16_dinov3_qkvb"
    ours, theirs = fastvit.create_model(name, **options), timm.create_model(name, **options)
    assert_parity(ours, theirs, (32, 48))
    for model in (ours, theirs):
        model.set_input_size((24, 16))
    images = torch.randn(2, 3, 24, 16)
    assert (ours(images) - theirs(images)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"])
def test_timms_state_dict_loads_as_it_is(name: str) -> None:
    """Strictly, with two matrices where ours has one."""
    theirs = randomise(timm.create_model(name, **SIZES)).eval()
    ours = fastvit.create_model(name, **SIZES).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 48), (40, 24)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_hugging_face(gated: bool, size: tuple[int, int]) -> None:
    config = transformers.DINOv3ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, patch_size=8,
        num_register_tokens=4, layerscale_value=0.5, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu",
        rope_theta=50.0, pos_embed_rescale=None,
    )  # fmt: skip
    theirs = transformers.DINOv3ViTModel(config)
    theirs.embeddings.mask_token.requires_grad_(False)
    name = f"vit_small_{'plus_' if gated else ''}patch16_dinov3_qkvb"
    options = {**SIZES, "num_classes": 0, "global_pool": "", "mlp_ratio": 4 if gated else 2, "rope": 50.0}
    ours = fastvit.create_model(name, **options)

    def translate(given: Tensors) -> Tensors:
        return FAMILIES["dinov3"].layouts[2].to_ours(given)[0]

    def forward(model: Any, images: Tensor) -> Tensor:
        return model(images).last_hidden_state

    assert_parity(ours, theirs, size, translate, forward, rounding=1e-6)  # its coordinates are float32


@pytest.mark.parametrize("name", fastvit.list_models("dinov3"))
def test_names_are_timms(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = fastvit.create_model(name, depth=1), timm.create_model(name, depth=1)
        shapes = {key: value.shape for key, value in packed_gates(theirs.state_dict()).items()}
        whole = timm.create_model(name)
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    assert ours.patch_embed.img_size == theirs.patch_embed.img_size
    assert ours.global_pool == theirs.global_pool and ours.norm.eps == theirs.norm.eps
    assert fastvit.models.families.find(name)[1].arguments["depth"] == len(whole.blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope": -1.0}, "rope must be the base of the periods, positive, or None, got -1.0"),
        ({"rope": 100.0, "embed_dim": 36, "num_heads": 6}, "embed_dim / num_heads is 6, no multiple of 4"),
        ({"rope": 100.0, "attn_layer": timm.layers.Attention}, None),  # ours, which has the same arguments
        ({"rope": 100.0, "num_heads": 2, "attn_layer": timm.layers.DiffAttention}, "blocks.0 is a Block with DiffAtt"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str | None) -> None:
    options = {**SIZES, "img_size": 32, **options}
    if message is None:
        fastvit.ViT(**options)
    else:
        with pytest.raises(ValueError, match=message):
            fastvit.ViT(**options)
