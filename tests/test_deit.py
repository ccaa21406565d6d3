"""Distilled DeiT in fastvit.ViT is timm's and Hugging Face's: both heads, in training and out of it."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import fastvit
from fastvit.models.families import FAMILIES
from parity import Tensors, assert_parity, randomise

SIZES = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8, "num_classes": 5, "img_size": 32}
NAME = "deit_tiny_distilled_patch16_224"


def pair(**options: Any) -> tuple[Any, Any]:
    """Ours and timm's with the same weights, none of them constant."""
    ours, theirs = (library.create_model(NAME, **SIZES, **options) for library in (fastvit, timm))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"img_size": (24, 40)},
        {"dynamic_img_size": True},
        {"init_values": 0.1, "qk_norm": True},
        {"drop_rate": 0.3, "drop_path_rate": 0.4},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_timm(options: dict[str, Any]) -> None:
    size = options.get("img_size", (48, 24) if "dynamic_img_size" in options else (32, 32))
    options = {**SIZES, **options}
    assert_parity(fastvit.create_model(NAME, **options), timm.create_model(NAME, **options), size)


@pytest.mark.parametrize("name", fastvit.list_models("deit*"))
def test_names_are_timms(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = fastvit.create_model(name), timm.create_model(name)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    assert ours.num_prefix_tokens == theirs.num_prefix_tokens == 2
    assert "dist_token" in ours.group_matcher()["stem"] and ours.no_weight_decay() >= theirs.no_weight_decay()


def test_both_logits_in_distilled_training_alone() -> None:
    ours, theirs = pair()
    images = torch.randn(2, 3, 32, 32)
    for training in (True, False):
        for distilled in (True, False):
            for model in (ours, theirs):
                model.train(training).set_distilled_training(distilled)
            got, want = ours(images), theirs(images)
            assert isinstance(got, tuple) == isinstance(want, tuple) == (training and distilled)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for model in (ours, theirs):
        model.train().set_distilled_training()
        first, second = model(images)
        model.zero_grad()
        (first.square().sum() + 3 * second.square().sum()).backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-3, atol=1e-4)


def test_what_is_before_the_heads_and_other_heads() -> None:
    ours, theirs = pair()
    images = torch.randn(2, 3, 32, 32)
    ours_features, theirs_features = ours.forward_features(images), theirs.forward_features(images)
    torch.testing.assert_close(
        ours.forward_head(ours_features, pre_logits=True), theirs.forward_head(theirs_features, pre_logits=True)
    )
    assert ours.get_classifier() == (ours.head, ours.head_dist)
    for classes in (3, 0):
        for model in (ours, theirs):
            model.reset_classifier(classes)
        shapes = [[head.weight.shape for head in model.get_classifier() if classes] for model in (ours, theirs)]
        assert shapes[0] == shapes[1]
    for pool in ("", "token"):
        for model in (ours, theirs):
            model.reset_classifier(0, pool)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert type(ours.head_dist) is nn.Identity


def test_hugging_face() -> None:
    config = transformers.DeiTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, patch_size=8, image_size=32,
        num_labels=5, layer_norm_eps=1e-6,
    )  # fmt: skip

    def translate(given: Tensors) -> Tensors:
        return FAMILIES["deit"].layouts[0].to_ours(given)[0]

    def forward(model: Any, images: Tensor) -> Tensor:
        return model(images).logits

    theirs = transformers.DeiTForImageClassificationWithTeacher(config)
    assert_parity(fastvit.create_model(NAME, **SIZES, mlp_ratio=2), theirs, (32, 32), translate, forward)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "avg"}, "global_pool='avg': the heads of a distilled model .* accepted: 'token'"),
        ({"class_token": False}, "global_pool='token' reads the class token; give class_token=True"),
        ({"representation_size": 7}, "representation_size=7: a distilled model has no pre-training head"),
        ({"use_rel_pos_bias": True}, "have rows for one class token"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastvit.create_model(NAME, **SIZES, **options)
    with pytest.raises(ValueError, match="global_pool='max': the heads of a distilled model"):
        fastvit.create_model(NAME, **SIZES).reset_classifier(3, "max")
