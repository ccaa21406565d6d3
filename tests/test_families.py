"""DINOv3, BEiT, distilled DeiT, hybrids and so on in all that a ViT does: what other parts must not break."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit import ops
from fastvit.analysis import attention as analysis
from fastvit.layers import BeitAttention, PatchDropout, SwiGLU, TokenContext
from fastvit.models import ViT
from fastvit.models.hybrid import HybridEmbed
from fastvit.tuning import flops
from parity import Calls, assert_same, gradients

SIZES: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "num_classes": 5}
FAMILIES: dict[str, dict[str, Any]] = {
    "plain, SwiGLU": {"name": "vit_small_patch16_224", "mlp_layer": SwiGLU},
    "DINOv3": {"name": "vit_small_patch16_dinov3_qkvb"},
    "DINOv3, class token": {"name": "vit_small_plus_patch16_dinov3_qkvb", "global_pool": "token"},
    "rope in a plain ViT": {"name": "vit_small_patch16_224", "rope": 100.0, "pos_embed": "none"},
    "BEiT": {"name": "beit_base_patch16_224"},
    "BEiT, shared table": {
        "name": "beitv2_base_patch16_224", "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True,
    },
    "BEiT, both, class token": {
        "name": "beit_large_patch16_384", "use_shared_rel_pos_bias": True, "global_pool": "token", "depth": 2,
    },
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "distilled, registers": {"name": "deit_tiny_distilled_patch16_224", "reg_tokens": 2, "no_embed_class": True},
    "hybrid": {
        "name": "vit_base_r50_s16_224", "embed_layer": partial(HybridEmbed, layers=(1, 1)), "patch_size": 1,
    },
    "hybrid, a stem alone": {"name": "vit_tiny_r_s16_p8_224", "patch_size": 2},
    "positions by axis": {"name": "vit_small_patch16_224", "pos_embed": "learn_2d"},
    "positions by axis, shared": {"name": "vit_small_patch16_224", "pos_embed": "learn_2d", "pos_embed_at": "shared"},
    "positions in layers": {
        "name": "vit_small_patch16_224", "pos_embed_at": "layers", "reg_tokens": 2, "no_embed_class": True,
    },
    "relative": {"name": "vit_small_patch16_224", "pos_embed": "relative"},
    "axial": {"name": "axial_vit_base_patch16_224"},
}  # fmt: skip
TABLES = [family for family in FAMILIES if "BEiT" in family]
TURNED = [family for family in FAMILIES if "DINOv3" in family or "rope" in family]
MIX = ((32, 32), (48, 24), (8, 16), (32, 32), (48, 24))
PACKED = [family for family in FAMILIES if not family.startswith(("hybrid", "positions", "relative", "axial"))]
ONE_ATTENTION = [family for family in FAMILIES if family != "axial"]  # in a block
ANY_SIZE = [family for family in FAMILIES if family != "relative"]


def small(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> ViT:
    """A small model with weights that all matter."""
    model = fastvit.create_model(**{"img_size": 32, **SIZES, **FAMILIES[family], **options}).to(dtype)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def images(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, *(size or (32, 32)), dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_is_training_without_gradients(family: str) -> None:
    model, x = small(family, torch.float32).eval(), images(dtype=torch.float32)
    want = model(x).detach()
    for without in (torch.no_grad, torch.inference_mode):  # on packed weights
        with without():
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert model(x).requires_grad  # and nothing of inference mode is left


@pytest.mark.parametrize("family", ANY_SIZE)
def test_a_batch_of_sizes(family: str) -> None:
    """With dynamic_img_size another size gives what a model built for it gives."""
    model = small(family, dynamic_img_size=True).eval()
    for size in ((32, 32), (48, 24)):
        x, other = images(*size), copy.deepcopy(model)
        other.set_input_size(size)
        assert_same(model(x), other(x))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("family", PACKED)
def test_packed_images_are_each_alone(family: str, fixed: bool) -> None:
    """Of sizes in any order, in models that as a tensor take any size, or only their own."""
    model = small(family, dynamic_img_size=True)
    mix = [torch.randn(3, *size, dtype=torch.float64) for size in MIX]
    alone = torch.cat([model(image[None]) for image in mix])
    other = small(family, dynamic_img_size=not fixed)
    other.load_state_dict(model.state_dict())
    out, want = other(mix), gradients(model, alone)
    assert_same(out, alone)
    assert_same(gradients(other, out), want)
    other.set_grad_checkpointing()
    assert_same(gradients(other, other(mix)), want)


@pytest.mark.parametrize("family", TABLES)
def test_packed_images_of_one_size_are_a_batch(family: str) -> None:
    """With the same dropout; and of several sizes each draws its own."""
    model, x, runs = small(family, attn_drop_rate=0.4, drop_path_rate=0.3), images(), []
    for batch in (x, list(x)):
        torch.manual_seed(3)
        out = model(batch)
        runs.append([out, *gradients(model, out)])
    assert_same(*runs)
    seeds: list[int] = []
    for block in model.blocks:
        fused = block.attn._fused

        def spied(op: Any, heads: Any, *rest: Any, fused: Any = fused) -> Tensor:
            def seen(*args: Any, **options: Any) -> Any:
                seeds.append(options["seed"].item())
                return op(*args, **options)

            return fused(seen, heads, *rest)

        block.attn._fused = spied
    model([torch.randn(3, *size, dtype=torch.float64) for size in MIX])
    assert len(seeds) == len(set(seeds)) == 3 * len(model.blocks)


@pytest.mark.parametrize("hooked", ["attn", "attn.qkv", "attn.proj", "mlp", "norm1"])
@pytest.mark.parametrize("family", TABLES)
def test_hooks_see_packed_images_in_their_order(family: str, hooked: str) -> None:
    model, mix, seen = small(family), [torch.randn(3, *size, dtype=torch.float64) for size in MIX], []
    want, total = model(mix), sum(1 + h * w // 64 for h, w in MIX)
    for block in model.blocks:
        block.get_submodule(hooked).register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2]))
    assert_same(model(mix), want)
    assert seen == [(1, total)] * len(model.blocks)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", TURNED)
def test_patches_that_stay_keep_their_angles(family: str, packed: bool) -> None:
    """Dropping patches in training is masking them as keys in the whole image, of which the others are read."""
    model = small(family, dynamic_img_size=True, patch_drop_rate=0.5)
    prefix = model.num_prefix_tokens
    mix = [torch.randn(3, *size, dtype=torch.float64) for size in (MIX if packed else ((48, 24),) * 3)]
    batch = fastvit.pack(mix, 8) if packed else torch.stack(mix)
    torch.manual_seed(4)
    got = model.forward_features(batch)
    torch.manual_seed(4)
    if isinstance(batch, Tensor):
        stay = model.patch_drop.draw(torch.empty(3, prefix + 18, 1))
        kept = [torch.cat([torch.arange(prefix), prefix + own]) for own in stay]
        got = got.flatten(0, 1)[None]
    else:
        where = batch.sequences(prefix)
        _, after, index = model.patch_drop.of_packed(torch.empty(1, len(where.image), 1), where)
        kept = [index[after.image == i] - where.cu_seqlens[i] for i in range(len(mix))]
    model.eval()
    want = []
    for image, own in zip(mix, kept, strict=True):
        mask = torch.zeros(prefix + image[0].numel() // 64, dtype=torch.bool)
        mask[own] = True
        assert prefix < len(own) and (image.shape[1] == 8 or not mask.all())
        want.append(model.forward_features(image[None], attn_mask=mask[None, None, None])[:, own])
    assert_same(got, torch.cat(want, dim=1))
    assert_same(gradients(model, got), gradients(model, torch.cat(want, dim=1)))


def test_patch_dropout_of_another_class_is_refused_with_rope() -> None:
    model = small("DINOv3")
    model.patch_drop = nn.Dropout(0.5)
    with pytest.raises(ValueError, match="patch_drop is a Dropout; accepted with rope: fastvit.layers.PatchDropout"):
        model(images())


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_head_after_features(family: str) -> None:
    """Also where the last block works for the tokens that are read alone."""
    model, x = small(family), images()
    want = model.forward_head(model.forward_features(x))
    assert_same(model(x), want)
    assert_same(gradients(model, model(x)), gradients(model, want))


def test_the_last_block_works_for_the_tokens_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("DINOv3, class token")
    calls = Calls(monkeypatch)
    model(images())
    assert calls.names == [
        "patch_embed", *["linear", "rotate", "attention", "linear", "mlp"] * 2, "layer_norm", "linear",
    ]  # fmt: skip
    assert [shape[1] for name, shape, _ in calls.made if name == "mlp"] == [21, 1]
    calls.made.clear()
    small("distilled")(images())
    assert [shape[1] for name, shape, _ in calls.made if name == "mlp"] == [18, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing(family: str) -> None:
    model, x, runs = small(family), images(), []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        out = model(x)
        runs.append([out, *gradients(model, out)])
    assert_same(*runs)
    assert all(gradient is not None for gradient in runs[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_intermediates(family: str) -> None:
    model, x = small(family).eval(), images()
    final, (first, last) = model.forward_intermediates(x, norm=True, output_fmt="NLC")
    assert_same(final, model.forward_features(x))
    assert_same(last, final[:, model.num_prefix_tokens :])
    kept = model.forward_intermediates(x, [0], output_fmt="NCHW", intermediates_only=True)
    model.prune_intermediate_layers([0])
    assert_same(kept, model.forward_intermediates(x, [0], intermediates_only=True))
    assert kept[0].shape == (2, 32, 4, 4) and first.shape == (2, 16, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_pickles_and_dtypes(family: str) -> None:
    model, x = small(family).eval(), images()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(twin(x), model(x))
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    single, bound = copy.deepcopy(model).float(), 0.1 * model(x).abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = single(x.float())
    assert all((out.double() - model(x)).abs().max() <= bound for out in (half, mixed))


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_in_one_graph(family: str) -> None:
    torch._dynamo.reset()
    model, x = small(family, torch.float32, dynamic_img_size=family in ANY_SIZE), images(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if model.pos_embed is None and not family.startswith(
        ("positions", "relative")
    ):  # PyTorch can't differentiate a resampling of dynamic size
        other = images(48, 24, dtype=torch.float32)
        torch.testing.assert_close(compiled(other), model(other), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(model, compiled(x)), gradients(model, model(x)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_exports_and_traces(family: str, dynamic: bool) -> None:
    dynamic = dynamic and family in ANY_SIZE
    model, x = small(family, dynamic_img_size=dynamic).eval(), images()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=9)},))
    assert_same(program.module()(x[:1]), model(x[:1]))
    traced = torch.fx.symbolic_trace(model, concrete_args={"attn_mask": None, "is_causal": False})
    for size in ((32, 32), (48, 24)) if dynamic else ((32, 32),):
        x = images(*size)
        assert_same(traced(x, None, False), model(x))
    assert_same(gradients(model, traced(x, None, False)), gradients(model, model(x)))


@pytest.mark.parametrize("hooked", ["attn", "attn.qkv", "attn.attn_drop", "attn.proj", "mlp", "norm1", "blocks"])
@pytest.mark.parametrize("family", ONE_ATTENTION)
def test_hooks_change_nothing(family: str, hooked: str) -> None:
    model, x, seen = small(family), images(), []
    want = model(x)
    modules = [block.get_submodule(hooked) for block in model.blocks] if hooked != "blocks" else [model.blocks]
    for module in modules:
        module.register_forward_hook(lambda *_: seen.append(1))
    got = model(x)
    assert len(seen) == len(modules)
    assert_same(got, want)
    assert_same(gradients(model, got), gradients(model, want))


@pytest.mark.parametrize("masked", ["bool", "keys", "float", "causal"])
@pytest.mark.parametrize("family", ONE_ATTENTION)
def test_masks(family: str, masked: str) -> None:
    """A mask beside the family's own positions: the weights that are opened to hooks are the judge."""
    model, x = small(family).eval(), images()
    tokens = model.num_prefix_tokens + 16
    keep = torch.rand(tokens, tokens) > 0.4
    keep.fill_diagonal_(True)
    mask: dict[str, Any] = {
        "bool": {"attn_mask": keep},
        "keys": {"attn_mask": (torch.arange(tokens) % 3 != 1).view(1, 1, 1, -1).expand(2, -1, -1, -1)},
        "float": {"attn_mask": torch.randn(tokens, tokens, dtype=torch.float64)},
        "causal": {"is_causal": True},
    }[masked]
    got = model(x, **mask)
    if masked == "causal":
        assert_same(got, model(x, attn_mask=torch.ones(tokens, tokens, dtype=torch.bool).tril()))
    for block in model.blocks:
        block.attn.fused_attn = False
    assert_same(got, model(x, **mask))
    assert (got - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ONE_ATTENTION)
def test_analysis_turns_the_heads_and_adds_the_tables(family: str) -> None:
    """Maps are the softmax of what a hook on the opened weights sees."""
    model, x, seen = small(family).eval(), images(), []
    maps = analysis.attention_maps(model, x, rows=range(model.num_prefix_tokens + 16))
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model.forward_features(x)
    torch.testing.assert_close(maps.double(), torch.stack(seen), rtol=1e-5, atol=1e-6)
    grid, prefix = analysis._grid(model, x), model.num_prefix_tokens
    side = 32 // grid[0]
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) * side for n in grid))
    want = (maps[..., prefix:, prefix:].double() * torch.cdist(places, places)).sum(-1).mean(-1)
    torch.testing.assert_close(analysis.mean_attention_distance(model, x).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_counted_by_part(family: str) -> None:
    found = flops.count(small(family), training=True)
    assert sum(found.parts.values()) == found.forward and {"patch_embed", "blocks", "head"} <= set(found.parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_start_anew(family: str) -> None:
    """init_weights gives every parameter a value, as after to_empty."""
    torch.manual_seed(0)
    model = small(family)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.init_weights()
    assert not [name for name, parameter in model.named_parameters() if parameter.isnan().any()]


def test_arguments_that_exclude_biases_by_relative_position() -> None:
    model = small("BEiT")
    model.patch_drop = PatchDropout(0.5)
    with pytest.raises(ValueError, match="packed images can't pass patch_drop: biases by relative position are for wh"):
        model([torch.randn(3, 32, 32, dtype=torch.float64)])
    with pytest.raises(ValueError, match="9 queries and 9 keys; a rel_pos_table of 52 rows for a window of 4x4"):
        model(images())
    for options, message in (
        ({"reg_tokens": 2}, "class_token must be True and reg_tokens 0, got True and 2"),
        ({"class_token": False}, "class_token must be True and reg_tokens 0, got False and 0"),
        ({"patch_drop_rate": 0.25}, "patch_drop_rate=0.25: .* accepted: 0"),
        ({"block_fn": nn.TransformerEncoderLayer}, "unexpected keyword"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            small("BEiT", **options)


def test_few_queries_of_attention_without_a_key_bias() -> None:
    attention = BeitAttention(32, 2, qkv_bias=True).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    assert_same(attention.branch(x, context=TokenContext(keep=2)), attention(x)[:, :2])
    q, k, v = attention.qkv(x).chunk(3, -1)
    q, v = q + attention.q_bias, v + attention.v_bias
    heads = [t.unflatten(-1, (2, 16)) for t in (q, k, v)]
    assert_same(attention(x), attention.proj(ops.attention(*heads).flatten(2)))
