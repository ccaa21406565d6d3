"""Hybrids are timm's: keys, logits, gradients; and Google's files of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer_hybrid import HybridEmbed as TimmHybridEmbed
from timm.models.vision_transformer_hybrid import _resnetv2
from torch import nn

import fastvit
from checkpoint_cases import randomise as shuffled
from fastvit.checkpoints import convert, load_checkpoint
from fastvit.integrations.timm_registry import register
from fastvit.models.families.hybrid import FAMILY, HYBRIDS
from fastvit.models.hybrid import HybridEmbed
from parity import assert_parity, assert_same, randomise

PAPERS = FAMILY.aliases
SIZES: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}


def timms(layers: tuple[int, ...], in_chans: int = 3, **options: Any) -> nn.Module:
    """timm's hybrid with another backbone than its names have."""
    embed = partial(TimmHybridEmbed, backbone=_resnetv2(layers, in_chans=in_chans))
    sizes = {"img_size": 64, "patch_size": 1, **SIZES, **options}
    return timm.models.VisionTransformer(embed_layer=embed, in_chans=in_chans, **sizes)


def ours(layers: tuple[int, ...], **options: Any) -> fastvit.ViT:
    embed = partial(HybridEmbed, layers=layers)
    return fastvit.ViT(**{"img_size": 64, "patch_size": 1, **SIZES, **options, "embed_layer": embed})


# -- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_r_s16_p8_224", "vit_tiny_r_s16_p8_384", "vit_small_r26_s32_224", "vit_small_r26_s32_384",
        "vit_base_r26_s32_224", "vit_base_r50_s16_224", "vit_base_r50_s16_384", "vit_large_r50_s32_224",
        "vit_large_r50_s32_384",
    ],
)  # fmt: skip
def test_names_have_timms_keys_and_shapes(name: str) -> None:
    theirs = timm.create_model(name, depth=1, num_classes=7)
    with torch.device("meta"):
        model = fastvit.create_model(name, depth=1, num_classes=7)
    shapes = [[(key, value.shape) for key, value in m.state_dict().items()] for m in (model, theirs)]
    assert shapes[0] == shapes[1]
    embed = theirs.patch_embed
    assert (model.patch_embed.img_size, model.patch_embed.grid_size) == (embed.img_size, embed.grid_size)
    assert (model.patch_embed.feat_ratio(), model.feature_info) == (embed.feat_ratio(), theirs.feature_info)
    assert name in fastvit.list_models("vit_*_r*")


@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("size", ["B", "L"])
def test_the_papers_hybrids(size: str, stride: int) -> None:
    """Table 6: sixteen blocks of a ResNet-50 in any case, the last three in stage 3 for a reduction of 16."""
    paper = f"R50+ViT-{size}/{stride}"
    with torch.device("meta"):
        model = fastvit.create_model(paper, depth=1)
        other = fastvit.create_model(f"{paper}-384", depth=1)
        named = fastvit.create_model(f"{PAPERS[paper]}_384", depth=1)
    layers = model.patch_embed.backbone.layers
    assert sum(layers) == 16 and len(layers) == {16: 3, 32: 4}[stride]
    assert model.patch_embed.grid_size == (224 // stride,) * 2
    assert other.patch_embed.grid_size == (384 // stride,) * 2 and str(named) == str(other)
    assert model.embed_dim == {"B": 768, "L": 1024}[size]


def test_unknown_names() -> None:
    assert len(PAPERS) == len(HYBRIDS) == 7
    with pytest.raises(ValueError, match=r"unknown model 'R50\+ViT-H/16'; the nearest names are .*R50\+ViT-[BL]/16"):
        fastvit.create_model("R50+ViT-H/16")
    with pytest.raises(ValueError, match="unknown model 'vit_base_r50_s8_224'; .*vit_base_r50_s16_224"):
        fastvit.create_model("vit_base_r50_s8_224")


# -- numbers -----------------------------------------------------------------------------------------------------


def test_a_named_model_is_timms() -> None:
    options = {"img_size": 64, "depth": 1, "num_classes": 5}
    assert_parity(
        fastvit.create_model("R26+ViT-S/32", **options), timm.create_model("vit_small_r26_s32_224", **options), (64, 64)
    )


CASES: dict[str, dict[str, Any]] = {
    "three stages": {"layers": (1, 1, 2)},
    "a stem alone": {"layers": (), "patch_size": 8},
    "patches of 2": {"layers": (1, 1), "patch_size": 2},
    "odd sizes": {"layers": (1, 2), "img_size": (50, 33)},  # where the padding is not the same on both sides
    "one channel": {"layers": (1,), "in_chans": 1, "img_size": 16},
    "average": {"layers": (1,), "img_size": 16, "global_pool": "avg", "class_token": False, "pre_norm": True},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_timms(case: str) -> None:
    options = CASES[case]
    model = ours(**options)
    assert_parity(model, timms(**options), model.patch_embed.img_size)


@torch.no_grad()
def test_any_size_is_timms() -> None:
    """With dynamic_img_size, and after set_input_size, to another patch too; padded to whole patches."""
    options: dict[str, Any] = {"layers": (1, 1), "patch_size": 2, "dynamic_img_size": True, "dynamic_img_pad": True}
    theirs = randomise(timms(**options)).double()
    model = ours(**options).double()
    model.load_state_dict(theirs.state_dict())
    for size in ((64, 64), (48, 32), (72, 40)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-6, atol=1e-8)
    for fixed in (theirs, model):
        fixed.set_input_size((48, 48), 3)
    x = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    assert model.patch_embed.grid_size == (2, 2)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)  # timm resamples patches in float32


def test_weights_start_as_timms() -> None:
    """Each block of the backbone starts as its shortcut, and convolutions with He's deviation."""
    torch.manual_seed(0)
    models = [ours((1, 1, 1)), timms((1, 1, 1))]
    starts = [dict(model.patch_embed.named_parameters()) for model in models]
    for name, start in starts[0].items():
        assert start.std(correction=0).item() == pytest.approx(starts[1][name].std(correction=0).item(), rel=0.1), name
    assert not starts[0]["backbone.stages.0.blocks.0.norm3.weight"].any()


def test_checkpointing_reaches_the_backbone() -> None:
    """Gradients stay what they are; only the inputs of its blocks are kept."""
    model, x, runs, kept = randomise(ours((2, 1))).double(), torch.randn(1, 3, 64, 64).double(), [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.numel()), t)[1], lambda t: t
        ):
            out = model.patch_embed(x)
        runs.append([out, *torch.autograd.grad(out.square().sum(), list(model.patch_embed.parameters()))])
        kept.append(sum(saved))
    assert_same(*runs)
    assert kept[1] < 0.5 * kept[0]


def test_sizes_and_images_that_are_refused() -> None:
    with pytest.raises(ValueError, match="img_size 64x48 has a feature map of 8x6, which patches of 4x4 don't tile"):
        ours((1, 1), patch_size=4, img_size=(64, 48))
    model = ours((1, 1), patch_size=4, dynamic_img_size=True)
    with pytest.raises(ValueError, match="the image 32x40 has a feature map of 4x5, .* multiples of 32x32 pixels"):
        model(torch.randn(1, 3, 32, 40))
    with pytest.raises(ValueError, match="the image is 32x32 and the model takes 64x64"):
        ours((1, 1))(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="img_size 40x40"):
        model.set_input_size(40)
    assert model.patch_embed.img_size == (64, 64) and model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    with pytest.raises(
        ValueError, match="packed images can't pass patch_embed: HybridEmbed is no fastvit.layers.Patch"
    ):
        model([torch.randn(3, 32, 32)])
    for layers in ((1, 1, 1, 1, 1), 3, (1, 0)):
        with pytest.raises(ValueError, match="layers"):
            HybridEmbed(layers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown output_fmt 'NCHW'; accepted: NLC, NHWC"):
        HybridEmbed((1,), output_fmt="NCHW")


def test_uint8_images() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    model = ours((1,), img_size=16, mean=mean, std=std).eval()
    images = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    x = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(model(images), model(x), rtol=1e-5, atol=1e-5)


# -- files -------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "stages": {"layers": (2, 1, 1)},
    "a stem alone": {"layers": (), "patch_size": 4, "img_size": 32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_checkpoint_builds_timms(kind: str, tmp_path: Path) -> None:
    theirs = shuffled(timms(**KINDS[kind]))
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "hybrid.pth")
    model = fastvit.from_checkpoint(tmp_path / "hybrid.pth", num_heads=2).eval()
    embed = theirs.patch_embed
    assert model.patch_embed.backbone.layers == KINDS[kind]["layers"]
    assert (model.patch_embed.img_size, model.patch_embed.patch_size) == (embed.img_size, embed.patch_size)
    x = torch.randn(2, 3, *embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_googles_files_are_read_as_timm_reads_them(kind: str, tmp_path: Path) -> None:
    """timm's own loader is the judge, of the same size and of others."""
    model = shuffled(ours(**KINDS[kind]))
    convert(model.state_dict(), tmp_path / "hybrid.npz", "npz", num_heads=2)
    with np.load(tmp_path / "hybrid.npz") as file:
        assert file["conv_root/kernel"].shape == (7, 7, 3, 64) and file["gn_root/scale"].shape == (1, 1, 1, 64)
        assert ("block3/unit1/gn_proj/bias" in file) == ("block1/unit2/conv3/kernel" in file) == (kind == "stages")
    for options in ({}, {"img_size": 96, "num_classes": 3}, {"in_chans": 1}):
        theirs = timms(**{**KINDS[kind], **options}).eval()
        theirs.load_pretrained(str(tmp_path / "hybrid.npz"))
        again = fastvit.from_checkpoint(tmp_path / "hybrid.npz", **options).eval()
        if "num_classes" in options:
            again.head.load_state_dict(theirs.head.state_dict())
        x = torch.randn(2, again.in_chans, *again.patch_embed.img_size)
        with torch.no_grad():
            torch.testing.assert_close(again(x), theirs(x), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_changes_nothing(kind: str, suffix: str, tmp_path: Path) -> None:
    state, there = shuffled(ours(**KINDS[kind])).state_dict(), tmp_path / f"there{suffix}"
    convert(state, there, "npz" if suffix == ".npz" else "timm", num_heads=2)
    convert(there, tmp_path / "back.safetensors", "timm")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    state = ours((2, 1)).state_dict()
    for source, message in (
        ({k: v for k, v in state.items() if "blocks.1.conv2" not in k}, "the file has no .*0.blocks.1.conv2.weight"),
        (ours((2, 2)).state_dict(), "the model has no patch_embed.backbone.stages.1.blocks.1.conv1.weight"),
        (fastvit.ViT(img_size=8, patch_size=1, **SIZES).state_dict(), "the file has no patch_embed.backbone"),
        (state | {"patch_embed.backbone.stages.0.blocks.0.bn1.weight": torch.ones(3)}, "bn1.weight, which no ViT has"),
        (state | {"patch_embed.backbone.bn1.weight": torch.ones(3)}, "the features of another network than BiT's"),
    ):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(ours((2, 1)), source)
    with pytest.raises(ValueError, match="has no names for patch_embed.backbone"):
        convert(state, tmp_path / "tv.pth", "torchvision")
    convert(state, tmp_path / "hybrid.npz", "npz", num_heads=2)
    with np.load(tmp_path / "hybrid.npz") as file:
        np.savez(tmp_path / "cut.npz", **{name: file[name] for name in file if name != "block2/unit1/gn2/bias"})
    with pytest.raises(ValueError, match="has no array 'block2/unit1/gn2/bias'"):
        fastvit.from_checkpoint(tmp_path / "cut.npz")
    with pytest.raises(RuntimeError, match="Build the model"):
        ours((2, 1), num_classes=3).load_state_dict(state)


def test_a_configuration_tells_the_images_size(tmp_path: Path) -> None:
    """No square: the grid is of as many pixels as the backbone and the patch make one token of."""
    theirs = shuffled(timms((1, 1), img_size=(64, 32)))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 2, "img_size": [64, 32]}}')
    same, other = (fastvit.from_checkpoint(tmp_path, **options).eval() for options in ({}, {"img_size": 48}))
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 32)
        torch.testing.assert_close(same(x), theirs(x), rtol=1e-4, atol=2e-5)
        theirs.set_input_size(48)
        x = torch.randn(2, 3, 48, 48)
        torch.testing.assert_close(other(x), theirs(x), rtol=1e-4, atol=2e-5)


def test_timms_registry_has_them_too() -> None:
    names = register()
    assert not [name for name in names if "axial" in name or "resnet" in name]
    for name in ("vit_small_r26_s32_224", "vit_tiny_r_s16_p8_384"):
        with torch.device("meta"):
            model = timm.create_model(f"{name}_fastvit", depth=1)
        cfgs = model.default_cfg, timm.get_pretrained_cfg(name).to_dict()
        for key in ("first_conv", "input_size", "mean", "std", "classifier"):
            assert cfgs[0][key] == cfgs[1][key], key
        assert isinstance(model.get_submodule(model.default_cfg["first_conv"]), nn.Conv2d)
