"""BEiT against timm's and Hugging Face's: outputs and every gradient, the tables' above all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor

import fastvit
from beit_cases import HEADS, OPTIONS, WIDTH, pair, run
from fastvit.layers.resample import resample_rel_pos_table
from fastvit.models.families import FAMILIES
from numerics import assert_as_right_as_eager
from parity import Tensors, assert_parity, randomise

SIZES = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8, "num_classes": 5}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_block_is_timms(name: str, shared: bool) -> None:
    ours, theirs = pair(torch.float64, **OPTIONS[name])
    x = torch.randn(3, 13, WIDTH, dtype=torch.float64)
    rest = (torch.randn(HEADS, 13, 13, dtype=torch.float64),) if shared else ()
    got, want = run(ours, x, *rest), run(theirs, x, *rest)
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_float32_is_as_right_as_timms(backend: str) -> None:
    ours, theirs = pair(torch.float32, **OPTIONS["BEiT"])
    x = torch.randn(3, 13, WIDTH)
    exact = run(copy.deepcopy(theirs).double(), x.double())
    with fastvit.backend(backend):
        got = run(ours, x)
        with torch.no_grad():  # oneDNN's linears under auto
            torch.testing.assert_close(ours(x), got["out"], rtol=1e-5, atol=1e-5)
    want = run(theirs, x)
    assert_as_right_as_eager(*[list(run.values()) for run in (got, want, exact)], names=list(got))


@pytest.mark.parametrize("size", [(32, 32), (40, 24)], ids=str)
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beit_large_patch16_512", "beitv2_base_patch16_224"])
def test_model_is_timms(name: str, size: tuple[int, int]) -> None:
    options = {**SIZES, "img_size": size}
    assert_parity(fastvit.create_model(name, **options), timm.create_model(name, **options), size)


@pytest.mark.parametrize(
    "options",
    [
        {"use_shared_rel_pos_bias": True},
        {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": True, "init_values": 0.1},
        {"use_rel_pos_bias": True, "global_pool": "token", "qkv_bias": False},
        {"use_rel_pos_bias": True, "global_pool": "", "drop_path_rate": 0.4, "num_classes": 0},
    ],
    ids=str,
)
def test_options_are_timms(options: dict[str, Any]) -> None:
    """With positions of its own too, which no BEiT of these names has."""
    options = {**SIZES, "img_size": (24, 32), **options}
    assert_parity(fastvit.ViT(**{"global_pool": "avg", **options}), timm.models.beit.Beit(**options), (24, 32))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("classifies", [False, True])
def test_hugging_face(classifies: bool, shared: bool) -> None:
    config = transformers.BeitConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, patch_size=8, image_size=32,
        num_labels=5, use_relative_position_bias=not shared, use_shared_relative_position_bias=shared,
        drop_path_rate=0.0, layer_norm_eps=1e-6,
    )  # fmt: skip
    kind = transformers.BeitForImageClassification if classifies else transformers.BeitModel
    ours = fastvit.create_model(
        "beit_base_patch16_224", **SIZES | {"num_classes": 5 * classifies}, img_size=32, mlp_ratio=2,
        use_rel_pos_bias=not shared, use_shared_rel_pos_bias=shared,
    )  # fmt: skip

    def translate(weights: Tensors) -> Tensors:
        return FAMILIES["beit"].layouts[1].to_ours(weights)[0]

    def forward(model: Any, images: Tensor) -> Tensor:
        out = model(images)
        return out.logits if classifies else out.pooler_output

    assert_parity(ours, kind(config), (32, 32), translate, forward)


@pytest.mark.parametrize("name", fastvit.list_models("beit*"))
def test_names_are_timms(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = fastvit.create_model(name), timm.create_model(name)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.no_weight_decay() >= theirs.no_weight_decay()
    for attribute in ("img_size", "patch_size"):
        assert getattr(ours.patch_embed, attribute) == getattr(theirs.patch_embed, attribute)
    assert ours.blocks[0].init_values == theirs.blocks[0].init_values
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


WINDOWS = [(4, 4), (7, 7), (14, 14), (24, 24), (3, 5), (5, 3), (1, 4), (1, 1), (2, 9)]


@pytest.mark.parametrize("new", WINDOWS, ids=str)
@pytest.mark.parametrize("old", WINDOWS, ids=str)
def test_a_table_is_resampled_as_timm_does(old: tuple[int, int], new: tuple[int, int]) -> None:
    table, rows = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1) + 3, 3), (2 * new[0] - 1) * (2 * new[1] - 1) + 3
    ours = resample_rel_pos_table(table, new, old)
    theirs = resize_rel_pos_bias_table(table, new, (rows, 3), old)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    without = resample_rel_pos_table(table[:-3], new, old)
    assert torch.equal(without, ours[:-3])


def test_a_table_of_another_window_is_named() -> None:
    with pytest.raises(
        ValueError, match="a table of 9 relative positions is none of 3x3 patches, which have 25, or 28"
    ):
        resample_rel_pos_table(torch.ones(9, 2), (2, 2), (3, 3))


def test_set_input_size_is_timms() -> None:
    options = {**SIZES, "img_size": 32, "use_rel_pos_bias": True, "use_shared_rel_pos_bias": True}
    ours, theirs = fastvit.ViT(**options, global_pool="avg"), randomise(timm.models.beit.Beit(**options))
    ours.load_state_dict(theirs.state_dict())
    for change in ({"img_size": (48, 24)}, {"patch_size": (8, 4)}, {"img_size": (16, 32)}):
        for model in (ours, theirs):
            model.set_input_size(**change)
        images = torch.randn(2, 3, *ours.patch_embed.img_size)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    assert all(block.attn.relative_position_bias_table.requires_grad for block in ours.blocks)


def test_a_resampled_table_has_its_gradient() -> None:
    """Images of another size than the model's: against finite differences."""
    table = torch.randn(3 * 5 + 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: resample_rel_pos_table(t, (4, 3), (2, 3)), (table,))
