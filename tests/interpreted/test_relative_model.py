"""Keys of distances in a model on the Triton kernels, in the interpreter, against the plain definition."""

from __future__ import annotations

import copy

import torch
from pos_embed_cases import SIZES, definition
from torch import Tensor, nn

import fastvit
from numerics import assert_as_right_as_eager
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
