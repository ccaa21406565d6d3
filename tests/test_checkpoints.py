"""Weights of other libraries' models, from their own files and in their own names: the same outputs as theirs."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastvit
from checkpoint_cases import (
    GATED,
    HF_SIZES,
    IMAGES,
    MODELS,
    SIZES,
    huggingfaces,
    named,
    pooled,
    save,
    timms,
    timms_beit,
)
from fastvit.checkpoints import convert, layouts, load_checkpoint, read_checkpoint
from fastvit.checkpoints.files import write
from fastvit.models.families import FAMILIES
from fastvit.models.families.clip import OPENCLIP


@pytest.mark.parametrize("name", MODELS)
def test_the_model_that_weights_are_of_gives_their_outputs(name: str, tmp_path: Path) -> None:
    theirs, run = MODELS[name]()
    ours = fastvit.from_checkpoint(save(theirs, tmp_path), num_heads=2).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), run(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_names_alone_tell_as_much(name: str) -> None:
    """Without a configuration: as a state_dict, below the prefix of a wrapper."""
    theirs, run = MODELS[name]()
    wrapped = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    ours = fastvit.from_checkpoint({"model": wrapped}, num_heads=2).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), run(), atol=2e-5, rtol=1e-4)


def test_a_configuration_tells_what_names_do_not(tmp_path: Path) -> None:
    """The heads, the activation and the norms' eps, none of them what such models have by default."""
    theirs, run = huggingfaces(
        transformers.CLIPVisionConfig, transformers.CLIPVisionModelWithProjection, lambda out: out.image_embeds,
        intermediate_size=128, num_attention_heads=4, hidden_act="gelu", layer_norm_eps=0.1,
    )  # fmt: skip
    ours = fastvit.from_checkpoint(save(theirs, tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), run(), atol=2e-5, rtol=1e-4)
    config = json.loads((tmp_path / "config.json").read_text()) | {"hidden_act": "tanh"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    accepted = "gelu, gelu_pytorch_tanh, gelu_new, gelu_fast, quick_gelu, relu"
    with pytest.raises(ValueError, match=f"hidden_act is 'tanh'; accepted: {accepted}"):
        fastvit.from_checkpoint(tmp_path)


def test_files_of_the_hub_have_other_names_than_models_in_memory() -> None:
    """As transformers before its fifth version had them, and as files there still do."""
    kinds = {
        "huggingface": "vit",
        "dinov2, gated": "dinov2",
        "dinov3, gated": "dinov3",
        "beit": "beit",
        "beit, shared": "beit",
        "deit, distilled": "deit",
    }
    for name, family in kinds.items():
        new, old = (layout for layout in FAMILIES[family].layouts if "huggingface" in layout.name)
        theirs, run = MODELS[name]()
        state, _, unknown = new.to_ours(theirs.state_dict())
        assert not unknown
        written = old.from_ours(state)
        renamed = "layer.0.norm1.weight" if "dinov3" in name else "encoder.layer.0.attention.attention.query.weight"
        assert renamed in {re.sub(r"^(vit|beit|deit)\.", "", key) for key in written}
        assert layouts.recognise(list(written)) is old
        ours = fastvit.from_checkpoint(written, num_heads=2).eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(IMAGES), run(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("whole", [True, False])
def test_openclip(whole: bool) -> None:
    """timm's own conversion of OpenAI's and OpenCLIP's names is the judge; a text tower beside it is left out."""
    clip, run = timms(pre_norm=True, norm_layer=lambda width, **kw: nn.LayerNorm(width, eps=1e-5, **kw))
    with torch.no_grad():
        clip.head.bias.zero_()  # type: ignore[union-attr, operator]
    written = OPENCLIP.from_ours({k: v for k, v in clip.state_dict().items() if k != "head.bias"})
    written = {f"visual.{key}": value for key, value in written.items()}
    back = timm.models.vision_transformer._convert_openai_clip(written, clip)
    for key, value in clip.state_dict().items():
        assert torch.equal(back[key], value), key
    if whole:
        written |= {
            "positional_embedding": torch.ones(77, 8), "token_embedding.weight": torch.ones(9, 8),
            "transformer.resblocks.0.ln_1.weight": torch.ones(8), "logit_scale": torch.ones(()),
        }  # fmt: skip
    ours = fastvit.from_checkpoint(written, num_heads=2).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), run(), atol=2e-5, rtol=1e-4)


def test_dinov2s_own_names() -> None:
    model, run = timms(reg_tokens=3, no_embed_class=True, init_values=0.1, global_pool="token", num_classes=0, **GATED)
    state = model.state_dict()
    positions = torch.cat([torch.randn(1, 1, 64), state.pop("pos_embed")], dim=1)
    state |= {
        "cls_token": state["cls_token"] - positions[:, :1],
        "pos_embed": positions,
        "mask_token": torch.ones(1, 64),
    }
    state["register_tokens"] = state.pop("reg_token")
    for key in list(state):
        if ".mlp." in key:
            state[key.replace("fc1", "w12").replace("fc2", "w3")] = state.pop(key)
    ours = fastvit.from_checkpoint({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, num_heads=2).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), run(), atol=2e-5, rtol=1e-4)


def test_beits_own_file(tmp_path: Path) -> None:
    """Microsoft's, whose index of positions is of no use, at another size: timm's own conversion is the judge."""
    model, run = named("beit_base_patch16_224")
    index = {f"blocks.{i}.attn.relative_position_index": torch.ones(17, 17, dtype=torch.int64) for i in range(2)}
    torch.save({"model": model.state_dict() | index}, tmp_path / "beit.pth")
    for size in ((32, 32), (48, 40), (24, 16)):
        ours = fastvit.from_checkpoint(tmp_path / "beit.pth", num_heads=2, img_size=size).eval()
        assert ours.patch_embed.img_size == size
        theirs = timm.create_model("beit_base_patch16_224", **SIZES | {"img_size": size}).eval()
        given = torch.load(tmp_path / "beit.pth", weights_only=True)
        theirs.load_state_dict(timm.models.beit.checkpoint_filter_fn(given, theirs))
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), atol=2e-5, rtol=1e-4)
    pretrained = {
        "lm_head.weight": torch.ones(3, 64),
        "lm_head.bias": torch.ones(3),
        "mask_token": torch.ones(1, 1, 64),
    }
    shared, run = timms_beit(use_shared_rel_pos_bias=True, num_classes=0, global_pool="token")
    ours = fastvit.from_checkpoint({"model": shared.state_dict() | pretrained}, num_heads=2).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), run(), atol=2e-5, rtol=1e-4)


def test_a_table_of_no_square(tmp_path: Path) -> None:
    """The size comes from a configuration, or from the caller."""
    theirs, _ = timms_beit(use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1, img_size=(32, 24))
    state = theirs.state_dict()
    with pytest.raises(ValueError, match="a table of 38 relative positions, .* no square window: give img_size="):
        fastvit.from_checkpoint(state, num_heads=2)
    save_file(state, tmp_path / "model.safetensors")
    config = {"model_args": {"num_heads": 2, "img_size": [32, 24]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, images = fastvit.from_checkpoint(tmp_path).eval(), torch.randn(2, 3, 32, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=2e-5, rtol=1e-4)
    again = fastvit.create_model("beit_base_patch16_224", **SIZES | {"img_size": (32, 24)}).eval()
    load_checkpoint(again, state)
    with torch.no_grad():
        torch.testing.assert_close(again(images), ours(images), atol=0, rtol=0)
    with pytest.raises(ValueError, match="does not fit the model, which is as it was: a table of 38"):
        load_checkpoint(fastvit.create_model("beit_base_patch16_224", **SIZES), state)
    with pytest.raises(
        RuntimeError, match="the file has 38 relative positions, the model 52. Build the model with the"
    ):
        fastvit.create_model("beit_base_patch16_224", **SIZES).load_state_dict(state)


def test_dinov3s_own_names() -> None:
    """timm's own conversion of them is the judge of what they are."""
    model, run = named("vit_small_plus_patch16_dinov3_qkvb")
    state: dict[str, Tensor] = {"mask_token": torch.ones(1, 64), "rope_embed.periods": torch.ones(8)}
    names = {"reg_token": "storage_tokens", "gamma_": "ls", "fc1_g": "w1", "fc1_x": "w2", "mlp.fc2": "mlp.w3"}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[re.sub(r"(ls\d)$", r"\1.gamma", key)] = value
    for i in range(2):
        q, v = (state.pop(f"blocks.{i}.attn.{one}_bias") for one in "qv")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.full_like(q, 7.0), v])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3 * 64)
    back = timm.models.eva.checkpoint_filter_fn(dict(state), model)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
    ours = fastvit.from_checkpoint({"teacher": state}, num_heads=2, global_pool="avg").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), run(), atol=2e-5, rtol=1e-4)


def test_dinov3s_configuration_tells_its_periods(tmp_path: Path) -> None:
    config = {"intermediate_size": 128, "num_register_tokens": 4, "rope_theta": 20.0, "num_attention_heads": 4}
    theirs, run = huggingfaces(transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel, pooled, **config)
    ours = fastvit.from_checkpoint(save(theirs, tmp_path)).eval()
    assert ours.rope == 20.0
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), run(), atol=2e-5, rtol=1e-4)
    changed = json.loads((tmp_path / "config.json").read_text()) | {"use_gated_mlp": True}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="hidden_act is 'gelu' in a gated MLP; accepted: silu"):
        fastvit.from_checkpoint(tmp_path)


def test_a_dinov3_is_not_loaded_into_a_model_that_turns_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = named("vit_small_patch16_dinov3")
    with pytest.raises(ValueError, match="turned by position; build the model with rope=100.0"):
        fastvit.from_checkpoint(model.state_dict(), num_heads=2, rope=None)
    fastvit.from_checkpoint(model.state_dict(), num_heads=2, rope=50.0)
    assert "rope is 100.0 there and 50.0 in the model" in caplog.text


def test_dinov3s_heads_are_those_of_its_width() -> None:
    """20 for the width that ViT-H has 16 for."""
    theirs = timm.create_model("vit_huge_plus_patch16_dinov3", depth=1)
    assert (
        fastvit.from_checkpoint(theirs.state_dict()).blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads == 20
    )


def test_a_masked_autoencoders_decoder_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model, run = timms(num_classes=0)
    extra = dict.fromkeys(("mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.bias"), torch.ones(3))
    with caplog.at_level(logging.INFO, "fastvit"):
        ours = fastvit.from_checkpoint({"model": model.state_dict() | extra}, num_heads=2).eval()
    assert "decoder_embed.weight" in caplog.text and "left out" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), run(), atol=2e-5, rtol=1e-4)


# --- round trips ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("layout", ["timm", "torchvision", "huggingface", "huggingface-5"])
def test_a_round_trip_changes_nothing(layout: str, suffix: str, tmp_path: Path) -> None:
    model, _ = timms()
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.safetensors"
    convert(model.state_dict(), there, layout)
    convert(there, back, "timm")
    returned = load_file(back)
    assert returned.keys() == model.state_dict().keys()
    assert all(torch.equal(returned[key], value) for key, value in model.state_dict().items())


KINDS = {
    "DINOv3": "vit_small_patch16_dinov3",
    "DINOv3 with biases": "vit_small_patch16_dinov3_qkvb",
    "DINOv3 plus": "vit_small_plus_patch16_dinov3_qkvb",
    "BEiT": "beitv2_large_patch16_224",
    "distilled": "deit_small_distilled_patch16_224",
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv2 with registers": "vit_base_patch14_reg4_dinov2",
    "DINOv2 with registers, gated": "vit_giant_patch14_reg4_dinov2",
}


@pytest.mark.parametrize("layout", ["huggingface", "huggingface-5"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_go_round_too(kind: str, layout: str, tmp_path: Path) -> None:
    """From timm's names to those that a library has for this kind of model, and back to timm's."""
    model, _ = named(KINDS[kind], num_classes=7 if "DINO" not in kind else 0, embed_dim=96)
    convert(model.state_dict(), tmp_path / "same.safetensors", "timm")
    convert(model.state_dict(), tmp_path / "there.safetensors", layout)
    convert(tmp_path / "there.safetensors", tmp_path / "back.safetensors", "timm")
    assert not set(load_file(tmp_path / "there.safetensors")) & set(model.state_dict()) - {"norm.weight", "norm.bias"}
    for file in ("same", "back"):
        returned = load_file(tmp_path / f"{file}.safetensors")
        assert returned.keys() == model.state_dict().keys()
        assert all(torch.equal(returned[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["dinov3", "dinov3, gated", "beit", "beit, shared", "deit, distilled"])
def test_what_hugging_face_has_is_what_it_gets(name: str, tmp_path: Path) -> None:
    """By way of timm's names, in its own of today: all but the mask token, which no classifier has."""
    theirs, _ = MODELS[name]()
    convert(theirs.state_dict(), tmp_path / "timm.safetensors", "timm")
    convert(tmp_path / "timm.safetensors", tmp_path / "back.safetensors", "huggingface-5")
    returned, state = (
        {key.removeprefix("beit."): value for key, value in given.items()}  # which a bare BeitModel has not
        for given in (load_file(tmp_path / "back.safetensors"), theirs.state_dict())
    )
    assert {key for key in state if "mask_token" not in key} == returned.keys()
    assert all(torch.equal(state[key], value) for key, value in returned.items())


@pytest.mark.parametrize("options", [{}, {"global_pool": "map"}], ids=["token", "map"])
def test_a_round_trip_by_npz_changes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    model, run = timms(**options)
    convert(model.state_dict(), tmp_path / "vit.npz", "npz", num_heads=2)
    convert(tmp_path / "vit.npz", tmp_path / "back.safetensors")
    returned = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(returned[key], value) for key, value in model.state_dict().items())
    ours = fastvit.from_checkpoint(tmp_path / "vit.npz").eval()  # it tells the heads
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), run(), atol=2e-5, rtol=1e-4)


def test_what_others_write_others_read(tmp_path: Path) -> None:
    """Converted weights, loaded by the libraries themselves, strictly."""
    model, run = timms(norm_layer=lambda width, **kw: nn.LayerNorm(width, eps=1e-6, **kw), mlp_ratio=2.0)
    convert(model.state_dict(), tmp_path / "tv.pth", "torchvision")
    tv = torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 128, num_classes=7).eval()
    tv.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True))
    convert(model.state_dict(), tmp_path / "hf.safetensors", "huggingface-5")
    config = transformers.ViTConfig(**HF_SIZES, intermediate_size=128, num_labels=7, layer_norm_eps=1e-6)
    hf = transformers.ViTForImageClassification(config).eval()
    hf.load_state_dict(load_file(tmp_path / "hf.safetensors"))
    convert(model.state_dict(), tmp_path / "vit.npz", "npz", num_heads=2)
    again, again_run = timms(mlp_ratio=2.0)
    again.load_pretrained(str(tmp_path / "vit.npz"))  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(tv(IMAGES), run(), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(hf(IMAGES).logits, run(), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(again_run(), run(), atol=2e-5, rtol=1e-4)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastvit.cli import main

    model, _ = timms()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    assert main(["convert", str(tmp_path / "vit.safetensors"), str(tmp_path / "tv.pth"), "--to", "torchvision"]) == 0
    assert "class_token" in torch.load(tmp_path / "tv.pth", weights_only=True)
    assert main(["convert", str(tmp_path / "nothing.pth"), str(tmp_path / "x.pth")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


# --- other sizes, other heads ---------------------------------------------------------------------------------


def test_another_size_is_resampled_as_timm_does(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = timms()
    with caplog.at_level(logging.INFO, "fastvit"):
        ours = fastvit.from_checkpoint(model.state_dict(), num_heads=2, img_size=(48, 40)).eval()
    assert "17 positions resampled to 6x5" in caplog.text
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_input_size(img_size=(48, 40))  # type: ignore[operator]
    images = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), model(images), atol=2e-5, rtol=1e-4)
    patches = fastvit.from_checkpoint(state, num_heads=2, img_size=(24, 20), patch_size=4, in_chans=1)
    assert patches.patch_embed.proj.weight.shape == (64, 1, 4, 4)
    assert patches(torch.randn(1, 1, 24, 20)).shape == (1, 7)


def test_a_head_of_other_classes() -> None:
    model, _ = timms()
    state = model.state_dict()
    assert type(fastvit.from_checkpoint(state, num_heads=2, num_classes=0).head) is nn.Identity
    new = fastvit.from_checkpoint(state, num_heads=2, num_classes=3)
    assert new.head.weight.shape == (3, 64) and torch.equal(new.blocks[1].norm2.bias, state["blocks.1.norm2.bias"])
    own = fastvit.ViT(**SIZES | {"num_classes": 3})
    head = own.head.weight.clone()
    load_checkpoint(own, state)  # auto
    assert torch.equal(own.head.weight, head) and torch.equal(own.pos_embed, state["pos_embed"])
    with pytest.raises(ValueError, match=r"head.weight: the file has \(7, 64\), the model \(3, 64\)"):
        load_checkpoint(own, state, head="keep")
    same = fastvit.ViT(**SIZES)
    head = same.head.weight.clone()
    load_checkpoint(same, state, head="drop")
    assert torch.equal(same.head.weight, head)
    with pytest.raises(ValueError, match="head='best'; accepted: 'auto', 'keep', 'drop'"):
        load_checkpoint(same, state, head="best")


def test_both_heads_of_other_classes() -> None:
    model, _ = named("deit_tiny_distilled_patch16_224")
    state = model.state_dict()
    new = fastvit.from_checkpoint(state, num_heads=2, num_classes=3)
    assert new.head.weight.shape == new.head_dist.weight.shape == (3, 64)
    assert torch.equal(new.dist_token, state["dist_token"])
    with pytest.raises(ValueError, match=r"head_dist.weight: the file has \(7, 64\), the model \(3, 64\)"):
        load_checkpoint(new, state, head="keep")
    with pytest.raises(RuntimeError, match="head_dist.weight: the file has 7 classes, the model 3. Build the model"):
        new.load_state_dict(state)


def test_a_state_dict_stays_its_models_own() -> None:
    model, run = timms()
    before = run().clone()
    for source in (model.state_dict(), read_checkpoint(model.state_dict())):
        for _ in range(2):
            ours = fastvit.from_checkpoint(source, num_heads=2).eval()
            with torch.no_grad():
                torch.testing.assert_close(ours(IMAGES), before, atol=2e-5, rtol=1e-4)
                for parameter in ours.parameters():
                    parameter.zero_()
        assert torch.equal(run(), before)


def test_heads_are_those_of_the_width_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    for width, heads, why in ((192, 3, "as models of that width have"), (128, 2, "64 features each")):
        state = fastvit.ViT(**SIZES | {"embed_dim": width, "num_heads": 1}).state_dict()
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastvit"):
            assert fastvit.from_checkpoint(state).blocks[0].attn.num_heads == heads
        assert f"{heads} attention heads, {why}" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"use_rel_pos_bias": True},
        {"use_shared_rel_pos_bias": True},
        {"pos_embed": "relative"},
        {"qk_norm": True},
    ],
)
def test_heads_that_a_tensor_tells_are_not_guessed(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = fastvit.ViT(**SIZES | {"num_heads": 4} | options).eval()
    with caplog.at_level(logging.INFO, "fastvit"):
        ours = fastvit.from_checkpoint(model.state_dict()).eval()
    assert "attention heads" not in caplog.text
    assert torch.equal(ours(IMAGES), model(IMAGES))
    if "use_rel_pos_bias" in options:
        convert(model.state_dict(), tmp_path / "beit", "huggingface")
        assert json.loads((tmp_path / "beit" / "config.json").read_text())["num_attention_heads"] == 4


def test_dtype_and_folders_in_parts(tmp_path: Path) -> None:
    model, run = timms()
    state = model.state_dict()
    names = sorted(state)
    weight_map = {}
    for part, some in enumerate((names[:9], names[9:])):
        save_file({name: state[name] for name in some}, tmp_path / f"model-{part}.safetensors")
        weight_map |= dict.fromkeys(some, f"model-{part}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"num_heads": 2}, "global_pool": "token"}))
    ours = fastvit.from_checkpoint(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), run(), atol=2e-5, rtol=1e-4)
    half = fastvit.from_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and all(p.requires_grad for p in half.parameters())


def peak(file: Path) -> float:
    """MiB that a process of its own held at most, over what it held before it loaded a model and read its weights."""
    code = """
import re, sys, fastvit
def held(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before = held()  # not ru_maxrss, which begins with what the process had that started this one
model = fastvit.from_checkpoint(sys.argv[1])
sum(float(p.sum()) for p in model.parameters())
print(held() - before)
"""
    return float(subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True).stdout)


def test_a_file_is_not_in_memory_twice(tmp_path: Path) -> None:
    """A large file costs its size, within a tenth."""
    sizes = {"embed_dim": 1280, "depth": 4, "num_heads": 16, "img_size": 32, "patch_size": 16, "num_classes": 10}
    model = fastvit.ViT(**sizes)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    convert(model.state_dict(), tmp_path / "hf.safetensors", "huggingface-5")
    mib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    for file, most in (("vit.safetensors", 1.1), ("hf.safetensors", 1.5)):  # q, k and v are joined into new memory
        # 40 MiB: what torch's own threads and libraries take
        assert 0.9 * mib <= peak(tmp_path / file) <= most * mib + 40, file


@pytest.mark.slow
def test_vit_h_takes_its_size_and_a_tenth(tmp_path: Path) -> None:
    """ViT-H/14 in float32, 2.4 GiB."""
    shapes = fastvit.create_model("vit_huge_patch14_224", device="meta").state_dict()
    file = tmp_path / "vit_h.safetensors"
    save_file({name: torch.rand(value.shape) for name, value in shapes.items()}, file)
    assert file.stat().st_size > 2.3 * 2**30
    assert 0.9 <= peak(file) * 2**20 / file.stat().st_size <= 1.1


# --- files that are none --------------------------------------------------------------------------------------


def _without(state: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in names}


def test_wrong_files_are_named_and_nothing_is_half_loaded(tmp_path: Path) -> None:
    state = timms()[0].state_dict()
    model = fastvit.ViT(**SIZES)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hf = MODELS["huggingface"]()[0].state_dict()
    cases: dict[str, tuple[Any, str]] = {
        "missing": (_without(state, "blocks.1.mlp.fc2.bias", "norm.bias"), "has no blocks.1.mlp.fc2.bias, norm.bias"),
        "unexpected": (state | {"blocks.0.ls1.gamma": torch.ones(64)}, "the model has no blocks.0.ls1.gamma"),
        "foreign": (state | {"blocks.0.attn.rope": torch.ones(3)}, "has blocks.0.attn.rope, which no ViT has"),
        "misshapen": (state | {"norm.bias": torch.ones(65)}, r"norm.bias: the file has \(65,\), the model \(64,\)"),
        "no key of three": (_without(hf, "vit.layers.1.attention.k_proj.weight"), "goes with .*k_proj.weight, which"),
        "another network": (timm.create_model("resnet18").state_dict(), "no layout that is known; accepted: clip-hug"),
        "quantised": (state | {"head.weight": state["head.weight"].char()}, "weights of integers.*head.weight"),
        "BEiT": (state | {"blocks.0.attn.relative_position_bias_table": torch.ones(3, 2)}, "has no blocks.0.attn.rel"),
        "EVA": (state | {"blocks.0.gamma_1": torch.ones(64)}, "gamma_1 and pos_embed, as EVA and the Perception Enc"),
        "distilled": (state | {"dist_token": torch.ones(1, 1, 64)}, "the model has no dist_token"),
        "no tensors": ({"model": {"epoch": 3}}, "has no tensors; its keys are"),
    }  # fmt: skip
    for name, (given, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            load_checkpoint(model, given)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name
    with pytest.raises(ValueError, match=r"no complete Vision Transformer: it has blocks \[0, 1, 999999999\]"):
        fastvit.from_checkpoint(state | {"blocks.999999999.norm1.bias": torch.ones(64)})
    with pytest.raises(ValueError, match="11 positions, 1 of them for prefix tokens, on no square: give img_size="):
        fastvit.from_checkpoint(state | {"pos_embed": torch.ones(1, 11, 64)})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_files_that_are_cut_short(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"vit{suffix}"
    convert(timms()[0].state_dict(), path, "npz" if suffix == ".npz" else "timm", num_heads=2)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_checkpoint(path)


def test_hostile_files(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    np.savez(tmp_path / "evil.npz", **{"embedding/kernel": np.array([Evil()], dtype=object)})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    for path, message in (
        (tmp_path / "evil.pth", "no file of tensors alone"),
        (tmp_path / "evil.npz", "can't be read"),
        (tmp_path / "folder", "outside of its folder"),
    ):
        with pytest.raises(ValueError, match=message):
            fastvit.from_checkpoint(path)
    assert not ran.exists()
    with pytest.raises(ValueError, match="has no weights; accepted: model.safetensors"):
        fastvit.from_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        fastvit.from_checkpoint(tmp_path / "nothing.pth")


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    state = timms(reg_tokens=1)[0].state_dict()
    for layout, path in (("torchvision", "tv.pth"), ("npz", "vit.npz")):
        with pytest.raises(ValueError, match="has no names for reg_token"):
            convert(state, tmp_path / path, layout, num_heads=2)
    with pytest.raises(ValueError, match="layout 'jax' can't be written; accepted: huggingface, hugg"):
        convert(state, tmp_path / "x.pth", "jax")
    with pytest.raises(ValueError, match="go together"):
        convert(state, tmp_path / "x.npz", "timm")
    with pytest.raises(ValueError, match="give num_heads="):
        convert(state, tmp_path / "x.npz", "npz")
    with pytest.raises((TypeError, AttributeError)):
        write(tmp_path / "broken.safetensors", {"a": "no tensor"})
    assert list(tmp_path.iterdir()) == []
