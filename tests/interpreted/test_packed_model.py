"""A whole ViT on packed images on the Triton kernels, in the interpreter: logits and every gradient against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastvit
from numerics import assert_model_as_right_as_eager

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
MIX = ((8, 16), (24, 16), (8, 8), (24, 16))
OPTIONS: dict[str, dict[str, Any]] = {
    "class token, LayerScale": {"init_values": 0.5},
    "qk-norm, average pool": {"qk_norm": True, "global_pool": "avg", "reg_tokens": 2},
    "map pool": {"global_pool": "map", "no_embed_class": True},
    "relative positions": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "init_values": 0.5},
    "rotary, patch dropout": {"rope": 100.0, "patch_drop_rate": 0.5, "depth": 1},
}


def _step(model: fastvit.ViT, images: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(2)  # drop-path and dropout
    logits = model(images)
    (logits.float() ** 2).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def _model(**options: Any) -> fastvit.ViT:
    model = fastvit.ViT(**SIZES | options)
    with torch.no_grad():
        for p in model.parameters():  # the zero-initialised ones would hide what multiplies them
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_model_is_as_right_as_eager(name: str, dtype: torch.dtype) -> None:
    model = _model(**OPTIONS[name]).to(dtype)
    images = [torch.randn(3, *size, dtype=dtype) for size in MIX]
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    with fastvit.backend("triton"):
        ours = _step(model, images)
    with fastvit.backend("reference"):
        theirs, truth = _step(eager, images), _step(exact, [image.double() for image in images])
    assert_model_as_right_as_eager(ours, theirs, truth)


@pytest.mark.parametrize("options", [{}, {"use_rel_pos_bias": True}], ids=str)
def test_drop_path_and_dropout_drop_the_same_on_every_backend(options: dict[str, Any]) -> None:
    model = _model(drop_path_rate=0.5, attn_drop_rate=0.3, **options).train()
    images = [torch.randn(3, *size) for size in MIX]
    runs = []
    for backend in ("triton", "reference"):
        with fastvit.backend(backend):
            runs.append(_step(copy.deepcopy(model), images))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_uint8_images_need_no_copy_in_floating_point() -> None:
    model = _model(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)).eval()
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in MIX]
    logits = []
    for backend in ("triton", "reference"):
        with fastvit.backend(backend), torch.no_grad():
            logits.append(model(images))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
