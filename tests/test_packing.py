"""Images of any sizes in one batch: packed, a ViT gives what it gives for each image alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from fastvit import PackedImages, ViT, layers, pack
from fastvit.layers.resample import resample_pos_embed, resample_pos_embed_at
from fastvit.ops import backends
from fastvit.packing import Sequences
from fastvit.tuning import compile_report
from parity import assert_same

MIX = ((8, 12), (16, 16), (4, 4), (20, 28), (16, 4))  # 6, 16, 1, 35 and 4 patches of 4x4
STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


def small(dtype: torch.dtype = torch.float64, **options: Any) -> ViT:
    """A model for 16x16 images in which every parameter matters."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = ViT(**(sizes | options))
    with torch.no_grad():
        for p in model.parameters():  # the zero-initialised ones would hide what multiplies them
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval().to(dtype)


def mix(dtype: torch.dtype = torch.float64, sizes: tuple[tuple[int, int], ...] = MIX) -> list[Tensor]:
    return [torch.randn(3, *size, dtype=dtype) for size in sizes]


def alone(
    model: ViT, method: str, images: list[Tensor], call: dict[str, Any] | None = None, **options: Any
) -> list[Any]:
    """What the model makes of each image by itself, with any size allowed."""
    any_size = small(model.head.weight.dtype, **options, dynamic_img_size=True).train(model.training)
    for name, parameter in model.named_parameters():  # the same ones, so that they get the gradients
        owner, _, leaf = name.rpartition(".")
        setattr(any_size.get_submodule(owner), leaf, parameter)
    return [getattr(any_size, method)(image.unsqueeze(0), **(call or {})) for image in images]


def gradients(model: ViT, y: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), parameters)
    return list(found)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 2},
    "positions of patches only": {"no_embed_class": True, "reg_tokens": 1},
    "no positions": {"pos_embed": "none"},
    "average, no class token": {"class_token": False, "global_pool": "avg"},
    "average": {"global_pool": "avg"},
    "maximum": {"global_pool": "max"},
    "both, with prefix": {"global_pool": "avgmax", "pool_include_prefix": True},
    "map": {"global_pool": "map"},
    "prr": {"global_pool": "prr"},
    "prr, no class token": {"global_pool": "prr", "class_token": False},
    "qk-norm, LayerScale": {"qk_norm": True, "init_values": 0.3},
    "pre-norm": {"pre_norm": True},
    "embedding with a norm": {"embed_norm_layer": nn.LayerNorm},
    "oblong": {"img_size": (8, 20), "patch_size": (4, 2)},
    "relative positions": {"use_rel_pos_bias": True, "img_size": (8, 20), "patch_size": (4, 2)},
    "relative positions of all kinds": {"use_shared_rel_pos_bias": True, "rope": 100.0, "qk_norm": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_tokens_and_gradients_are_those_of_each_image_alone(name: str) -> None:
    options, images = OPTIONS[name], mix()
    model = small(**options)
    logits, tokens = model(images), model.forward_features(images)
    assert logits.shape == (len(MIX), 5)
    want = torch.cat(alone(model, "forward", images, **options))
    torch.testing.assert_close(logits, want, rtol=1e-12, atol=1e-12)
    each = torch.cat(alone(model, "forward_features", images, **options), dim=1)
    torch.testing.assert_close(tokens, each, rtol=1e-12, atol=1e-12)
    assert_same(gradients(model, logits), gradients(model, want))


@pytest.mark.parametrize("layout", ["chw", "hwc"])
@pytest.mark.parametrize("hooked", [False, True])
def test_uint8(layout: str, hooked: bool) -> None:
    model = small(**STATISTICS)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in MIX]
    want = torch.cat(alone(model, "forward", images, **STATISTICS))
    if hooked:
        model.patch_embed.register_forward_hook(lambda *_: None)
    batch = [image.permute(1, 2, 0) if layout == "hwc" else image for image in images]
    torch.testing.assert_close(model(batch), want, rtol=1e-6, atol=1e-6)  # mean and std are float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_padding_to_whole_patches(dtype: torch.dtype) -> None:
    options = {"dynamic_img_size": True, "dynamic_img_pad": True, **STATISTICS}
    model = small(**options)
    sizes = ((7, 13), (16, 16), (1, 5))
    if dtype == torch.uint8:
        images = [torch.randint(0, 256, (3, *size), dtype=dtype) for size in sizes]
    else:
        images = mix(sizes=sizes)
    want = torch.cat([model(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(model(images), want, rtol=1e-6, atol=1e-6)


def test_image_gradients() -> None:
    model = small()
    images = [image.requires_grad_() for image in mix()]
    ours = torch.autograd.grad(model(images).square().sum(), images)
    theirs = torch.autograd.grad(torch.cat(alone(model, "forward", images)).square().sum(), images)
    assert_same(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "init_values": 0.5}], ids=str)
@pytest.mark.parametrize("hooked", [False, True])
def test_drop_path_drops_whole_images(options: dict[str, Any], hooked: bool) -> None:
    """Random numbers are drawn an image, so that images of one size lose what they lose as a tensor."""
    model = small(drop_path_rate=0.5, **options).train()
    if hooked:
        model.blocks[1].drop_path2.register_forward_hook(lambda *_: None)
        model.blocks[1].ls1.register_forward_hook(lambda *_: None)
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    runs = []
    for batch in (images, list(images)):
        torch.manual_seed(5)
        logits = model(batch)
        runs.append([logits, *gradients(model, logits)])
    assert_same(*runs)


@pytest.mark.parametrize(
    "hooked", ["blocks.0", "blocks.1.attn", "blocks.0.attn.qkv", "blocks.1.mlp", "patch_embed.proj"]
)
def test_hooks_see_the_packed_tokens_and_change_nothing(hooked: str) -> None:
    model, images, seen = small(), mix(), []
    want = model(images)
    model.get_submodule(hooked).register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(model(images), want, rtol=1e-12, atol=1e-12)
    assert len(seen) == 1 and (hooked == "patch_embed.proj" or seen[0][:2] == (1, 62 + len(MIX)))


def test_intermediates() -> None:
    model, images = small(reg_tokens=1), mix()
    final, taken = model.forward_intermediates(images, 2, return_prefix_tokens=True, output_fmt="NLC", norm=True)
    with_options = {"indices": 2, "return_prefix_tokens": True, "output_fmt": "NLC", "norm": True}
    each = [found for _, found in alone(model, "forward_intermediates", images, reg_tokens=1, call=with_options)]
    for i, (patches, prefix) in enumerate(taken):
        torch.testing.assert_close(patches, torch.cat([one[i][0] for one in each], dim=1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(prefix, torch.cat([one[i][1] for one in each]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, model.forward_features(images))
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(images)


@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (3, 9), (13, 2), (8, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positions_are_resampled_as_for_one_image(grid: tuple[int, int], dtype: torch.dtype) -> None:
    old = (4, 5)
    pos_embed = torch.randn(1, 2 + 20, 8, dtype=dtype).requires_grad_()
    packed = pack([torch.zeros(3, 2 * grid[0], 3 * grid[1]), torch.zeros(3, 2, 6)], (2, 3))
    ours = resample_pos_embed_at(pos_embed, packed.layout, (2, 3), old, 2)[: grid[0] * grid[1]]
    theirs = resample_pos_embed(pos_embed, grid, old, 2)[0, 2:]
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    assert grid != old or torch.equal(ours, theirs)
    up = torch.randn_like(ours)
    a, b = (torch.autograd.grad(y, pos_embed, up)[0] for y in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=10 * tolerance)


def test_new_positions_are_seen_at_once() -> None:
    """Nothing is kept of the positions between calls."""
    model, images = small(), mix()
    with torch.no_grad():
        before = model(images)
        model.pos_embed.data.mul_(2.0)
        want = torch.cat(alone(model, "forward", images))
        torch.testing.assert_close(model(images), want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before, want)


# -- what it costs ------------------------------------------------------------------------------------------------


def naflex_mix() -> list[tuple[int, int]]:
    """Images of 96 to 512 pixels a side, in five aspect ratios, in whole patches of 16."""
    aspects = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))
    sizes = []
    for longest in (96, 160, 224, 320, 416, 512):
        for h, w in aspects:
            sizes.append(tuple(max(round(longest * side / max(h, w) / 16), 1) * 16 for side in (h, w)))
    return sizes


def test_flops_are_those_of_the_tokens_there_are() -> None:
    """By count, at ViT-S's proportions: packed, alone, and padded to the largest as a tensor of one size would be."""
    model = small(torch.float32, img_size=224, patch_size=16, embed_dim=64, depth=2, num_heads=2)
    sizes = naflex_mix()
    images = mix(torch.float32, tuple(sizes))

    def flops(run: Any) -> int:
        # The reference with gradients multiplies matrices, which are counted; PyTorch's fused attention isn't on CPUs.
        with fastvit.backend("reference"), FlopCounterMode(display=False) as counter, compile_report.without_notes():
            run()
        return counter.get_total_flops()

    packed = flops(lambda: model(images))
    each = flops(lambda: alone(model, "forward", images, img_size=224, patch_size=16, embed_dim=64, num_heads=2))
    largest = torch.zeros(1, 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    padded = len(sizes) * flops(
        lambda: alone(model, "forward", [largest[0]], img_size=224, patch_size=16, embed_dim=64, num_heads=2)
    )
    print(f"packed / alone {packed / each:.4f}, padded / alone {padded / each:.2f}")
    assert each <= packed <= 1.05 * each
    assert padded > 2.5 * each


@pytest.mark.slow
def test_time_is_that_of_the_tokens_there_are() -> None:
    """On this CPU: packed images take less than half the time of the same images padded to the largest."""
    options = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 4, "num_heads": 6}
    model = small(torch.float32, **options)
    images = mix(torch.float32, tuple(naflex_mix()[::3]))
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    times = []
    with torch.no_grad():
        for run in (lambda: model(images), lambda: model(padded)):
            run()
            each = []
            for _ in range(3):
                start = time.perf_counter()
                run()
                each.append(time.perf_counter() - start)
            times.append(min(each))
    print(f"packed {times[0]:.2f} s, padded {times[1]:.2f} s")
    assert times[0] < 0.5 * times[1]


@pytest.mark.parametrize("training", [False, True])
def test_launches_do_not_grow_with_the_images(training: bool) -> None:
    """On meta tensors there is nothing to wait for or to look at: sizes are read on the host by pack alone.

    (With enough tokens that every weight's gradient is split among programs, and the parts then summed.)
    """
    model = small(torch.bfloat16, global_pool="avg").to("meta").train(training)
    counts = []
    for sizes in (MIX * 7, MIX * 31, ((64, 64), (4, 400))):
        packed = pack(mix(torch.bfloat16, sizes), 4).to("meta")
        model.zero_grad()  # to add to gradients would count too
        with compile_report.trace(80) as trace, torch.set_grad_enabled(training):
            logits = model(packed)
            if training:
                logits.sum().backward()
        counts.append(trace.count)
    assert len(set(counts)) == 1, counts


def test_launches_of_tables_grow_with_the_sizes_alone() -> None:
    """One call of attention for each size that there is, and none of the others more."""
    model = small(torch.bfloat16, use_rel_pos_bias=True).to("meta")
    counts = []
    for sizes in (MIX[:2] * 40, MIX[:2] * 80, MIX * 40):
        packed = pack(mix(torch.bfloat16, sizes), 4).to("meta")
        with compile_report.trace(80) as trace, torch.no_grad():
            model(packed)
        counts.append([trace.count, sum(one.kernel.fn.__name__.startswith("attention") for one in trace.launches)])
    assert counts[0] == counts[1] and counts[0][1] == 2 * 2 and counts[2][1] == 5 * 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pool": "avg"},
        {"global_pool": "map"},
        {"patch_drop_rate": 0.5},
        {"patch_drop_rate": 0.5, "rope": 100.0},
        {"use_rel_pos_bias": True},  # a call of attention for each size: compiled for each mix
    ],
    ids=str,
)
def test_compiles_once_for_every_mix(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    tables = "use_rel_pos_bias" in options
    model = small(torch.float32, depth=1, **options).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    mixes = ((MIX[0], MIX[1], MIX[0]), MIX[:2]) if tables else (MIX, MIX[1:], ((40, 8), (8, 8)) * 4)
    for i, sizes in enumerate(mixes):
        packed, runs = pack(mix(torch.float32, sizes), 4), []
        for run in (compiled, model):
            torch.manual_seed(5)
            with torch._dynamo.config.patch(error_on_recompile=i > 0 and not tables and run is compiled):
                runs.append(run(packed))
        torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)
        for a, b in zip(*(gradients(model, y) for y in runs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# -- patch dropout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prob", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_patch_dropout_keeps_prefixes_and_each_images_share(prefix: int, prob: float) -> None:
    counts = [1, 2, 9, 40, 7, 196]
    starts = torch.tensor([0, *counts]).cumsum(0).int() + prefix * torch.arange(len(counts) + 1, dtype=torch.int32)
    total = int(starts[-1])
    before = Sequences.of(starts, max(counts) + prefix, total)
    drop = layers.PatchDropout(prob, prefix).train()
    seen = set()
    for _ in range(3):
        y, after, index = drop.of_packed(torch.arange(total).float().view(1, -1, 1), before)
        kept = y[0, :, 0].long()
        assert index is None or torch.equal(index, kept)
        assert len(kept) == len(kept.unique()) == int(after.cu_seqlens[-1]) == after.image.shape[0]
        for i, count in enumerate(counts):
            own = kept[after.cu_seqlens[i] : after.cu_seqlens[i + 1]]
            assert (before.image[own] == i).all() and (
                after.image[after.cu_seqlens[i] : after.cu_seqlens[i + 1]] == i
            ).all()
            assert torch.equal(own[:prefix], torch.arange(prefix) + starts[i])
            left = len(own) - prefix
            assert left >= 1 and abs(left - (1 + (count - 1) * (1 - prob))) <= 1
            assert after.longest >= len(own)
        seen.add(tuple(kept.tolist()))
    assert len(seen) == (3 if prob else 1)
    unchanged = drop.eval().of_packed(y, after)
    assert unchanged[0] is y and unchanged[1] is after and unchanged[2] is None


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}, {"global_pool": "map"}], ids=str
)
def test_dropped_patches_are_as_if_each_image_had_lost_them_alone(options: dict[str, Any]) -> None:
    model, packed = small(**options, patch_drop_rate=0.5), pack(mix(), 4)
    where = packed.sequences(model.num_prefix_tokens)
    numbers = torch.arange(where.image.shape[0]).double().view(1, -1, 1)
    model.train()
    torch.manual_seed(5)
    logits = model(packed)
    torch.manual_seed(5)
    kept, after, _ = model.patch_drop.of_packed(numbers, where)
    model.eval()
    assert model.embed(packed)[0].shape[1] > kept.shape[1]

    alone = []
    for i in range(len(MIX)):
        own = kept[0, after.cu_seqlens[i] : after.cu_seqlens[i + 1], 0].long()
        tokens = model.embed(packed)[0][:, own]
        alone.append(model.forward_head(model.norm(model.blocks(tokens))))
    torch.testing.assert_close(logits, torch.cat(alone))
    assert_same(gradients(model, logits), gradients(model, torch.cat(alone)))


def test_tokens_with_other_sequences_are_refused() -> None:
    model, packed = small(torch.float32, patch_drop_rate=0.5).train(), pack(mix(torch.float32), 4)
    tokens = model.forward_features(packed)
    with pytest.raises(ValueError, match=r"38 tokens with sequences of 67; where patches are dropped in training"):
        model.forward_head(tokens, sequences=packed.sequences(model.num_prefix_tokens))


# -- PackedImages and Sequences -----------------------------------------------------------------------------------


def test_packed_images() -> None:
    images = mix(torch.float32)
    packed = pack(images, (4, 4))
    assert len(packed) == 5 and packed.max_patches == 35 and packed.layout.cu_patches.tolist() == [0, 6, 22, 23, 58, 62]
    assert repr(packed) == "PackedImages(5 images, 62 patches of 4x4, torch.float32, cpu)"
    patches, first = packed.patches(), 0
    for image in images:
        grid = image.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert torch.equal(patches[first : first + len(grid)], grid)
        first += len(grid)
    assert torch.equal(packed.with_patches(patches).pixels, packed.pixels)
    assert packed.to("meta").device.type == "meta" and packed.to("meta").layout.row.is_meta
    leaves, spec = torch.utils._pytree.tree_flatten(packed)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, PackedImages) and again.patch_size == (4, 4) and torch.equal(again.pixels, packed.pixels)
    assert again.grids == packed.grids == packed.to("meta").grids == ((2, 3), (4, 4), (1, 1), (5, 7), (4, 1))


def test_sequences() -> None:
    packed = pack(mix(torch.float32, ((8, 4), (4, 4))), 4)
    sequences = packed.sequences(2)
    assert sequences.cu_seqlens.tolist() == [0, 4, 7] and sequences.longest == 4
    assert sequences.image.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert sequences.leading_tokens(2).tolist() == [0, 1, 4, 5]
    first = sequences.leading(2)
    assert (first.cu_seqlens.tolist(), first.longest, first.image.tolist()) == ([0, 2, 4], 2, [0, 0, 1, 1])
    rest, tokens = sequences.without(2)
    assert (rest.cu_seqlens.tolist(), rest.longest, rest.image.tolist()) == ([0, 2, 3], 2, [0, 0, 1])
    assert tokens.tolist() == packed.layout.patch_tokens(2).tolist() == [2, 3, 6]
    assert packed.layout.prefix_tokens(2).tolist() == [[0, 1], [4, 5]]
    assert isinstance(rest, Sequences)


# -- bad input ----------------------------------------------------------------------------------------------------

Z = torch.zeros


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "no images to pack"),
        ([Z(3, 8, 8), Z(3, 8, 10)], {}, "image 1 is 8x10, not divisible by the patch 4x4.*pad=True"),
        ([Z(3, 8, 8), Z(1, 8, 8)], {}, r"image 1 has shape \(1, 8, 8\); expected \(3, H, W\)"),
        ([Z(8, 8)], {}, r"image 0 has shape \(8, 8\); expected \(3, H, W\)"),
        ([Z(3, 8, 8), Z(3, 8, 8).half()], {}, "image 1 is torch.float16 on cpu, image 0 is torch.float32 on cpu"),
        ([Z(3, 8, 8), Z(3, 8, 8, device="meta")], {}, "image 1 is torch.float32 on meta, image 0"),
        ([Z(3, 8, 8).int()], {}, "image 0 has dtype torch.int32; accepted: floating point"),
        ([Z(3, 0, 8)], {}, "image 0 is 0x8: it is empty"),
        ([Z(3, 8, 9).byte()], {"pad": True}, "image 0 is 8x9, not divisible.*only floating images"),
        (
            [Z(3, 1, 1).expand(3, 2**15, 2**15)],
            {},
            r"image 0 is 32768x32768 with 3 channels; accepted: fewer than 2\^31",
        ),
    ],
)
def test_images_that_cannot_be_packed(images: list[Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(images, 4, **options)


def put(path: str, value: Any, *, hooked: bool = False) -> Callable[[ViT], None]:
    """Return the change of a model that sets an attribute, in training, of a module with a hook."""

    def change(model: ViT) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value)
        if hooked:
            value.register_forward_hook(lambda *_: None)
        model.train()

    return change


def other_embedding(model: ViT) -> None:
    model.patch_embed = nn.Sequential()
    model.patch_embed.dynamic_img_pad, model.patch_embed.patch_size = False, (4, 4)


def dropped_elsewhere(model: ViT) -> None:
    put("patch_drop", layers.PatchDropout(0.5))(model)
    model.forward_features = model.forward_features  # as good as overridden


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("blocks.1.attn", nn.Identity()), "can't pass blocks.1.attn: Identity is no fastvit.layers.Attention"),
        (put("blocks.1", nn.Identity()), "can't pass blocks.1: Identity is no fastvit.layers.Block"),
        (other_embedding, "can't pass patch_embed: Sequential is no fastvit.layers.PatchEmbed"),
        (put("blocks.0.attn.fused_attn", False), "fused_attn True"),
        (put("blocks.0.attn.attn_drop", nn.Dropout(0.0), hooked=True), "attn_drop without hooks"),
        (put("patch_drop", nn.Dropout(0.5)), "can't pass patch_drop: Dropout is no fastvit.layers.PatchDropout"),
        (put("patch_drop", layers.PatchDropout(0.5), hooked=True), "can't pass patch_drop: it has hooks"),
        (dropped_elsewhere, "can't pass patch_drop: forward_features is overridden"),
        (put("blocks.0.drop_path1", nn.Dropout(0.1)), "can't pass blocks.0.drop_path1: Dropout is no fastvit.layers"),
    ],
)
def test_modules_that_cannot_tell_images_apart_are_named(change: Any, message: str) -> None:
    model = small(torch.float32)
    change(model)
    with pytest.raises(ValueError, match=message):
        model(mix(torch.float32))


def test_overridden_positions_are_named() -> None:
    class Other(ViT):
        def _pos_embed(self, x: Tensor) -> Tensor:
            return x

    model = Other(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="can't pass _pos_embed: it is overridden"):
        model(mix(torch.float32))


def test_other_bad_input_to_the_model() -> None:
    model, images = small(torch.float32), mix(torch.float32)
    with pytest.raises(ValueError, match="image 1 is 8x9, not divisible by the patch 4x4"):
        model([Z(3, 8, 8), Z(3, 8, 9)])
    with pytest.raises(ValueError, match="uint8 images need the model's mean"):
        model([Z(3, 8, 8).byte()])
    with pytest.raises(ValueError, match="no attn_mask"):
        model(images, attn_mask=torch.ones(1, 1, 1, 67, dtype=torch.bool))
    with pytest.raises(ValueError, match="no attn_mask or is_causal"):
        model(images, is_causal=True)
    with pytest.raises(ValueError, match=r"weight has shape \(32, 3, 4, 4\).*patches of 2x2"):
        model(pack(images, 2))
    op, packed, weight = fastvit.ops.patch_embed_packed, pack(images, 4), model.patch_embed.proj.weight
    with pytest.raises(ValueError, match=r"pos_embed has shape \(3, 32\), expected \(62, 32\)"):
        op(packed, weight, pos_embed=Z(3, 32))
    with pytest.raises(ValueError, match="packed is a Tensor; fastvit.pack makes"):
        op(images[0], weight)
    with pytest.raises(ValueError, match="images have dtype torch.int32"):
        op(replace(packed, pixels=packed.pixels.int()), weight)
    assert backends.setting() == "auto"
