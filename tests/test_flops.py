"""FLOPs three ways (PyTorch's counter, by hand, from recorded launches), bytes per launch, and the roofline floor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from benchmarks import roofline
from fastvit.layers import SwiGLU
from fastvit.ops import backends
from fastvit.tuning import compile_report, flops

PAPER = ("ViT-B/32", "ViT-B/16", "ViT-L/32", "ViT-L/16", "ViT-H/14")
SMALL: dict[str, Any] = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
ODD: dict[str, dict[str, Any]] = {
    "registers": {"reg_tokens": 4},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "average pool": {"global_pool": "avg"},
    "SwiGLU": {"mlp_layer": SwiGLU},
    "qk-norm": {"qk_norm": True},
    "LayerScale": {"init_values": 1e-5},
    "no head": {"num_classes": 0},
    "not square": {"img_size": (32, 96), "patch_size": (16, 8)},
    "one channel": {"in_chans": 1, "depth": 3, "mlp_ratio": 3.5},
}
CASES = [pytest.param("", SMALL | options, id=name) for name, options in ODD.items()]
CASES += [pytest.param(name, {}, id=name) for name in PAPER]


def _build(name: str, options: dict[str, Any]) -> fastvit.ViT:
    options = {**options, "device": "meta", "dtype": torch.bfloat16}
    return fastvit.create_model(name, **options) if name else fastvit.ViT(**options)


def _by_hand(model: Any, **options: Any) -> dict[str, int]:
    """Return the formula at a model's sizes."""
    return flops.vit_formula(
        image_size=model.patch_embed.img_size,
        patch_size=model.patch_embed.patch_size,
        width=model.embed_dim,
        depth=len(model.blocks),
        mlp=model.blocks[0].mlp.fc1.out_features,
        classes=model.num_classes,
        channels=model.in_chans,
        prefix_tokens=model.num_prefix_tokens,
        gated=isinstance(model.blocks[0].mlp, SwiGLU),
        **options,
    )


@pytest.mark.parametrize(("name", "options"), CASES)
def test_counted_is_derived(name: str, options: dict[str, Any]) -> None:
    """Forward, its parts, and backward: twice as much, less the images' gradient."""
    model, training = _build(name, options), name in ("", "ViT-B/16")  # the others take seconds
    by_hand, counted = _by_hand(model), flops.count(model, batch=2, training=training)
    assert counted.forward == 2 * sum(by_hand.values())
    assert counted.backward == training * 2 * (2 * sum(by_hand.values()) - by_hand["patch_embed"])
    ends = {key: 2 * by_hand[key] for key in ("patch_embed", "head") if by_hand[key]}
    assert counted.parts == {**ends, "blocks": counted.forward - sum(ends.values())}


@pytest.mark.parametrize(("name", "options"), CASES)
def test_launched_is_derived(name: str, options: dict[str, Any]) -> None:
    """The recorded launches of a forward have the formula's FLOPs, with the class token's saving where it is taken."""
    model = _build(name, options).eval()
    images = torch.empty(3, model.in_chans, *model.patch_embed.img_size, device="meta", dtype=torch.bfloat16)
    for arch in (80, 90):
        with compile_report.trace(arch) as trace, torch.no_grad():
            model(images)
        by_hand = _by_hand(model, class_token_only=model.global_pool == "token")
        assert sum(compile_report.flops(one) for one in trace.launches) == 3 * sum(by_hand.values())


@pytest.mark.parametrize(("name", "saving"), [("ViT-B/16", 0.07), ("ViT-L/16", 0.035)])
def test_the_class_tokens_saving(name: str, saving: float) -> None:
    """The share of FLOPs that docs/explanation/model.md states."""
    model = _build(name, {})
    executed, nominal = (sum(_by_hand(model, class_token_only=only).values()) for only in (True, False))
    assert 1 - executed / nominal == pytest.approx(saving, abs=0.001)


def test_count_is_pytorchs_on_the_reference() -> None:
    """The same as FlopCounterMode around a real forward and backward on the CPU."""
    model = fastvit.ViT(**SMALL)
    images = torch.randn(2, 3, 64, 64)
    model.patch_embed.proj.weight.requires_grad_(False)  # a frozen weight's gradient is not counted
    with fastvit.backend("reference"), FlopCounterMode(display=False) as counter:
        model.blocks[0].attn.fused_attn = model.blocks[1].attn.fused_attn = False  # has no formula on the CPU
        model(images).sum().backward()
    counted = flops.count(model, batch=2, training=True)
    assert counted.total == counter.get_total_flops()
    by_hand = _by_hand(model)
    assert counted.total == 2 * (3 * sum(by_hand.values()) - 2 * by_hand["patch_embed"])


def test_any_model_of_images() -> None:
    class Small(nn.Sequential):
        in_chans = 2

    model = Small(nn.Conv2d(2, 8, 3, stride=2, bias=False), nn.Flatten(), nn.Linear(8 * 4 * 3, 5))
    counted = flops.count(model, image_size=(9, 7), training=True)
    assert counted.parts == {"0": 2 * 8 * (2 * 3 * 3) * (4 * 3), "2": 2 * (8 * 4 * 3) * 5}
    assert counted.backward == counted.parts["0"] + 2 * counted.parts["2"]


def test_resnets() -> None:
    """Ours and timm's are the same network; 224 pixels where a model names no size."""
    theirs = flops.count(timm.create_model("resnetv2_50x1_bit", num_classes=1000).to("meta"))
    ours = flops.count(fastvit.create_model("R50x1", device="meta"), image_size=224)
    assert ours.forward == theirs.forward
    assert ours.forward / 2 == pytest.approx(4.09e9, rel=0.01)  # multiply-adds of a ResNet-50 (He et al., 2016)


def test_counting_leaves_no_trace() -> None:
    model, notes = fastvit.ViT(**SMALL), backends.fallbacks()
    before = {name: (p.device, p.data_ptr()) for name, p in model.named_parameters()}
    flops.count(model, training=True)
    assert {name: (p.device, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert backends.fallbacks() == notes
    assert not backends.log.disabled
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        flops.count(model, batch=0)


# --- bytes, and the floor ---------------------------------------------------------------------------------------


def test_work_of_a_block_is_the_budgets() -> None:
    """ViT-B/16, batch 256, bfloat16: (GFLOP, MB) of each launch as in docs/explanation/kernels.md, within rounding."""
    launches = roofline.work("vit_base_patch16_224", 256)[1:8]
    budget = [(0, 155), (178.5, 313), (30.5, 312), (59.5, 234), (0, 155), (238, 392), (238, 470)]
    for one, (gflop, megabytes) in zip(launches, budget, strict=True):
        assert one.flops / 1e9 == pytest.approx(gflop, abs=0.06 if gflop < 200 else 0.5)
        assert one.bytes / 1e6 == pytest.approx(megabytes, abs=0.6)


def test_work_is_the_same_on_every_architecture() -> None:
    images = torch.empty(8, 3, 224, 224, device="meta", dtype=torch.bfloat16)
    model = fastvit.create_model("ViT-Ti/16", depth=2, device="meta", dtype=torch.bfloat16).eval()
    found = set()
    for arch in compile_report.SHARED_KIB:
        with compile_report.trace(arch) as trace, torch.no_grad():
            model(images)
        found.add(tuple((compile_report.flops(one), compile_report.moved(one)) for one in trace.launches))
    assert len(found) == 1


def test_a_tensor_is_moved_once() -> None:
    x = torch.empty(4, 6, dtype=torch.bfloat16)
    assert compile_report.distinct_bytes((x, [x, x[:]])) == x.nbytes
    assert compile_report.distinct_bytes((x[:, :2], x[:, 2:])) == x.nbytes
    assert compile_report.distinct_bytes(x[:1].expand(100, 6)) == 12
    assert compile_report.distinct_bytes({"a": x, "b": x.clone(), "c": None, "d": 3}) == 2 * x.nbytes


def test_floor_is_the_sum_of_the_slower_of_two() -> None:
    name, batch = "vit_tiny_patch16_224", 4
    work = roofline.work(name, batch)
    endless = roofline.floor(name, batch, roofline.Ceilings("", 1e12, math.inf, ""))
    assert endless.seconds == pytest.approx(sum(one.flops for one in work) / 1e12)
    assert endless.memory_share == 0
    slow = roofline.floor(name, batch, roofline.Ceilings("", math.inf, 1e10, ""))
    assert slow.seconds == pytest.approx(sum(one.bytes for one in work) / 1e10)
    assert slow.memory_share == 1
    both = roofline.floor(name, batch, roofline.Ceilings("", 1e12, 1e10, ""))
    assert both.seconds == pytest.approx(sum(max(one.flops / 1e12, one.bytes / 1e10) for one in work))
    assert max(endless.seconds, slow.seconds) < both.seconds < 0.9 * (endless.seconds + slow.seconds)
    assert both.images_per_s == pytest.approx(batch / both.seconds)
    gpu = roofline.GPUS["NVIDIA H200"]
    with pytest.raises(ValueError, match=r"torch\.bfloat16 and torch\.float16, got torch\.float32"):
        roofline.floor("ViT-Ti/16", 1, gpu, torch.float32)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        roofline.floor("ViT-Ti/16", 0, gpu)


def test_a_kernel_without_a_formula_is_refused() -> None:
    """A product is never counted as nothing."""
    launches = compile_report.launches(compile_report.Workload("vit_tiny_patch16_224", 2, torch.bfloat16), 90).launches
    backward = [one for one in launches if one.kernel.fn.__name__ == "attention_query_gradient_kernel"]
    with pytest.raises(LookupError, match="attention_query_gradient_kernel"):
        compile_report.flops(backward[0])
