"""Masks, attention dropout and dropped patches in a model: on the ops, and the same as on opened weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import ViT, ops
from fastvit.layers import Attention
from fastvit.reference import dropout_factor

T, D, H = 7, 32, 2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The arguments of every call of the attention ops."""
    seen: list[dict[str, Any]] = []

    def spied(op: Any) -> Any:
        def spy(*args: Any, **options: Any) -> Any:
            seen.append({"shape": args[0].shape, **options})
            return op(*args, **options)

        return spy

    for name in ("attention", "attention_qkvpacked"):
        monkeypatch.setattr(ops, name, spied(getattr(ops, name)))
    yield seen


def _attention(**options: Any) -> tuple[Attention, Tensor]:
    return Attention(D, H, qkv_bias=True, **options).double(), torch.randn(3, T, D, dtype=torch.float64)


_KEPT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0, 1], [1, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
MASKS: dict[str, tuple[str, Tensor]] = {
    "keys of each image": ("key_mask", _KEPT[:, None, None]),
    "keys of all images": ("key_mask", _KEPT[1:2]),
    "lower triangle": ("bias", torch.ones(T, T, dtype=torch.bool).tril()),
    "of each image": ("bias", _KEPT[:, None, None] & torch.ones(T, T, dtype=torch.bool).tril()),
    "a bias": ("bias", torch.randn(T, T, dtype=torch.float64)),
    "a bias of each head": ("bias", torch.randn(3, H, T, T, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_masks_run_on_the_op(name: str, qk_norm: bool, calls: list[dict[str, Any]]) -> None:
    kind, mask = MASKS[name]
    attn, x = _attention(qk_norm=qk_norm, norm_layer=torch.nn.LayerNorm)
    opened = copy.deepcopy(attn)
    opened.fused_attn = False
    runs = []
    for module in (attn, opened):
        leaves = [x.clone().requires_grad_(), mask.clone().requires_grad_(mask.is_floating_point())]
        out = module(leaves[0], attn_mask=leaves[1])
        leaves += module.parameters()
        runs.append([out, *torch.autograd.grad(out.square().sum(), [leaf for leaf in leaves if leaf.requires_grad])])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert len(calls) == 1 and kind in calls[0]


def test_causal_attention_is_pytorchs(calls: list[dict[str, Any]]) -> None:
    attn, x = _attention()
    triangle = torch.ones(T, T, dtype=torch.bool).tril()
    torch.testing.assert_close(attn(x, is_causal=True), attn(x, attn_mask=triangle), rtol=1e-9, atol=1e-11)
    assert len(calls) == 1


def test_a_key_mask_leaves_what_is_left_without_the_others() -> None:
    """A masked model gives each image the tokens of its kept patches alone."""
    model = ViT(img_size=16, patch_size=4, embed_dim=D, depth=2, num_heads=H, num_classes=3).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    kept = torch.ones(2, 17, dtype=torch.bool)
    kept[0, 9:], kept[1, 5:11] = False, False
    tokens = model.embed(images)[0]
    want = [model.blocks(tokens[i : i + 1, kept[i]])[:, 0] for i in range(2)]
    got = model.forward_features(images, attn_mask=kept[:, None, None])[:, 0]
    torch.testing.assert_close(got, model.norm(torch.cat(want)), rtol=1e-9, atol=1e-11)


def test_dropout_is_the_ops_and_is_drawn_again(calls: list[dict[str, Any]]) -> None:
    attn, x = _attention(attn_drop=0.4)
    attn.train()
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(attn(x))
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])
    assert all(call["dropout_p"] == 0.4 and call["seed"].dtype == torch.int64 for call in calls)
    attn.eval()
    attn(x)
    assert "dropout_p" not in calls[-1]
    mean = torch.stack([attn.train()(x) for _ in range(150)]).mean(0)
    torch.testing.assert_close(mean, attn.eval()(x), rtol=0, atol=0.1)


def test_dropout_drops_what_the_definition_says(calls: list[dict[str, Any]]) -> None:
    attn, x = _attention(attn_drop=0.4)
    out = attn.train()(x)
    image, i, j = torch.arange(3).view(-1, 1, 1, 1), torch.arange(T)[:, None], torch.arange(T)
    factor = dropout_factor(calls[0]["seed"], 0.4, H, image, i, j)
    q, k, v = attn.qkv(x).unflatten(-1, (3, H, D // H)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * attn.scale).softmax(-1) * factor
    torch.testing.assert_close(out, attn.proj((weights @ v).transpose(1, 2).flatten(2)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rate", "hooked"), [(0.5, True), (1.0, True), (1.0, False)])
def test_dropout_outside_of_the_op(rate: float, hooked: bool, calls: list[dict[str, Any]]) -> None:
    """A hook on attn_drop sees the weights; and a rate of one, which no op takes, drops everything."""
    attn, x = _attention(attn_drop=rate)
    seen: list[torch.Size] = []
    if hooked:
        attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    out = attn.train()(x)
    assert seen == [(3, H, T, T)] * hooked and not calls
    assert rate < 1.0 or torch.equal(out, attn.proj.bias.expand_as(out))


def test_dropped_patches_leave_the_fused_path(calls: list[dict[str, Any]]) -> None:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": D, "depth": 2, "num_heads": H, "num_classes": 3}
    model = ViT(**sizes, patch_drop_rate=0.5, reg_tokens=2).train()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert [call["shape"] for call in calls][:1] == [(2, 3 + 8, 3, H, D // H)]  # packed qkv of half the patches
    assert all(p.grad is not None for p in model.parameters())
