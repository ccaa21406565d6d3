"""fastvit.resnet is timm's ``resnetv2_*_bit``: keys, logits, gradients; and what it adds in errors and layouts."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_parity import assert_parity, randomise
from timm.layers import StdConv2d
from timm.models.resnetv2 import ResNetV2 as TimmResNetV2
from torch import Tensor, nn

import fastvit
from fastvit.models.families.bit import SIZES as RESNETS
from fastvit.models.resnet import standardised
from fastvit.resnet import ResNetV2
from numerics import assert_model_as_right_as_eager

R50 = (3, 4, 6, 3)
TINY: dict[str, Any] = {"layers": (1, 2, 1, 1), "num_classes": 5}


def timms(layers: tuple[int, ...], **options: Any) -> TimmResNetV2:
    """timm's class as its ``resnetv2_*_bit`` build it, for the names that timm lacks and for other options."""
    return TimmResNetV2(layers, stem_type="fixed", conv_layer=partial(StdConv2d, eps=1e-8), **options)


def pair(**options: Any) -> tuple[ResNetV2, TimmResNetV2]:
    """Our model and timm's with the same weights, every one of them random."""
    theirs = randomise(timms(**{**TINY, **options}))
    ours = ResNetV2(**{**TINY, **options})
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The logits and every parameter's gradient."""
    out = model(images)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), list(model.parameters()))]


# -- names -------------------------------------------------------------------------------------------------------

# Millions of parameters with 1000 classes, as timm publishes them (results/results-imagenet.csv).
PUBLISHED = {"50x1": 25.55, "50x3": 217.32, "101x1": 44.54, "101x3": 387.93, "152x2": 236.34, "152x4": 936.53}
# Those that the ViT paper adds: depths by He et al. (2016), widths by Kolesnikov et al. (2020).
PAPERS = {"50x2": (R50, 2), "152x1": ((3, 8, 36, 3), 1), "200x3": ((3, 24, 36, 3), 3)}


@pytest.mark.parametrize("size", RESNETS)
def test_keys_and_shapes(size: str) -> None:
    name = f"resnetv2_{size}_bit"
    with torch.device("meta"):
        ours = fastvit.create_model(name)
        if size in PAPERS:
            assert not timm.is_model(name)
            layers, width = PAPERS[size]
            theirs = timms(layers, width_factor=width)
        else:
            theirs = timm.create_model(name)
            millions = sum(p.numel() for p in ours.parameters()) / 1e6
            assert millions == pytest.approx(PUBLISHED[size], abs=0.006)
        assert str(fastvit.create_model(f"R{size}")) == str(ours)
    shapes = [[(key, value.shape) for key, value in m.state_dict().items()] for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert (ours.num_classes, ours.num_features) == (theirs.num_classes, theirs.num_features)


def test_names() -> None:
    assert set(PUBLISHED) | set(PAPERS) == set(RESNETS)
    assert fastvit.list_models("resnetv2") == [f"resnetv2_{size}_bit" for size in RESNETS]
    others = set(fastvit.list_models()) - set(fastvit.list_models("resnetv2"))
    assert others and all(name.startswith(("axial", "beit", "deit", "vit_")) for name in others)
    assert fastvit.resnet.ResNetV2 is ResNetV2
    with torch.device("meta"):
        assert fastvit.create_model("R101x1", num_classes=3, in_chans=1).head.fc.weight.shape == (3, 2048, 1, 1)
    with pytest.raises(ValueError, match=r"unknown model 'R50x5'; the nearest names are .*R50x[13]"):
        fastvit.create_model("R50x5")
    with pytest.raises(ValueError, match=r"unknown model 'resnetv2_101x2_bit'; .*resnetv2_101x1_bit"):
        fastvit.create_model("resnetv2_101x2_bit")


# -- numbers -----------------------------------------------------------------------------------------------------


def test_r50x1_is_timms() -> None:
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=7)
    ours = fastvit.create_model("R50x1", num_classes=7)
    assert_parity(ours, theirs, (64, 64))
    theirs.load_state_dict(ours.state_dict())


OPTIONS: dict[str, dict[str, Any]] = {
    "one channel": {"in_chans": 1},
    "drop path": {"drop_path_rate": 0.5},
    "dropout": {"drop_rate": 0.3},
    "pool max": {"global_pool": "max"},
    "pool avgmax": {"global_pool": "avgmax"},
    "no pool": {"global_pool": ""},
    "no classes": {"num_classes": 0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_timms(name: str) -> None:
    options = {**TINY, **OPTIONS[name]}
    assert_parity(ResNetV2(**options), timms(**options), (50, 33))


@torch.no_grad()
def test_width_is_timms() -> None:
    ours, theirs = pair(layers=(1, 1, 1, 1), width_factor=2)
    images = torch.randn(1, 3, 32, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-4)


def test_bfloat16_is_as_right_as_timms() -> None:
    ours, theirs = pair()
    images = torch.randn(2, 3, 64, 64).bfloat16()
    runs = [ours.bfloat16(), theirs.bfloat16(), copy.deepcopy(theirs).double()]
    assert_model_as_right_as_eager(*(gradients(m, images.to(next(m.parameters()).dtype)) for m in runs))


@pytest.mark.parametrize("pixels", [32, 64])  # 32 leave one position in the last stage, where strides are ambiguous
def test_channels_last(pixels: int) -> None:
    model, _ = pair()
    images = torch.randn(2, 3, pixels, pixels, dtype=torch.float64)
    expected = gradients(model.double(), images)
    model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    conv = model.stages[1].blocks[0].conv2
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert standardised(conv.weight, conv.eps).stride() == conv.weight.stride()
    assert model.forward_features(images).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradients(model, images), expected, rtol=1e-7, atol=1e-9)


# -- the model in use ----------------------------------------------------------------------------------------------


def test_head() -> None:
    model, theirs = pair()
    images = torch.randn(2, 3, 64, 96)
    features = model.forward_features(images)
    assert features.shape == (2, 2048, 2, 3)
    for pre_logits in (False, True):
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=pre_logits)
        torch.testing.assert_close(model.forward_head(features, pre_logits=pre_logits), expected, rtol=0, atol=1e-4)
    model.eval().reset_classifier(4, "max")
    assert model.get_classifier() is model.head.fc
    assert not model.head.training
    assert model(images).abs().max() == 0
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(images), features)
    assert model.num_classes == 0


def test_checkpointing_and_fullgraph_change_nothing() -> None:
    model, _ = pair()
    images = torch.randn(2, 3, 64, 64)
    expected = gradients(model, images)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, images), expected, rtol=1e-4, atol=1e-4)
    runs = []
    model.stages[0].blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(model, images), expected, rtol=0, atol=0)
    assert len(runs) == 2  # forward, and again in backward


def test_symbolic_trace() -> None:
    model, _ = pair()
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images), rtol=0, atol=0)


def test_weights_from_a_file(tmp_path: Path) -> None:
    model, _ = pair()
    torch.save(model.state_dict(), tmp_path / "r.pth")
    loaded = fastvit.create_model("R50x1", checkpoint_path=tmp_path / "r.pth", **TINY)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    with pytest.raises(ValueError, match=r"r\.npz: \.npz files are for ViTs"):
        fastvit.create_model("R50x1", checkpoint_path=tmp_path / "r.npz", **TINY)


def test_meta_device_then_weights() -> None:
    model = ResNetV2(**TINY, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    model.to_empty(device="cpu").init_weights()
    assert model(torch.randn(1, 3, 32, 32).bfloat16()).isfinite().all()
    assert model.head.fc.weight.float().std().item() == pytest.approx(0.01, rel=0.05)


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (3, 4, 6)}, r"layers must be the numbers of blocks of 4 stages, got \(3, 4, 6\)"),
        ({"layers": 50}, "layers must be .*, got 50"),
        ({"layers": (3, 0, 6, 3)}, r"layers\[1\] must be a positive integer, got 0"),
        ({"width_factor": 0}, "width_factor must be a positive integer, got 0"),
        ({"width_factor": 1.5}, r"width_factor must be a positive integer, got 1\.5"),
        ({"in_chans": 0}, "in_chans must be a positive integer, got 0"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"global_pool": "token"}, "unknown global_pool 'token'; accepted: '', 'avg', 'max', 'avgmax'"),
        ({"drop_rate": 2}, "drop_rate must be between 0 and 1, got 2"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate must be between 0 and 1, got -0\.1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNetV2(**{**TINY, **options}, device="meta")


@pytest.mark.parametrize("images", [torch.zeros(1, 4, 32, 32), torch.zeros(3, 32, 32), torch.zeros(1, 3, 8, 8).byte()])
def test_bad_images(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"accepted: \(B, 3, H, W\), floating, normalised") as error:
        ResNetV2(**TINY, device="meta")(images)
    assert str(tuple(images.shape)) in str(error.value)
