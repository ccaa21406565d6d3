"""Other libraries' live models on fused ops: the same results, parameters and names, and all of it undone again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastvit
from fastvit import ops
from fastvit.integrations.accelerate import report, restore
from fastvit.integrations.transformers import register
from fastvit.layers import Attention, Block, LayerNorm, Mlp

TIMM = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 7}
HF = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    "intermediate_size": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 32, 32)


def vit(**options: Any) -> Any:
    return timm.models.vision_transformer.VisionTransformer(**TIMM | options)


def hf(config: Any, model: Any, **options: Any) -> Any:
    return model(config(**HF | options))


MODELS: dict[str, Callable[[], Any]] = {
    "timm ViT": vit,
    "timm LayerScale, registers": lambda: vit(init_values=0.1, reg_tokens=2, no_embed_class=True),
    "timm average": lambda: vit(global_pool="avg", qk_norm=True, scale_mlp_norm=True),
    "timm map": lambda: vit(global_pool="map", class_token=False),
    "timm gated": lambda: vit(mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU),
    "timm dynamic": lambda: vit(dynamic_img_size=True, pre_norm=True),
    "timm DeiT": lambda: timm.models.deit.VisionTransformerDistilled(**TIMM),
    "timm BEiT": lambda: timm.models.beit.Beit(
        **TIMM, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1
    ),
    "timm BEiT, shared": lambda: timm.models.beit.Beit(**TIMM, use_shared_rel_pos_bias=True),
    "timm Swin": lambda: timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=7,
        drop_path_rate=0.0,
    ),
    "torchvision": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 128, num_classes=7),
    "transformers ViT": lambda: hf(transformers.ViTConfig, transformers.ViTForImageClassification),
    "transformers DeiT": lambda: hf(transformers.DeiTConfig, transformers.DeiTForImageClassification),
    "transformers BEiT": lambda: hf(
        transformers.BeitConfig, transformers.BeitForImageClassification, use_relative_position_bias=True,
        drop_path_rate=0.0,
    ),
    "transformers DINOv2": lambda: hf(transformers.Dinov2Config, transformers.Dinov2Model),
    "transformers CLIP": lambda: hf(transformers.CLIPVisionConfig, transformers.CLIPVisionModelWithProjection),
    "transformers SigLIP": lambda: hf(transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
}  # fmt: skip


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 or not parameter.any():  # tables and heads begin at zero
                parameter.copy_(0.05 * torch.randn_like(parameter))
    return model


def run(model: Any, images: Tensor = IMAGES) -> Tensor:
    out = model(images)
    if isinstance(out, Tensor):
        return out
    if isinstance(out, tuple):
        return torch.cat(out)
    found: Tensor = next(out[key] for key in ("logits", "image_embeds", "pooler_output") if key in out)
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    run(model).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_results_parameters_and_names(name: str, training: bool) -> None:
    model = build(name).train(training)
    before, wanted = run(model).detach(), gradients(model)
    names, places = list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    kinds = [type(module) for module in model.modules()]

    assert fastvit.accelerate(model) is model
    found = report(model)
    assert found.replaced, "nothing was replaced"
    assert list(model.state_dict()) == names and [p.data_ptr() for p in model.parameters()] == places
    torch.testing.assert_close(run(model), before, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(run(model), before, atol=2e-5, rtol=1e-4)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[key], atol=2e-4, rtol=1e-3)

    assert restore(model) is model
    assert [type(module) for module in model.modules()] == kinds
    assert not report(model).replaced
    assert torch.equal(run(model), before)


def test_what_is_replaced_and_left_is_printed() -> None:
    model = fastvit.accelerate(vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock))
    text = str(report(model))
    assert "replaced:    1 timm.models.vision_transformer.VisionTransformer" in text
    assert "left: blocks.0: its class is not one that is fused" in text
    assert not report(fastvit.accelerate(vit())).left
    assert set(report(fastvit.accelerate(build("torchvision"))).left) == {""}  # the model, which holds the blocks
    assert "attention: fastvit" in str(report(fastvit.accelerate(build("transformers ViT"))))


def test_a_fused_model_calls_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once for each branch: no module runs on its own."""
    called = []
    for op in ("patch_embed", "linear", "attention_qkvpacked", "attention", "mlp"):
        right = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *a, op=op, right=right, **kw: called.append(op) or right(*a, **kw))
    fastvit.accelerate(vit().eval())(IMAGES)
    block = ["linear", "attention_qkvpacked", "linear", "mlp"]
    last = ["linear", "linear", "attention", "linear", "mlp"]  # for the class token alone
    assert called == ["patch_embed", *block, *last, "linear"]
    called.clear()
    fastvit.accelerate(build("torchvision").eval())(IMAGES)
    assert called == 2 * block


def _hook(model: Any) -> str:
    model.blocks[1].attn.qkv.register_forward_hook(lambda *args: None)
    return "blocks.1.attn.qkv: it has hooks"


def _hook_block(model: Any) -> str:
    model.blocks[1].register_forward_hook(lambda *args: None)
    return "blocks.1: it has hooks"


def _wrap(model: Any) -> str:
    class LoRA(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.low = base, nn.Linear(64, 192, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.base(x) + self.low(x)
            return out

    model.blocks[1].attn.qkv = LoRA(model.blocks[1].attn.qkv)
    return ""


def _parametrise(model: Any) -> str:
    parametrizations.weight_norm(model.blocks[1].mlp.fc1)
    return "blocks.1.mlp.fc1: its class is not one that is fused"


def _replace_forward(model: Any) -> str:
    mlp = model.blocks[1].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
    return "blocks.1.mlp: its forward was replaced"


@pytest.mark.parametrize("change", [_hook, _hook_block, _wrap, _parametrise, _replace_forward])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_what_is_watched_or_changed_runs_as_it_is(change: Callable[[Any], str], late: bool) -> None:
    """Whether it was so when the model was accelerated, or became so later."""
    model = build("timm ViT").eval()
    other = copy.deepcopy(model)
    if late:
        fastvit.accelerate(model)
    torch.manual_seed(1)
    said = change(model)
    torch.manual_seed(1)
    change(other)
    if not late:
        fastvit.accelerate(model)
        assert said in str(report(model))
        assert type(model.blocks[0]) is Block
    torch.testing.assert_close(model(IMAGES), other(IMAGES), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("timm ViT", "blocks.1.norm2"),
        ("torchvision", "encoder.layers.encoder_layer_1.self_attention"),
        ("torchvision", "encoder.layers.encoder_layer_1.mlp"),
        ("torchvision", "encoder.layers.encoder_layer_1.mlp.0"),
    ],
)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_hook_sees_what_it_saw_before(name: str, module: str, late: bool) -> None:
    model, seen = build(name).eval(), []

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(out if isinstance(out, Tensor) else out[0])

    watched = model.get_submodule(module)
    handle = watched.register_forward_hook(hook)
    model(IMAGES)
    if late:
        handle.remove()
        fastvit.accelerate(model)
        watched.register_forward_hook(hook)
    else:
        fastvit.accelerate(model)
    model(IMAGES)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1], atol=2e-5, rtol=1e-4)


def test_dropout_after_torchvisions_attention() -> None:
    """With everything dropped, training has one result."""
    model = build("torchvision").train()
    for layer in model.encoder.layers:
        layer.dropout = nn.Dropout(1.0)
    expected = model(IMAGES)
    torch.testing.assert_close(fastvit.accelerate(model)(IMAGES), expected, atol=2e-5, rtol=1e-4)


def test_what_the_fused_class_lacks_is_named() -> None:
    odd = vit()
    odd.blocks[0].attn.gate = nn.Identity()
    assert "left: blocks.0.attn: its gate is Identity()" in str(report(fastvit.accelerate(odd)))
    pool = vit(global_pool="map", class_token=False)
    pool.attn_pool = timm.layers.AttentionPoolLatent(64, num_heads=2, qk_norm=True, norm_layer=nn.LayerNorm)
    assert "left: attn_pool: its q_norm is LayerNorm" in str(report(fastvit.accelerate(pool)))
    assert type(odd.blocks[0].attn) is timm.layers.Attention and type(odd.blocks[1].attn) is Attention


def test_a_copy_shares_the_parameters_and_leaves_the_model() -> None:
    model = build("timm ViT").eval()
    fast = fastvit.accelerate(model, copy=True)
    assert type(fast) is fastvit.ViT and type(model) is timm.models.vision_transformer.VisionTransformer
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        model.head.bias.add_(1)
    torch.testing.assert_close(fast(IMAGES), model(IMAGES), atol=2e-5, rtol=1e-4)


def test_twice_is_once_and_a_new_part_is_taken_in_the_second_time() -> None:
    model = fastvit.accelerate(fastvit.accelerate(build("timm ViT")))
    model.blocks[0] = timm.models.vision_transformer.Block(64, 2)
    assert "blocks.0: accelerate() has not been called since it is there" in str(report(model))
    fastvit.accelerate(model)
    assert type(model.blocks[0]) is Block
    restore(model)
    assert type(model.blocks[1]) is timm.models.vision_transformer.Block


def test_copies_pickles_and_compiles() -> None:
    model = fastvit.accelerate(build("timm ViT").eval())
    expected = model(IMAGES)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(IMAGES), expected)
        assert type(restore(other)) is timm.models.vision_transformer.VisionTransformer
        torch.testing.assert_close(other(IMAGES), expected, atol=2e-5, rtol=1e-4)
    for name in ("timm ViT", "torchvision", "transformers ViT"):
        torch._dynamo.reset()
        model = fastvit.accelerate(build(name).eval())
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(run(compiled), run(model), atol=2e-5, rtol=1e-4)


# --- transformers' attn_implementation --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("transformers")])
def test_our_attention_is_sdpas(name: str) -> None:
    """Outputs and gradients, with hidden states asked for."""
    model = build(name).eval()
    register()
    results = {}
    for implementation in ("sdpa", "fastvit"):
        model.set_attn_implementation(implementation)
        out = model(IMAGES, output_hidden_states=True)
        results[implementation] = (*out.hidden_states, *gradients(model).values())
    assert model.config._attn_implementation == "fastvit"
    for ours, theirs in zip(results["fastvit"], results["sdpa"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


def test_masks_reach_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of a text tower: of keys, and causal ones."""
    config = transformers.CLIPTextConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=50
    )
    model = transformers.CLIPTextModel(config).eval()
    tokens, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    runs = {}
    for implementation in ("sdpa", register()):
        model.set_attn_implementation(implementation)
        runs[implementation] = [model(tokens, attention_mask=m).last_hidden_state for m in (mask, None)]
    for ours, theirs in zip(*runs.values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)

    q, k, v = torch.randn(3, 2, 2, 9, 32).unbind(0)
    masks = {"keys": mask.bool()[:, None, None], "pairs": torch.rand(2, 1, 9, 9) < 0.8, "bias": torch.randn(1, 2, 9, 9)}
    from fastvit.integrations.transformers import attention

    for name, one in masks.items():
        ours, _ = attention(nn.Module(), q, k, v, one, scaling=0.3, is_causal=False)
        theirs = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=one, scale=0.3).transpose(1, 2)
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4, msg=name)


def test_weights_that_are_asked_for_and_dropout() -> None:
    model = build("transformers ViT").eval()
    model.set_attn_implementation(register())
    assert model(IMAGES, output_hidden_states=True).attentions is None
    model = hf(transformers.ViTConfig, transformers.ViTForImageClassification, attention_probs_dropout_prob=0.5).train()
    fastvit.accelerate(model)
    assert not torch.equal(run(model), run(model))
    assert torch.equal(run(model.eval()), run(model))


def test_norms_and_mlps_of_any_model() -> None:
    """A network that nobody knows keeps what it is; the layers that are known become fused ones."""
    model = nn.Sequential(nn.LayerNorm(64), timm.layers.Mlp(64, 128), nn.Linear(64, 3))
    x = torch.randn(4, 64)
    expected = model(x)
    fastvit.accelerate(model)
    assert [type(module) for module in model] == [LayerNorm, Mlp, nn.Linear]
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert set(report(model).replaced) == {"0", "1"}
