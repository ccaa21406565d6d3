"""A whole ViT on the Triton kernels, in the interpreter: logits and every gradient against float64."""

from __future__ import annotations

import copy

import pytest
import torch

import fastvit
from numerics import assert_model_as_right_as_eager

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
OPTIONS = {
    "plain": {},
    "LayerScale, registers": {"init_values": 0.5, "reg_tokens": 2, "no_embed_class": True},
    "qk-norm, average pool": {"qk_norm": True, "global_pool": "avg", "class_token": False},
    "pre-norm, map pool": {"pre_norm": True, "global_pool": "map", "pos_embed": "none"},
    "quick GELU, oblong": {"act_layer": "quick_gelu", "img_size": (16, 24)},
    "SwiGLU": {"mlp_layer": fastvit.layers.SwiGLU},
    "DINOv3": {"block_fn": fastvit.layers.BeitBlock, "rope": 100.0, "reg_tokens": 2, "pos_embed": "none"},
    "BEiT": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "global_pool": "avg", "init_values": 0.5},
    "distilled": {"distilled": True},
}


def _step(model: fastvit.ViT, images: torch.Tensor) -> list[torch.Tensor]:
    images = images.detach().requires_grad_()
    logits = model(images)
    (logits.float() ** 2).sum().backward()
    return [logits.detach(), images.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_model_is_as_right_as_eager(name: str, dtype: torch.dtype) -> None:
    options = SIZES | OPTIONS[name]
    model = fastvit.ViT(**options).to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # the zero-initialised ones would hide what multiplies them
            p.add_(torch.randn_like(p) * 0.05)
    height, width = model.patch_embed.img_size
    images = torch.randn(3, 3, height, width, dtype=dtype)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    with fastvit.backend("triton"):
        ours = _step(model, images)
    with fastvit.backend("reference"):
        theirs, truth = _step(eager, images), _step(exact, images.double())
    assert_model_as_right_as_eager(ours, theirs, truth)


def test_drop_path_drops_the_same_images_on_every_backend() -> None:
    model = fastvit.ViT(**SIZES, drop_path_rate=0.5).train()
    images = torch.randn(4, 3, 16, 16)
    logits = []
    for backend in ("triton", "reference"):
        torch.manual_seed(3)
        with fastvit.backend(backend):
            logits.append(model(images))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_autocast_trains() -> None:
    model = fastvit.ViT(**SIZES)
    with fastvit.backend("triton"), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, 16, 16)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_state_made_on_one_backend_runs_backward_on_it() -> None:
    """The backend is chosen in forward, once: changing the setting before backward changes nothing."""
    model = fastvit.ViT(**SIZES)
    images = torch.randn(1, 3, 16, 16)
    with fastvit.backend("triton"):
        loss = model(images).sum()
    with fastvit.backend("reference"):
        loss.backward()
    assert type(loss.grad_fn) is not None and model.head.weight.grad.isfinite().all()


def test_checkpointing_changes_nothing() -> None:
    model = fastvit.ViT(**SIZES)
    images = torch.randn(2, 3, 16, 16)
    with fastvit.backend("triton"):
        plain = _step(model, images)
        model.zero_grad()
        model.set_grad_checkpointing(True)
        for a, b in zip(plain, _step(model, images), strict=True):
            torch.testing.assert_close(a, b)
