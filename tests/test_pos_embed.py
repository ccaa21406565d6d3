"""The position embeddings of the ViT paper's table 8 against their definitions in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit import analysis
from fastvit.checkpoints.resample import resample_pos_embed
from fastvit.layers import Attention, Block, RelativeAttention
from parity import Calls, assert_same, gradients, randomise

SIZES: dict[str, Any] = {
    "img_size": (16, 24), "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5,
}  # fmt: skip
H, W, T = 2, 3, 7


def small(**options: Any) -> fastvit.ViT:
    return randomise(fastvit.ViT(**{**SIZES, **options})).double()  # type: ignore[return-value]


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or SIZES["img_size"]), dtype=torch.float64)


def plain_attention(x: Tensor, attn: Attention, keys: Tensor | None) -> Tensor:
    """Appendix A, and for keys of the distances D.3: "we use the original query, but relative embeddings as keys"."""
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    if keys is not None:
        t = x.shape[1]
        for i in range(t):
            for j in range(t):  # the offset p_q - p_k
                extra = torch.zeros_like(scores)
                extra[:, :, i, j] = torch.einsum("bhd,hd->bh", q[:, i], keys[:, i - j + t - 1])
                scores = scores + extra
    weights = (scores / attn.head_dim**0.5).softmax(-1)
    return attn.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


def plain(
    model: fastvit.ViT, x: Tensor, stem: Callable[[], Tensor | None], layer: Callable[[int], Tensor | None]
) -> Tensor:
    """Equations 1 to 4, with positions (T, D) at the stem and before each block."""

    def added(tokens: Tensor, positions: Tensor | None) -> Tensor:
        return tokens if positions is None else tokens + positions

    patches = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8).flatten(2).mT
    tokens = added(torch.cat([model.cls_token.expand(len(x), -1, -1), patches], 1), stem())
    for i, block in enumerate(model.blocks):
        tokens = added(tokens, layer(i))
        normed = F.layer_norm(tokens, (32,), block.norm1.weight, block.norm1.bias, 1e-6)
        tokens = tokens + plain_attention(normed, block.attn, getattr(block.attn, "rel_pos_keys", None))
        normed = F.layer_norm(tokens, (32,), block.norm2.weight, block.norm2.bias, 1e-6)
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(normed)))
    return model.head(F.layer_norm(tokens, (32,), model.norm.weight, model.norm.bias, 1e-6)[:, 0])


def by_axis(prefix: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """ "We concatenate the X and Y embedding to get the final positional embedding for that patch"."""
    rows = [torch.cat([x[column], y[row]]) for row in range(H) for column in range(W)]
    return torch.cat([prefix, torch.stack(rows)])


def definition(model: fastvit.ViT, kind: str, place: str) -> Callable[[Tensor], Tensor]:
    def table(i: int) -> Tensor | None:
        if kind in ("none", "relative"):
            return None
        if kind == "learn" and place == "stem":
            return model.pos_embed[0]
        given = model.pos_embed_2d if place == "stem" else model.layer_pos_embed
        i = i if place == "layers" else 0
        if kind == "learn":
            return torch.cat([given.prefix[i], given.patches[i]])
        return by_axis(given.prefix[i], given.x[i], given.y[i])

    stem, layer = (table, lambda i: None) if place == "stem" else (lambda i: None, table)
    return lambda x: plain(model, x, lambda: stem(0), layer)


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
    given = model.pos_embed_2d if place == "stem" else model.layer_pos_embed
    before = {name: value.detach().clone() for name, value in given.named_parameters()}
    assert all(gradient is not None for gradient in grads)
    model.set_input_size((32, 40))
    assert_same(model(x), dynamic)
    assert torch.equal(given.prefix, before["prefix"])
    if kind == "learn":
        want = torch.stack([resample_pos_embed(rows[None], (4, 5), (H, W), 0)[0] for rows in before["patches"]])
        assert_same(given.patches, want)
        return
    for name, size in (("x", 5), ("y", 4)):
        line = before[name].mT.unsqueeze(2)  # (tables, D / 2, 1, size)
        want = F.interpolate(line, (1, size), mode="bicubic", antialias=True)[:, :, 0].mT
        assert_same(getattr(given, name), want)


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
        ({"pos_embed": "relative", "dynamic_img_size": True}, "distances in one grid: not with dynamic_img_size"),
        ({"pos_embed": "relative", "patch_drop_rate": 0.5}, "not with patch_drop_rate"),
        ({"pos_embed": "relative", "attn_layer": Attention}, "not with an attn_layer"),
        ({"pos_embed": "relative", "use_rel_pos_bias": True}, "not with biases by relative position"),
        ({"pos_embed_at": "layers", "patch_drop_rate": 0.5}, "patch_drop_rate=0.5 with pos_embed_at='layers'"),
        ({"pos_embed_at": "layers", "block_fn": nn.Identity}, "positions go with fastvit.layers' Block"),
    ):
        with pytest.raises(ValueError, match=message):
            fastvit.ViT(**{**SIZES, **options})
    model = small(pos_embed="relative")
    with pytest.raises(ValueError, match="pos_embed='relative' has keys .* build the model with the other img_s"):
        model.set_input_size(32)
    assert model(images()).shape == (2, 5)
    for options in ({"pos_embed": "relative"}, {"pos_embed": "learn_2d"}, {"pos_embed_at": "layers"}):
        with pytest.raises(ValueError, match="packed images can't pass (pos_embed|blocks.0.attn)"):
            small(**options)([torch.randn(3, 16, 16).double()])
    with pytest.raises(TypeError, match="block 0 is a Block with RelativeAttention"):
        analysis.attention_maps(model, images())


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
    assert_same(block(x, tokens=1), block(x)[:, :1])
