"""Axial-ViT and AxialResNet against their definitions in plain PyTorch, and their FLOPs against the closed forms."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit.checkpoints import convert, load_checkpoint
from fastvit.layers import Attention, Block, DropPath, TokenContext
from fastvit.layers.axial import AxialAttention
from fastvit.models.axial import AxialAttention2d, AxialResNet, AxialViT, AxisAttention
from fastvit.resnet import ResNetV2
from fastvit.tuning import flops
from parity import Calls, assert_same, gradients, randomise

SIZES: dict[str, Any] = {
    "img_size": (16, 24), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5,
}  # fmt: skip


def small(**options: Any) -> AxialViT:
    return randomise(AxialViT(**{**SIZES, **options})).double()  # type: ignore[return-value]


# -- Axial-ViT ---------------------------------------------------------------------------------------------------


def plain_block(x: Tensor, block: Block, columns: bool) -> Tensor:
    """Equations 2 and 3 on a grid x (B, h, w, D), each attention along one axis of it."""
    normed = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6)
    attn = block.attn
    q, k, v = F.linear(normed, attn.qkv.weight, attn.qkv.bias).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    scores = torch.einsum("bywhd,bzwhd->bwhyz" if columns else "byxhd,byzhd->byhxz", q, k)
    weights = (scores / attn.head_dim**0.5).softmax(-1)
    out = torch.einsum("bwhyz,bzwhd->bywhd" if columns else "byhxz,byzhd->byxhd", weights, v)
    x = x + attn.proj(out.flatten(3))
    normed = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-6)
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(normed)))


def plain(model: AxialViT, images: Tensor) -> Tensor:
    """D.5: "instead of a self-attention followed by an MLP" a row- and a column-attention, an MLP after each."""
    embed = model.patch_embed.proj
    x = F.conv2d(images, embed.weight, embed.bias, stride=8).permute(0, 2, 3, 1)
    x = x + model.pos_embed.view(1, *x.shape[1:])
    for block in model.blocks:
        x = plain_block(plain_block(x, block.row, False), block.column, True)
    x = x.mean((1, 2))
    return model.head(F.layer_norm(x, x.shape[-1:], model.fc_norm.weight, model.fc_norm.bias, 1e-6))


def test_axial_vit_is_its_definition() -> None:
    model, x = small(), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    for backend in ("reference", "auto"):
        with fastvit.backend(backend):
            got, want = model(x), plain(model, x)
            assert_same(got, want)
            assert_same(gradients(model, got), gradients(model, want))


def test_a_block_is_eight_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, residuals and all: as two plain blocks, with attention over rows and columns as batches."""
    model, calls = small(depth=1).float(), Calls(monkeypatch)
    model(torch.randn(2, 3, 16, 24))
    block = ["linear", "attention_qkvpacked", "linear", "mlp"]
    assert calls.names == ["patch_embed", *block, *block, "layer_norm", "linear"]
    seen = [shape[:2] for name, shape, _ in calls.made if name == "attention_qkvpacked"]
    assert seen == [(2 * 2, 3), (2 * 3, 2)]


@pytest.mark.parametrize("opened", ["hook", "attribute", "qk_norm", "wrapped"])
def test_attention_that_is_not_plain(opened: str) -> None:
    """Weights open to hooks, norms of heads: the same numbers as a block of one row has in plain attention."""
    options: dict[str, Any] = {"qk_norm": opened == "qk_norm"}
    model, x, seen = small(img_size=(8, 24), **options), torch.randn(2, 3, 8, 24, dtype=torch.float64), []
    line = Block(32, 2, qkv_bias=True, **options).double()
    line.load_state_dict(model.blocks[0].row.state_dict())
    tokens = model.patch_embed(x)
    want, attn = line(tokens), model.blocks[0].row.attn
    if opened == "hook":
        attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    elif opened == "attribute":
        attn.fused_attn = False
    elif opened == "wrapped":
        attn.qkv = nn.Sequential(attn.qkv)
    assert_same(model.blocks[0].row(tokens, context=TokenContext(window=(1, 3))), want)
    assert [tuple(weights.shape) for weights in seen] == ([(2, 2, 3, 3)] if opened == "hook" else [])


def test_drop_path_drops_whole_images() -> None:
    model = small(drop_path_rate=0.5, depth=1)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.5
    model.blocks[0].row.drop_path1 = DropPath(0.5)
    x = torch.randn(16, 6, 32, dtype=torch.float64)
    row = model.blocks[0].row.train()
    row.mlp.fc2.weight.data.zero_()
    row.mlp.fc2.bias.data.zero_()
    changed = (row(x, context=TokenContext(window=(2, 3))) != x).any(-1)
    assert torch.equal(changed.any(1), changed.all(1)) and 0 < changed.any(1).sum() < 16


def test_arguments_that_axial_vit_refuses() -> None:
    for options, message in (
        ({"class_token": True}, "class_token=True can't be with it"),
        ({"reg_tokens": 2}, "reg_tokens=2"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate=0.5"),
        ({"rope": 100.0}, "rope=100.0"),
        ({"fix_init": True}, "fix_init=True"),
        ({"distilled": True}, "distilled=True"),
        ({"global_pool": "token"}, "global_pool='token' reads the class token"),
        ({"attn_layer": Attention}, "attn_layer .* in an axial block; accepted: AxialAttention"),
        ({"pos_embed": "relative"}, "accepted: AxialAttention"),
        ({"pos_embed_at": "layers"}, "blocks.0 is a AxialBlock"),
        ({"use_rel_pos_bias": True}, "class_token must be True"),
    ):
        with pytest.raises(ValueError, match=message):
            AxialViT(**{**SIZES, **options})
    model, x = small(), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    for options in ({"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="one grid of patches, and no mask"):
            model(x, **options)
    with pytest.raises(ValueError, match="packed images can't pass blocks: rows and columns are those of one grid"):
        model(list(x))
    with pytest.raises(ValueError, match="takes one grid of patches"):
        AxialAttention(32, 2)(torch.randn(2, 6, 32))


def test_names(tmp_path: Path) -> None:
    with torch.device("meta"):
        for paper, name in (
            ("Axial-ViT-B/16", "axial_vit_base_patch16_224"),
            ("Axial-ViT-B/32", "axial_vit_base_patch32"),
        ):
            model = fastvit.create_model(paper)
            assert type(model) is AxialViT and str(model) == str(fastvit.create_model(name))
            assert (model.embed_dim, len(model.blocks), model.num_prefix_tokens) == (768, 12, 0)
        assert fastvit.create_model("Axial-ViT-B/16-384").patch_embed.grid_size == (24, 24)
        assert type(fastvit.create_model("ViT-B/16")) is fastvit.ViT
        resnet = fastvit.create_model("axial_resnet50", num_classes=3)
        assert type(resnet) is AxialResNet and resnet.get_classifier().out_channels == 3
    names = set(fastvit.list_models("axial"))
    assert {"axial_vit_base_patch16_224", "axial_vit_base_patch32_224", "axial_resnet50"} <= names
    assert names - {"axial_resnet50"} <= {f"axial_{name}" for name in fastvit.list_models("vit_*")}
    with pytest.raises(ValueError, match="unknown model 'axial_vit_base_patch7_224'; .*axial_vit_base_patch16_224"):
        fastvit.create_model("axial_vit_base_patch7_224")
    with pytest.raises(ValueError, match="npz files are for ViTs"):
        fastvit.create_model("axial_resnet50", checkpoint_path=tmp_path / "r.npz")


def test_files(tmp_path: Path) -> None:
    """The class is read off them, with the architecture; other sizes are resampled."""
    model, x = small(img_size=32, init_values=0.1), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    convert(model.state_dict(), tmp_path / "axial.safetensors")
    again = fastvit.from_checkpoint(tmp_path / "axial.safetensors", num_heads=2, dtype=torch.float64)
    assert type(again) is AxialViT and again.state_dict().keys() == model.state_dict().keys()
    assert_same(again(x), model(x))
    other, y = small(init_values=0.1), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    load_checkpoint(other, tmp_path / "axial.safetensors")
    model.set_input_size((16, 24))
    assert_same(other(y), model(y))
    state = small(img_size=32).state_dict()
    del state["blocks.1.column.norm2.bias"]
    with pytest.raises(ValueError, match="the file has no blocks.1.column.norm2.bias"):
        fastvit.from_checkpoint(state, num_heads=2)
    with pytest.raises(ValueError, match="the file has no blocks.0.attn"):
        load_checkpoint(fastvit.ViT(**SIZES, class_token=False, global_pool="avg"), model.state_dict())


# -- AxialResNet -------------------------------------------------------------------------------------------------


def plain_line(x: Tensor, attention: AxisAttention) -> Tensor:
    """Each line of x (N, n, C) by itself, each pair of its positions with the key of its distance."""
    n, heads = x.shape[1], attention.num_heads
    q, k, v = F.linear(x, attention.qkv.weight).unflatten(-1, (3, heads, -1)).unbind(2)
    at = torch.arange(n)
    keys = attention.rel_pos_keys[at[:, None] - at + attention.length - 1]  # (n, n, d) of query i and key j
    scores = torch.einsum("nihd,njhd->nhij", q, k) + torch.einsum("nihd,ijd->nhij", q, keys)
    return torch.einsum("nhij,njhd->nihd", (scores / q.shape[-1] ** 0.5).softmax(-1), v).flatten(2)


def plain_axial(x: Tensor, module: AxialAttention2d) -> Tensor:
    b, c, h, w = x.shape
    columns = x.permute(0, 3, 2, 1).reshape(b * w, h, c)
    x = plain_line(columns, module.column).view(b, w, h, c).permute(0, 3, 2, 1)
    rows = x.permute(0, 2, 3, 1).reshape(b * h, w, c)
    x = plain_line(rows, module.row).view(b, h, w, c).permute(0, 3, 1, 2)
    s = module.stride
    parts = [[x[:, :, i : i + s, j : j + s].mean((2, 3)) for j in range(0, w, s)] for i in range(0, h, s)]
    return torch.stack([torch.stack(row, -1) for row in parts], -2)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(5, 4), (3, 4), (1, 1)], ids=str)
def test_what_stands_for_a_convolution(size: tuple[int, int], stride: int) -> None:
    """At the largest size, where the last mean is of one row of positions, and at smaller ones."""
    module = AxialAttention2d(16, (5, 4), stride, num_heads=2).double()
    x = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    got, want = module(x), plain_axial(x, module)
    assert got.shape == (2, 16, -(-size[0] // stride), -(-size[1] // stride))
    assert_same(got, want)
    inputs = [x, *module.parameters()]
    assert_same(*(torch.autograd.grad(out.square().sum(), inputs) for out in (got, want)))


def tiny(**options: Any) -> AxialResNet:
    return AxialResNet((1, 1, 2, 1), **{"img_size": (48, 64), "num_classes": 5, **options})


def test_an_axial_resnet_is_a_resnet_without_3x3_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain_resnet = tiny().double(), ResNetV2((1, 1, 2, 1), num_classes=5).double()
    assert not [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    own = {key: value for key, value in model.state_dict().items() if ".conv2." not in key}
    plain_resnet.load_state_dict(own, strict=False)
    for stage, other in zip(model.stages, plain_resnet.stages, strict=True):
        for block, target in zip(stage.blocks, other.blocks, strict=True):
            monkeypatch.setattr(target.conv2, "forward", partial(plain_axial, module=block.conv2))
    for size in ((48, 64), (33, 50)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        got = model(x)
        assert_same(got, plain_resnet(x))
        assert all(gradient is not None for gradient in gradients(model, got))
    runs = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        out = model(x)
        runs.append([out, *gradients(model, out)])
    assert_same(*runs)


def test_images_larger_than_the_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="a line of 13 positions has distances without a key; accepted: up to 12"):
        tiny()(torch.randn(1, 3, 52, 64))
    with pytest.raises(ValueError, match="num_heads=7 does not divide embed_dim=64"):
        tiny(num_heads=7)
    with pytest.raises(ValueError, match="img_size"):
        tiny(img_size=0)


def test_weights_start_anew() -> None:
    model = tiny()
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.init_weights()
    assert not [name for name, parameter in model.named_parameters() if parameter.isnan().any()]


# -- FLOPs -------------------------------------------------------------------------------------------------------


def vit_flops(grid: int, patch: int, width: int = 768, depth: int = 12, mlp: int = 3072, classes: int = 1000) -> int:
    """Of 2 ``depth`` blocks on N = grid^2 tokens, each of which meets those of its line: grid, and not N."""
    n = grid * grid
    block = n * (3 * width * width + 2 * grid * width + width * width + 2 * width * mlp)
    return 2 * (n * 3 * patch * patch * width + 2 * depth * block + width * classes)


@pytest.mark.parametrize("patch", [16, 32])
def test_flops_of_axial_vit(patch: int) -> None:
    """More than the plain ViT's, as figure 12 says: in each pair one more MLP and its own projections."""
    with torch.device("meta"):
        models = [fastvit.create_model(f"{kind}ViT-B/{patch}") for kind in ("Axial-", "")]
    found, plain_vit = (flops.count(model) for model in models)
    assert found.forward == vit_flops(224 // patch, patch)
    assert 1.8 < found.forward / plain_vit.forward < 2


def resnet_flops(layers: tuple[int, ...], height: int, width: int, classes: int) -> int:
    """Of the stem, the 1x1 convolutions, and on P positions two projections P C 3C and attention along h and w.

    Attention with n keys is 2 n C of each position, and its distances' scores (2 n - 1) C: the counter's definition
    multiplies a query with the keys of all distances.
    """
    h, w = -(-height // 4), -(-width // 4)
    total = 3 * 49 * 64 * -(-height // 2) * -(-width // 2)
    before = 64
    for i, depth in enumerate(layers):
        after, c = 256 * 2**i, 64 * 2**i
        for j in range(depth):
            p = h * w
            total += p * before * c  # the first convolution
            total += 2 * p * 3 * c * c + sum(p * (2 * n * c + (2 * n - 1) * c) for n in (h, w))
            if i > 0 and j == 0:
                h, w = -(-h // 2), -(-w // 2)
            total += h * w * c * after + (h * w * before * after if j == 0 else 0)
            before = after
    return 2 * (total + before * classes)


def test_flops_of_axial_resnet() -> None:
    found = flops.count(tiny(), image_size=(48, 64)).forward
    assert found == resnet_flops((1, 1, 2, 1), 48, 64, 5)
    with torch.device("meta"):
        model = fastvit.create_model("axial_resnet50")
    assert flops.count(model).forward == resnet_flops((3, 4, 6, 3), 224, 224, 1000)
