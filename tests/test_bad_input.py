"""Bad input to a model: the error names the value that was wrong and what would be accepted, and nothing changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastvit
from fastvit.checkpoints import load_checkpoint
from fastvit.layers import Attention, PatchEmbed
from fastvit.models import ViT, create_model

SMALL: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"img_size": -32}, ["img_size", "-32"]),
        ({"img_size": 0}, ["img_size", "0"]),
        ({"img_size": (32, 0)}, ["img_size", "0"]),
        ({"img_size": 4}, ["4x4", "smaller than one patch"]),
        ({"img_size": 33}, ["33x33", "8x8", "dynamic_img_size=True", "dynamic_img_pad=True", "(32, 32)", "(40, 40)"]),
        ({"img_size": (32, 32, 32)}, ["img_size", "(height, width)"]),
        ({"img_size": 32.5}, ["img_size", "32.5"]),
        ({"img_size": "32"}, ["img_size", "'32'"]),
        ({"patch_size": 0}, ["patch_size", "0"]),
        ({"patch_size": -8}, ["patch_size", "-8"]),
        ({"in_chans": 0}, ["in_chans", "0"]),
        ({"embed_dim": 0}, ["embed_dim", "0"]),
        ({"depth": 0}, ["depth", "0"]),
        ({"depth": True}, ["depth", "True"]),
        ({"num_heads": 5}, ["num_heads=5", "embed_dim=32", "1, 2, 4, 8, 16, 32"]),
        ({"num_heads": -1}, ["num_heads", "-1"]),
        ({"mlp_ratio": 0}, ["mlp_ratio", "got 0"]),
        ({"num_classes": -1}, ["num_classes", "got -1"]),
        ({"reg_tokens": -1}, ["reg_tokens", "got -1"]),
        ({"global_pool": "mean"}, ["'mean'", "'avg'", "'token'", "'map'"]),
        ({"class_token": False}, ["class token", "class_token=True"]),
        ({"pos_embed": "rope"}, ["'rope'", "'learn'"]),
        ({"weight_init": "he"}, ["'he'", "'jax'", "'moco'"]),
        ({"drop_rate": 1.5}, ["drop_rate", "1.5", "between 0 and 1"]),
        ({"drop_path_rate": -0.1}, ["drop_path_rate", "-0.1"]),
        ({"patch_drop_rate": 1.0}, ["patch_drop_rate", "1.0"]),
        ({"act_layer": "gelu_tan"}, ["act_layer", "'gelu_tan'", "'gelu_tanh'"]),
        ({"norm_layer": "batch"}, ["norm_layer", "'batch'", "'layernorm'"]),
        ({"attn_layer": "diff"}, ["attn_layer", "'diff'", "a class"]),
        ({"mean": (0.5, 0.5, 0.5)}, ["mean", "std", "together"]),
        ({"mean": (0.5,), "std": (0.5,)}, ["3 values"]),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.5, 0.0)}, ["std positive"]),
        ({"representation_size": 0}, ["representation_size", "0"]),
    ],
    ids=str,
)
def test_constructor(options: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        ViT(**{**SMALL, **options})
    assert not [word for word in said if word not in str(error.value)], str(error.value)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("options", "images", "said"),
    [
        ({}, image(1, 4, 32, 32), ["4 channels", "in_chans=3"]),
        ({}, image(1, 32, 32, 3), ["32 channels", "in_chans=3"]),
        ({}, image(3, 32, 32), ["(3, 32, 32)", "(B, 3, H, W)"]),
        ({}, image(1, 3, 48, 32), ["48x32", "32x32", "set_input_size((48, 32))", "dynamic_img_size=True"]),
        ({}, image(1, 3, 33, 32), ["33x32", "8x8", "dynamic_img_pad=True", "set_input_size((32, 32))"]),
        ({"dynamic_img_size": True}, image(1, 3, 36, 32), ["36x32", "dynamic_img_pad=True", "set_input_size"]),
        ({"dynamic_img_size": True}, image(1, 3, 0, 32), ["0x32", "empty"]),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, image(1, 3, 32, 0), ["32x0", "empty"]),
        ({"dynamic_img_pad": True}, image(1, 3, 33, 32), ["33x32", "32x32"]),
        ({}, image(1, 3, 32, 32, dtype=torch.int64), ["torch.int64", "uint8"]),
        ({}, image(1, 3, 32, 32, dtype=torch.uint8), ["uint8", "mean=", "std="]),
        (
            {"mean": (0.5,) * 3, "std": (0.5,) * 3},
            image(1, 32, 32, 4, dtype=torch.uint8),
            ["(1, 32, 32, 4)", "in_chans=3"],
        ),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else str(value)[:40],
)
def test_images(options: dict[str, Any], images: torch.Tensor, said: list[str]) -> None:
    model = ViT(**SMALL, **options)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError) as error:
            call(images)
        assert not [word for word in said if word not in str(error.value)], str(error.value)


def test_methods() -> None:
    model = ViT(**SMALL)
    for call, said in (
        (lambda: model.reset_classifier(-1), "-1"),
        (lambda: model.reset_classifier(5, "mean"), "'mean'"),
        (lambda: model.reset_classifier(5, "map"), "'map'"),
        (
            lambda: ViT(**{**SMALL, "class_token": False, "global_pool": "avg"}).reset_classifier(5, "token"),
            "class token",
        ),
        (lambda: model.forward_intermediates(image(1, 3, 32, 32), 3), "the model has 2"),
        (lambda: model.forward_intermediates(image(1, 3, 32, 32), [2]), "[2] are not in -2..1"),
        (lambda: model.forward_intermediates(image(1, 3, 32, 32), output_fmt="NHWC"), "'NHWC'"),
        (lambda: model.prune_intermediate_layers([7]), "[7]"),
        (lambda: model.set_input_size(33), "33x33"),
        (lambda: model.set_input_size(-1), "-1"),
        (lambda: model.set_input_size(patch_size=5), "5x5"),
        (lambda: model.pool(image(1, 17, 32), "mean"), "'mean'"),
        (lambda: PatchEmbed(32, 8, output_fmt="NWC"), "'NWC'"),
        (lambda: Attention(32, 2, qk_norm=True), "norm_layer"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            call()
    assert (model.num_classes, model.global_pool, len(model.blocks)) == (5, "token", 2)
    assert (model.patch_embed.img_size, model.patch_embed.patch_size) == ((32, 32), (8, 8))
    assert [model(image(count, 3, 32, 32)).shape for count in (0, 1)] == [(0, 5), (1, 5)]


def test_graphed() -> None:
    model, shapes = ViT(**SMALL), [(1, 3, 32, 32)]
    with pytest.raises(ValueError, match="the model is in training; accepted: evaluation"):
        fastvit.graphed(model, shapes)
    with pytest.raises(ValueError, match="the model is on cpu; accepted: a CUDA device"):
        fastvit.graphed(model.eval(), shapes)
    with pytest.raises(ValueError, match=r"no shapes to capture; accepted: \(B, C, H, W\)"):
        fastvit.graphed(model, [])


def test_names() -> None:
    for name, nearest in (
        ("vit_bse_patch16_224", "vit_base_patch16_224"),
        ("ViT-B16", "ViT-B/16"),
        ("ViT-b/16", "ViT-B/16"),
        ("vit_base_patch15_224", "vit_base_patch16_224"),
        ("resnet50", "resnetv2_50x1_bit"),
        ("", "vit_"),
    ):
        with pytest.raises(ValueError, match=re.escape(nearest)) as error:
            create_model(name)
        assert repr(name) in str(error.value)
    with pytest.raises(ValueError, match="checkpoint_path"):
        create_model("ViT-Ti/16", pretrained=True)
    with pytest.raises(ValueError, match="not divisible"):
        create_model("vit_tiny_patch16_225")


def test_state_dicts() -> None:
    """Every key is named with both shapes, and what to do; nothing is resampled."""
    model = ViT(**SMALL)
    larger = ViT(**{**SMALL, "img_size": 64, "num_classes": 9, "patch_size": 16, "depth": 3}).state_dict()
    del larger["norm.weight"]
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(larger)
    text = str(error.value)
    for said in (
        "norm.weight", "blocks.2.norm1.weight", "head.weight", "torch.Size([9, 32])", "torch.Size([5, 32])",
        "num_classes=9", "reset_classifier(5)", "16x16", "8x8", "set_input_size(patch_size=...)",
    ):  # fmt: skip
        assert said in text, said
    with pytest.raises(RuntimeError, match=re.escape("set_input_size(img_size=...)")) as error:
        model.load_state_dict(ViT(**{**SMALL, "img_size": 48}).state_dict(), strict=False)
    assert "37 positions, the model 17" in str(error.value)
    with pytest.raises(RuntimeError, match="another layout"):
        model.load_state_dict({"vit.embeddings.cls_token": torch.zeros(1)})
    assert model(image(1, 3, 32, 32)).shape == (1, 5)


def test_files(tmp_path: Path) -> None:
    model = ViT(**SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(model, tmp_path / "nothing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="not a state_dict"):
        load_checkpoint(model, tmp_path / "list.pth")
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    with pytest.raises(ValueError, match="opt/target/embedding/kernel"):
        model.load_pretrained(tmp_path / "other.npz")
    np.savez(tmp_path / "part.npz", **{"embedding/kernel": np.zeros((8, 8, 3, 32), np.float32)})
    with pytest.raises(ValueError, match="no array 'embedding/bias'"):
        model.load_pretrained(tmp_path / "part.npz")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
