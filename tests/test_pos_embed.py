"""The position embeddings of the ViT paper's table 8 against their definitions in plain PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pos_embed_cases import SIZES, H, T, W, definition, images, small
from torch import nn

import fastvit
from fastvit.layers import Attention, Block, RelativeAttention, TokenContext
from fastvit.layers.resample import resample_pos_embed
from parity import Calls, assert_same, gradients, randomise

TABLE_8 = [
    ("none", "stem"), ("learn", "stem"), ("learn", "layers"), ("learn", "shared"), ("learn_2d", "stem"),
    ("learn_2d", "layers"), ("learn_2d", "shared"), ("relative", "stem"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "place"), TABLE_8)
def test_values_and_gradients(kind: str, place: str) -> None:
    model, x = small(pos_embed=kind, pos_embed_at=place), images()
    want = definition(model, kind, place)(x)
    with fastvit.backend("reference"):
        got = model(x)
        assert_same(got, want)
        assert_same(gradients(model, got), gradients(model, want))


def test_how_many_parameters_each_has() -> None:
    """Two axes need h + w rows of D / 2; keys 2T - 1 rows in each block. Names of default models stay timm's."""
    bare = sum(p.numel() for p in small(pos_embed="none").parameters())
    more = {
        (kind, place): sum(p.numel() for p in small(pos_embed=kind, pos_embed_at=place).parameters()) - bare
        for kind, place in TABLE_8
    }
    one, two = T * 32, 32 + (H + W) * 16
    assert more == {
        ("none", "stem"): 0, ("learn", "stem"): one, ("learn", "layers"): 3 * one, ("learn", "shared"): one,
        ("learn_2d", "stem"): two, ("learn_2d", "layers"): 3 * two, ("learn_2d", "shared"): two,
        ("relative", "stem"): 3 * (2 * T - 1) * 32,
    }  # fmt: skip
    new = {"pos_embed_2d", "layer_pos_embed", "rel_pos_keys"}
    assert not [name for name in small().state_dict() if new & set(name.split("."))]
    for kind, place in TABLE_8[2:]:
        model = small(pos_embed=kind, pos_embed_at=place)
        names = {name for name, _ in model.named_parameters() if new & set(name.split("."))}
        assert names <= model.no_weight_decay() and names


@pytest.mark.parametrize(("kind", "place"), TABLE_8[2:7])
def test_another_size_resamples_each_axis(kind: str, place: str) -> None:
    """set_input_size, and the same in each forward with dynamic_img_size, with the gradient."""
    model, x = small(pos_embed=kind, pos_embed_at=place, dynamic_img_size=True), images(32, 40)
    dynamic = model(x)
    grads = gradients(model, dynamic)
    table = model.pos_embed_2d if place == "stem" else model.layer_pos_embed
    before = {name: value.detach().clone() for name, value in table.named_parameters()}
    assert all(gradient is not None for gradient in grads)
    model.set_input_size((32, 40))
    assert_same(model(x), dynamic)
    assert torch.equal(table.prefix, before["prefix"])
    if kind == "learn":
        want = torch.stack([resample_pos_embed(rows[None], (4, 5), (H, W), 0)[0] for rows in before["patches"]])
        assert_same(table.patches, want)
        return
    for name, size in (("x", 5), ("y", 4)):
        line = before[name].mT.unsqueeze(2)  # (tables, D / 2, 1, size)
        want = F.interpolate(line, (1, size), mode="bicubic", antialias=True)[:, :, 0].mT
        assert_same(getattr(table, name), want)


def test_prefix_tokens_without_positions() -> None:
    """Their rows of layers' tables are 0, and none is learned."""
    options: dict[str, Any] = {"reg_tokens": 2, "pos_embed_at": "layers"}
    model, with_rows = small(no_embed_class=True, **options), small(**options)
    assert model.layer_pos_embed.prefix is None
    rows = {"layer_pos_embed.prefix": torch.zeros(3, 3, 32, dtype=torch.float64)}
    with_rows.load_state_dict({**model.state_dict(), **rows})
    x = images()
    assert_same(model(x), with_rows(x))


def test_what_is_refused() -> None:
    for options, message in (
        ({"pos_embed": "sincos"}, "unknown pos_embed 'sincos'; accepted: 'learn', 'learn_2d', 'relative', 'none', ''"),
        ({"pos_embed_at": "head"}, "unknown pos_embed_at 'head'; accepted: 'stem', 'layers', 'shared'"),
        ({"pos_embed": "none", "pos_embed_at": "layers"}, "pos_embed_at='layers' with pos_embed='none'; accepted"),
        ({"pos_embed": "relative", "pos_embed_at": "shared"}, "pos_embed_at='shared' with pos_embed='relative'"),
        ({"pos_embed": "learn_2d", "embed_dim": 27, "num_heads": 3}, "embed_dim must be even, got 27"),
        ({"pos_embed": "relative", "dynamic_img_size": True}, "keys for one grid: not with dynamic_img_size"),
        ({"pos_embed": "relative", "patch_drop_rate": 0.5}, "not with patch_drop_rate"),
        ({"pos_embed": "relative", "attn_layer": Attention}, "not with an attn_layer"),
        ({"pos_embed": "relative", "use_rel_pos_bias": True}, "not with biases by relative position"),
        ({"pos_embed_at": "layers", "patch_drop_rate": 0.5}, "patch_drop_rate=0.5 with pos_embed_at='layers'"),
        ({"pos_embed_at": "layers", "block_fn": nn.Identity}, "positions go with fastvit.layers' Block"),
    ):
        with pytest.raises(ValueError, match=message):
            fastvit.ViT(**{**SIZES, **options})
    model = small(pos_embed="relative")
    with pytest.raises(
        ValueError, match="'relative' has relative position keys .* build the model with the other img_s"
    ):
        model.set_input_size(32)
    assert model(images()).shape == (2, 5)
    for options in ({"pos_embed": "relative"}, {"pos_embed": "learn_2d"}, {"pos_embed_at": "layers"}):
        with pytest.raises(ValueError, match="packed images can't pass (pos_embed|blocks.0.attn)"):
            small(**options)([torch.randn(3, 16, 16).double()])


@pytest.mark.parametrize(("kind", "place"), TABLE_8[1:])
def test_files_tell_which_it_is(kind: str, place: str) -> None:
    for size in ((32, 32), (16, 24)) if kind == "learn_2d" else ((32, 32),):
        model, x = small(pos_embed=kind, pos_embed_at=place, img_size=size), images(*size)
        again = fastvit.from_checkpoint(model.state_dict(), num_heads=2, dtype=torch.float64)
        assert again.state_dict().keys() == model.state_dict().keys() and again.patch_embed.img_size == size
        assert_same(again(x), model(x))


def test_relative_attention_is_one_op_and_takes_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    block = randomise(Block(32, 2, attn_layer=partial(RelativeAttention, tokens=7))).double()
    calls, x = Calls(monkeypatch), torch.randn(2, 7, 32, dtype=torch.float64)
    block(x)
    assert [(name, used) for name, _, used in calls.made][1] == ("attention_qkvpacked", ("scale", "rel_pos_keys"))
    assert_same(block(x, context=TokenContext(keep=1)), block(x)[:, :1])
