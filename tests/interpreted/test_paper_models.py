"""The paper's other models in the interpreter, on Triton: relative position keys, axial attention, hybrids."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from pos_embed_cases import SIZES, definition
from torch import Tensor, nn

import fastvit
from fastvit.models.axial import AxialAttention2d, AxialViT
from fastvit.models.hybrid import HybridEmbed
from numerics import assert_as_right_as_eager, assert_model_as_right_as_eager
from parity import randomise


def run(model: nn.Module, out: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), list(model.parameters()))]


def test_a_model_with_keys_of_distances_is_as_right_as_eager() -> None:
    model = randomise(fastvit.ViT(**SIZES, pos_embed="relative"))
    exact, x = copy.deepcopy(model).double(), torch.randn(1, 3, *SIZES["img_size"])
    with fastvit.backend("triton"):
        got = run(model, model(x))
    want, truth = (
        run(each, definition(each, "relative", "stem")(x.to(each.head.weight.dtype))) for each in (model, exact)
    )
    assert_as_right_as_eager(got, want, truth, names=["logits", *dict(model.named_parameters())])


HYBRID = {**SIZES, "img_size": 16, "depth": 1, "patch_size": 1, "embed_layer": partial(HybridEmbed, layers=(1, 1))}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Axial-ViT": (lambda: AxialViT(**{**SIZES, "depth": 1}), (1, 3, 16, 24)),
    "axial attention": (lambda: AxialAttention2d(16, (5, 4), 2, num_heads=2), (1, 16, 3, 4)),
    "hybrid": (lambda: fastvit.ViT(**HYBRID), (1, 3, 16, 16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_right_as_on_the_reference(name: str) -> None:
    """Whose own definitions are tested elsewhere."""
    make, shape = MODELS[name]
    model, x = randomise(make()), torch.randn(*shape)
    runs = []
    for each, backend in ((model, "triton"), (model, "reference"), (copy.deepcopy(model).double(), "reference")):
        with fastvit.backend(backend):
            runs.append(run(each, each(x.to(next(each.parameters()).dtype))))
    assert_model_as_right_as_eager(*runs)
