"""Folders that ``fastvit convert --to huggingface`` writes, loaded by transformers' own ``from_pretrained``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import fastvit
from checkpoint_cases import GATED, IMAGES, MODELS, named, save, timms, timms_beit
from fastvit.checkpoints import convert
from fastvit.cli import main

FOLDERS: dict[str, tuple[Callable[[], tuple[nn.Module, Callable[[], Tensor]]], dict[str, Any]]] = {
    "ViT": (timms, {}),
    "ViT without biases": (lambda: timms(qkv_bias=False), {}),
    "ViT for oblong images": (lambda: timms(img_size=(32, 24)), {"img_size": [32, 24]}),
    "DeiT": (lambda: named("deit_tiny_distilled_patch16_224"), {}),
    "BEiT": (lambda: named("beit_base_patch16_224"), {}),
    "BEiT, shared table": (
        lambda: timms_beit(use_shared_rel_pos_bias=True, init_values=0.1, qkv_bias=True, global_pool="token"),
        {},
    ),
    "DINOv2": (lambda: timms(init_values=0.1, num_classes=0), {}),
    "DINOv2, gated": (lambda: timms(init_values=0.1, num_classes=0, **GATED | {"mlp_ratio": 2.75 * 2}), {}),
    "DINOv2, registers": (lambda: timms(init_values=0.1, num_classes=0, reg_tokens=3, no_embed_class=True), {}),
    "DINOv3": (lambda: named("vit_small_patch16_dinov3", num_classes=0, global_pool="token"), {}),
    "DINOv3, gated": (lambda: named("vit_small_plus_patch16_dinov3_qkvb", num_classes=0, global_pool="token"), {}),
    "CLIP": (lambda: timms(pre_norm=True, num_classes=0, act_layer="quick_gelu"), {"act_layer": "quick_gelu"}),
    "SigLIP": (
        lambda: timms(class_token=False, global_pool="map", num_classes=0, act_layer="gelu_tanh"),
        {"act_layer": "gelu_tanh"},
    ),
}


@pytest.mark.parametrize("layout", ["huggingface", "huggingface-5"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_is_what_transformers_loads(kind: str, layout: str, tmp_path: Path) -> None:
    """No tensor is missing, left over or misshapen there, and its outputs are timm's; so are ours from the folder."""
    make, told = FOLDERS[kind]
    model, _ = make()
    (tmp_path / "timm").mkdir()
    save_file(model.state_dict(), tmp_path / "timm" / "model.safetensors")
    (tmp_path / "timm" / "config.json").write_text(json.dumps({"model_args": {"num_heads": 2, **told}}))
    folder = tmp_path / "folder"
    convert(tmp_path / "timm", folder, layout)
    config = json.loads((folder / "config.json").read_text())
    kind_of_model, images = config["architectures"][0], torch.randn(2, 3, *told.get("img_size", (32, 32)))
    auto = "AutoModelForImageClassification" if "Classification" in kind_of_model else "AutoModel"
    theirs, found = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == kind_of_model
    assert not any(found[wrong] for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = fastvit.from_checkpoint(folder).eval()
    with torch.no_grad():
        expected = model(images)
        given = theirs.eval()(pixel_values=images)
        torch.testing.assert_close(given.get("logits", given.get("pooler_output")), expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours(images), expected, atol=2e-5, rtol=1e-4)
    before, after = fastvit.from_checkpoint(tmp_path / "timm").state_dict(), ours.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_folder_of_clip_with_its_projection(tmp_path: Path) -> None:
    """From OpenAI's names, which have the projection too, and from Hugging Face's own folder."""
    theirs, run = MODELS["clip"]()
    convert(save(theirs, tmp_path / "theirs"), tmp_path / "folder", "huggingface")
    again, found = transformers.CLIPVisionModelWithProjection.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not any(found[wrong] for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again.eval()(pixel_values=IMAGES).image_embeds, run())
    written, own = (json.loads((tmp_path / one / "config.json").read_text()) for one in ("folder", "theirs"))
    assert written == {key: own[key] for key in written}


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name.startswith(("huggingface", "dino", "beit", "siglip", "deit, distilled"))]
)
def test_a_folder_has_transformers_own_configuration(name: str, tmp_path: Path) -> None:
    """What is written of its model is what it writes itself, in every key of either that says what is computed."""
    convert(save(MODELS[name]()[0], tmp_path / "theirs"), tmp_path / "ours", "huggingface-5")
    ours, theirs = (json.loads((tmp_path / of / "config.json").read_text()) for of in ("ours", "theirs"))
    assert ours == {key: theirs[key] for key in ours}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_bias": False}, "has no attn.proj.bias, mlp.fc1.bias, mlp.fc2.bias, which transformers' ViTModel has"),
        ({"final_norm": False}, "has no norm.weight, norm.bias, which transformers' ViTModel has"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "has no cls_token, which transformers'"),
        ({"no_embed_class": True}, "has 16 positions; transformers' ViTModel has one for the class token"),
        ({"init_values": 0.1, "reg_tokens": 3, "num_classes": 0}, "20 positions, some of them for registers"),
        (GATED, "has gated MLPs, which transformers' ViTModel has not"),
        ({"init_values": 0.1}, "'huggingface' has no names for blocks.0.ls1.gamma"),
        ({"pre_norm": True}, "'huggingface' has no names for norm_pre.bias"),
        ({"init_values": 0.1, "num_classes": 0, "mlp_ratio": 2.5}, "160 hidden features, which no mlp_ratio of"),
    ],
)
def test_what_transformers_has_not_is_named_and_nothing_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    state = timms(**options)[0].state_dict()
    with pytest.raises(ValueError, match=message):
        convert(state, tmp_path / "folder", "huggingface", num_heads=2)
    assert not list(tmp_path.iterdir())


def test_a_folder_needs_what_shapes_do_not_tell(tmp_path: Path) -> None:
    state = timms()[0].state_dict()
    with pytest.raises(ValueError, match="its attention heads, which a config.json needs: give num_heads="):
        convert(state, tmp_path / "folder", "huggingface")
    for said, message in (
        ({"global_pool": "avg"}, "global_pool is 'avg'; accepted with these weights in transformers' ViTForImageClass"),
        ({"act_layer": "tanh"}, "act_layer is 'tanh'; accepted: silu, relu_squared, relu, quick_gelu, gelu_tanh, gelu"),
    ):
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"model_args": {"num_heads": 2, **said}}))
        with pytest.raises(ValueError, match=message):
            convert(tmp_path, tmp_path / "folder", "huggingface")
    clip = timms(pre_norm=True, num_classes=0, img_size=(32, 24))[0].state_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"num_heads": 2, "img_size": [32, 24]}}))
    save_file(clip, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is for images of 32x24; transformers' clip_vision_model takes square ones"):
        convert(tmp_path, tmp_path / "folder", "huggingface")
    assert not (tmp_path / "folder").exists()


def test_a_model_without_a_classifier_has_no_pooler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, whose folder then goes into ViTModel without transformers' own pooler."""
    model, _ = timms(num_classes=0, global_pool="")
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    command = ["convert", str(tmp_path / "vit.safetensors"), str(tmp_path / "folder"), "--to", "huggingface"]
    assert main(command) == 2
    assert "give num_heads=" in capsys.readouterr().err
    assert main([*command, "--num-heads", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["config.json", "model.safetensors"]
    theirs, found = transformers.AutoModel.from_pretrained(
        tmp_path / "folder", add_pooling_layer=False, output_loading_info=True
    )
    assert type(theirs).__name__ == "ViTModel"
    assert not any(found[wrong] for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.eval()(pixel_values=IMAGES).last_hidden_state, model(IMAGES), atol=2e-5, rtol=1e-4
        )
