"""fastvit.analysis against its definitions on attention that is materialised block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fastvit
from fastvit import ViT, ops
from fastvit.analysis import attention as analysis
from fastvit.models.axial import AxialViT
from parity import randomise

SMALL: dict[str, Any] = {
    "img_size": (24, 40), "patch_size": (8, 10), "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers, qk norm, LayerScale": {"reg_tokens": 4, "qk_norm": True, "init_values": 0.5, "qkv_bias": False},
    "dropout": {"drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.3, "patch_drop_rate": 0.3},
    "rotary, dropout": {"rope": 100.0, "pos_embed": "none", "patch_drop_rate": 0.3},
    "any size": {"dynamic_img_size": True},
    "pixels": {"mean": (0.5,) * 3, "std": (0.2,) * 3},
    "relative positions": {"use_rel_pos_bias": True, "global_pool": "avg"},
    "relative positions, any size": {
        "use_rel_pos_bias": True,
        "use_shared_rel_pos_bias": True,
        "dynamic_img_size": True,
    },
}


def build(name: str) -> tuple[ViT, Tensor]:
    """A model with every parameter off its start, and two images."""
    model = ViT(**SMALL | MODELS[name])
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    size = (32, 30) if "any size" in name else (24, 40)
    images = torch.randn(2, 3, *size)
    return model, torch.randint(0, 256, images.shape, dtype=torch.uint8) if name == "pixels" else images


@contextmanager
def softmaxes(model: ViT) -> Iterator[list[Tensor]]:
    """Every block's weights (B, H, T, T) as they pass its dropout, unfused."""
    found: list[Tensor] = []
    hooks = []
    for block in model.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda _, args, __: found.append(args[0])))
    yield found
    for block, hook in zip(model.blocks, hooks, strict=True):
        block.attn.fused_attn = True
        hook.remove()


def weights(model: ViT, images: Tensor) -> list[Tensor]:
    """The same of the model in eval mode."""
    training = model.training
    with softmaxes(model) as found, torch.no_grad(), fastvit.backend("reference"):
        model.eval().forward_features(images)
    model.train(training)
    return found


def multiplied(blocks: list[Tensor]) -> Tensor:
    """Rollout's matrices (B, T, T) of all blocks."""
    product = unit = torch.eye(blocks[0].shape[-1])
    for block in blocks:
        mixed = block.mean(1) + unit
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    return product


@pytest.mark.parametrize("name", MODELS)
def test_maps_are_the_softmax(name: str) -> None:
    model, images = build(name)
    expected = torch.stack(weights(model, images))
    maps = analysis.attention_maps(model, images)
    assert maps.shape == (3, 2, 4, 1, expected.shape[-1])
    torch.testing.assert_close(maps, expected[..., :1, :], rtol=0, atol=1e-5)
    maps = analysis.attention_maps(model, images, rows=(2, -1))
    torch.testing.assert_close(maps, expected[..., [2, -1], :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize("name", MODELS)
def test_rollout_is_the_product_of_all_blocks(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "ROWS", rows)
    model, images = build(name)
    product, prefix = multiplied(weights(model, images)), model.num_prefix_tokens
    expected = product[:, prefix:].mean(1) if model.global_pool == "avg" else product[:, 0]
    found = analysis.rollout(model, images)
    torch.testing.assert_close(found.weights, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2))
    h, w = images.shape[2] // 8, images.shape[3] // 10
    assert found.grid.shape == (2, h, w)
    assert torch.equal(found.grid[:, 1, 2], found.weights[:, prefix + w + 2])


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({}, range(1)),
        ({"distilled": True}, range(2)),
        ({"global_pool": "avg"}, range(3, 15)),
        ({"global_pool": "avg", "pool_include_prefix": True}, range(15)),
        ({"global_pool": "max"}, range(3, 15)),
        ({"global_pool": "avgmax", "class_token": False}, range(2, 14)),
        ({"global_pool": ""}, range(15)),
    ],
)
def test_rollout_starts_from_what_the_head_reads(options: dict[str, Any], read: range) -> None:
    model = randomise(ViT(**SMALL | {"reg_tokens": 2} | options)).eval()
    images = torch.randn(2, 3, 24, 40)
    expected = multiplied(weights(model, images))[:, list(read)].mean(1)
    torch.testing.assert_close(analysis.rollout(model, images).weights, expected, rtol=0, atol=1e-5)
    if "max" not in model.global_pool:  # which reads another token in each feature
        tokens = model.forward_features(images).detach().requires_grad_()
        model.forward_head(tokens).square().sum().backward()
        assert tokens.grad is not None and tokens.grad[0].any(-1).nonzero().flatten().tolist() == list(read)


@pytest.mark.parametrize(("pool", "class_token"), [("map", True), ("prr", True), ("prr", False)])
def test_rollout_starts_from_what_an_attention_pool_reads(pool: str, class_token: bool) -> None:
    model = randomise(ViT(**SMALL, reg_tokens=2, global_pool=pool, class_token=class_token)).eval()
    images, attn = torch.randn(2, 3, 24, 40), model.attn_pool
    tokens = model.forward_features(images).detach()
    if pool == "map":
        query, keys = attn.q(attn.latent).expand(2, -1, -1), attn.kv(tokens[:, 3:])[..., :32]
    else:
        query, keys = tokens[:, : 1 if class_token else None], tokens
    query, keys = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (query, keys))
    start = (query @ keys.mT / 8**0.5).softmax(-1).mean((1, 2))
    start = nn.functional.pad(start, (tokens.shape[1] - start.shape[1], 0))
    expected = (start[:, None] @ multiplied(weights(model, images)))[:, 0]
    torch.testing.assert_close(analysis.rollout(model, images).weights, expected, rtol=0, atol=1e-5)
    model.attn_pool = nn.Identity()
    with pytest.raises(TypeError, match="the pool is a Identity; accepted"):
        analysis.rollout(model, images)


def test_distance_and_rollout_are_those_of_one_pass() -> None:
    model, images = build("registers, qk norm, LayerScale")
    model.double()
    passes: list[Any] = []
    model.patch_embed.register_forward_pre_hook(lambda *_: passes.append(None))
    distance, rollout = analysis.distance_and_rollout(model, images.double())
    assert len(passes) == 1 and rollout.weights.dtype == distance.dtype == torch.float64
    assert torch.equal(distance, analysis.mean_attention_distance(model, images.double()))
    assert torch.equal(rollout.weights, analysis.rollout(model, images.double()).weights)


@pytest.mark.parametrize("name", MODELS)
def test_mean_attention_distance_is_in_pixels(name: str) -> None:
    """Patches of 8 by 10 pixels: two beside each other are 10 apart, one below the other 8."""
    model, images = build(name)
    h, w, prefix = images.shape[2] // 8, images.shape[3] // 10, model.num_prefix_tokens
    centres = [(8 * y, 10 * x) for y in range(h) for x in range(w)]
    distance = torch.tensor([[math.dist(a, b) for b in centres] for a in centres])
    expected = [(block[..., prefix:, prefix:] * distance).sum(-1).mean(-1) for block in weights(model, images)]
    found = analysis.mean_attention_distance(model, images)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    """Its modes, its weights and its gradients; dropout in training is not drawn."""
    model, images = build("dropout")
    model.train()
    model.blocks[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for look in (analysis.attention_maps, analysis.rollout, analysis.mean_attention_distance):
        first, again = look(model, images), look(model, images)
        for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (first, again)), strict=True):
            assert torch.equal(a, b) and not a.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("shared", [False, True])
def test_timms_beit_is_looked_into(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three of its own weights, which its attention materialises: with its indices and its sum of biases."""
    monkeypatch.setattr(analysis, "ROWS", 5)
    options = SMALL | {"use_rel_pos_bias": not shared, "use_shared_rel_pos_bias": shared, "global_pool": "token"}
    theirs, ours = randomise(timm.models.beit.Beit(**options)).eval(), ViT(**options)
    with torch.no_grad():
        for name, table in theirs.named_parameters():
            if name.endswith("bias_table"):
                table.normal_()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 24, 40)
    with softmaxes(theirs) as found, torch.no_grad():
        theirs.forward_features(images)
    maps = analysis.attention_maps(ours, images, rows=range(13))
    torch.testing.assert_close(maps, torch.stack(found), rtol=0, atol=1e-5)
    torch.testing.assert_close(analysis.rollout(ours, images).weights, multiplied(found)[:, 0], rtol=0, atol=1e-5)
    centres = torch.cartesian_prod(torch.tensor([4.0, 12.0, 20.0]), torch.tensor([5.0, 15.0, 25.0, 35.0]))
    distance = (centres[:, None] - centres).norm(dim=-1)
    expected = torch.stack([(block[..., 1:, 1:] * distance).sum(-1).mean(-1) for block in found])
    torch.testing.assert_close(analysis.mean_attention_distance(ours, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("look", "name", "rows"),
    [("rollout", "class token", 13), ("rollout", "relative positions", 13),
     ("mean_attention_distance", "relative positions", 12)],
)  # fmt: skip
def test_at_most_ROWS_rows_are_in_memory(look: str, name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of T x T is in memory: the largest piece of weights has ROWS rows."""
    monkeypatch.setattr(analysis, "ROWS", 3)
    seen: list[int] = []
    op = ops.attention_rows
    monkeypatch.setattr(ops, "attention_rows", lambda *a, **kw: (seen.append(len(a[3])), op(*a, **kw))[1])
    getattr(analysis, look)(*build(name))
    assert max(seen) == 3 and sum(seen) == 3 * rows


def test_what_is_refused() -> None:
    model, images = build("class token")
    with pytest.raises(ValueError, match=r"rows \[13\]; accepted: from -13 to 12"):
        analysis.attention_maps(model, images, rows=(0, 13))
    model.blocks[1].attn = nn.Identity()
    with pytest.raises(TypeError, match="block 1 is a Block with Identity for its attention; accepted"):
        analysis.rollout(model, images)
    axial = AxialViT(**SMALL)
    with pytest.raises(TypeError, match="attention along rows and columns has no map of T x T weights"):
        analysis.mean_attention_distance(axial, images)


def test_filters_are_the_principal_components() -> None:
    model = ViT(**SMALL)
    weight = model.patch_embed.proj.weight.detach()
    filters = analysis.patch_filters(model, 12)
    assert filters.shape == (12, *weight.shape[1:])
    centred = weight.flatten(1).double() - weight.flatten(1).double().mean(0)
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors
    for i, component in enumerate(filters.flatten(1).double()):
        expected = vectors[:, -1 - i]
        torch.testing.assert_close(component, expected * (component @ expected).sign(), rtol=0, atol=1e-4)
        assert component.max() == component.abs().max()
    assert len(analysis.patch_filters(model, 1000)) == 32  # 32 filters
    with pytest.raises(ValueError, match="count: 0; accepted: 1 or more"):
        analysis.patch_filters(model, 0)


@pytest.mark.parametrize("prefix", [{}, {"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}])
def test_similarity_is_of_patches(prefix: dict[str, Any]) -> None:
    model = ViT(**SMALL | prefix)
    nn.init.normal_(model.pos_embed)
    found = analysis.position_similarity(model)
    patches = model.pos_embed[0, -12:].unflatten(0, (3, 4))
    for here in ((0, 0), (2, 1)):
        expected = nn.functional.cosine_similarity(patches[here], patches, dim=-1)
        torch.testing.assert_close(found[here], expected)


@pytest.mark.parametrize("kind", ["learn", "learn_2d"])
@pytest.mark.parametrize(("place", "tables"), [("layers", 3), ("shared", 1)])
def test_similarity_of_positions_that_blocks_add(kind: str, place: str, tables: int) -> None:
    model = ViT(**SMALL, pos_embed=kind, pos_embed_at=place)
    for block, table in enumerate(model.layer_pos_embed((3, 4))[:, 1:].detach()):
        expected = nn.functional.cosine_similarity(table[:, None], table, dim=-1).view(3, 4, 3, 4)
        torch.testing.assert_close(analysis.position_similarity(model, block), expected)
    with pytest.raises(ValueError, match=f"block {tables} has no .* of its own; accepted: 0 to {tables - 1}"):
        analysis.position_similarity(model, tables)


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        ({}, "no positions at all"),
        ({"rope": 100.0}, "queries and keys turned by position"),
        ({"use_shared_rel_pos_bias": True}, "biases by relative position"),
        ({"pos_embed": "relative"}, "relative position keys"),
    ],
)
def test_positions_of_another_kind_are_named(options: dict[str, Any], instead: str) -> None:
    model = ViT(**SMALL | {"pos_embed": "none"} | options)
    with pytest.raises(ValueError, match=f"no position embeddings are added to the tokens; the model has {instead}"):
        analysis.position_similarity(model)
