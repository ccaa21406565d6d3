"""fastvit.ViT: fusing has no visible effect, and the model behaves as timm's."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastvit
from fastvit.activations import ACTIVATIONS
from fastvit.checkpoints import load_checkpoint
from fastvit.checkpoints.npz import to_npz
from fastvit.layers import Attention, BeitBlock, Block, Mlp, PatchEmbed, SwiGLU
from fastvit.models import ViT, create_model, list_models
from fastvit.models.families.vit import VARIANTS
from fastvit.ops import backends
from parity import Calls, assert_same, gradients

SMALL: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5
}  # fmt: skip


def small(dtype: torch.dtype = torch.float64, **options: Any) -> ViT:
    """Return a small model with weights that all matter."""
    model = ViT(**{**SMALL, **options}).to(dtype)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def images(count: int = 2, size: tuple[int, int] = (32, 32), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, *size, dtype=dtype)


# -- fusing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Block, BeitBlock])
def test_a_block_is_four_ops(kind: type[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    block = kind(32, 2, qkv_bias=True, init_values=0.1, drop_path=0.5)
    calls = Calls(monkeypatch)
    block(torch.randn(2, 5, 32))
    assert [(name, used) for name, _, used in calls.made] == [
        ("linear", ("norm",)),
        ("attention_qkvpacked", ("scale",)),
        ("linear", ("residual", "gamma", "row_scale")),
        ("mlp", ("norm", "activation", "residual", "gamma", "row_scale")),
    ]


def test_the_model_is_nothing_but_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    calls = Calls(monkeypatch)
    model(images())
    block = ["linear", "attention_qkvpacked", "linear", "mlp"]
    last = ["linear", "linear", "attention", "linear", "mlp"]
    assert calls.names == ["patch_embed", *block, *block, *last, "layer_norm", "linear"]
    assert [shape for name, shape, _ in calls.made[-4:]] == [(2, 1, 32)] * 3 + [(2, 32)]


MODULES = [
    "norm1", "attn", "attn.qkv", "attn.q_norm", "attn.attn_drop", "attn.proj", "attn.proj_drop", "ls1", "drop_path1",
    "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.norm", "mlp.fc2", "mlp.drop2", "ls2",
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("block", [0, 2])
def test_hooks_are_called_and_take_effect(name: str, block: int) -> None:
    """timm's modules with the same hook are the judge: input seen, output changed, and what follows from it."""
    options = {"init_values": 0.5}
    ours = small(**options)
    theirs = timm.models.VisionTransformer(**SMALL, **options).double()
    theirs.load_state_dict(ours.state_dict())
    if name == "attn.attn_drop":  # timm calls it only so
        theirs.blocks[block].attn.fused_attn = False
    x, seen = images(), []

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        seen.append(args[0])
        return out * torch.linspace(0.5, 1.5, out.shape[-1], dtype=out.dtype)

    for model in (ours, theirs):
        model.blocks[block].get_submodule(name).register_forward_hook(hook)
    ours_out, theirs_out = ours(x), theirs(x)
    assert len(seen) == 2
    assert_same(seen[0], seen[1])
    assert_same(ours_out, theirs_out)
    assert_same(gradients(ours, ours_out), gradients(theirs, theirs_out))


@pytest.mark.parametrize("kind", ["forward_pre", "full_backward", "full_backward_pre"])
def test_every_kind_of_hook_is_called(kind: str) -> None:
    model, seen = small(), []
    for module in (model.norm, model.blocks[2], model.blocks[0].attn.proj, model.patch_embed.proj, model.blocks):
        getattr(module, f"register_{kind}_hook")(lambda module, *_: seen.append(module))
    model(images()).sum().backward()
    assert len(seen) == 5
    assert len(set(map(id, seen))) == 5


def test_global_hooks_are_called() -> None:
    model, seen = small(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(images())
    finally:
        handle.remove()
    assert {m for m in model.modules() if not list(m.children())} <= set(seen)


def test_a_hook_unfuses_only_its_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(32, 2)
    block.attn.proj.register_forward_hook(lambda *_: None)
    calls = Calls(monkeypatch)
    block(torch.randn(2, 5, 32))
    assert calls.names == ["linear", "attention_qkvpacked", "mlp"]


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    @property
    def weight(self) -> Tensor:  # PEFT's layers show the base layer's weight: only the class tells them apart
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("block", [0, 2])
def test_wrapped_and_parametrised_layers_take_effect(name: str, block: int) -> None:
    for change in ("wrapper", "parametrisation", "forward"):
        model = small()
        want = copy.deepcopy(model)
        layer, target = model.blocks[block].get_submodule(name), want.blocks[block].get_submodule(name)
        parent = model.blocks[block].get_submodule(name.split(".")[0])
        if change == "wrapper":
            lora = LoRA(layer)
            setattr(parent, name.split(".")[1], lora)
            target.weight.data += lora.up.data @ lora.down.data
        elif change == "parametrisation":
            parametrize.register_parametrization(layer, "weight", Doubled())
            target.weight.data *= 2
        else:
            layer.forward = lambda x, layer=layer: 3 * nn.functional.linear(x, layer.weight, layer.bias)
            target.weight.data *= 3
            target.bias.data *= 3
        x = images()
        assert_same(model(x), want(x))


def test_subclasses_run_as_they_are() -> None:
    class Loud(Attention):
        def forward(self, x: Tensor, **options: Any) -> Tensor:
            return 2 * super().forward(x, **options)

    class Quiet(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * super().forward(x)

    model = small(attn_layer=Loud, mlp_layer=Quiet)
    want = small()
    want.load_state_dict(model.state_dict())
    for block in want.blocks:
        for parameter in (*block.mlp.fc2.parameters(),):
            parameter.data.zero_()
        for parameter in block.attn.proj.parameters():
            parameter.data *= 2
    x = images()
    assert_same(model(x), want(x))


def test_fallbacks_are_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    model = small()
    model(images())
    assert not caplog.records
    for block in model.blocks:
        block.attn.proj.register_forward_hook(lambda *_: None)
    model(images())
    model(images())
    assert [r.getMessage() for r in caplog.records] == [
        "torch.nn.modules.linear.Linear runs as a module, not fused: it has hooks"
    ]


@pytest.mark.parametrize("act_layer", [*ACTIVATIONS, "relu^2", "swish"])
def test_every_activation_is_fused(act_layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One op for the MLP of each block, with the result of its modules one after the other."""
    model, x = small(act_layer=act_layer), images()
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        fused = model(x)
    assert calls.names.count("mlp") == len(model.blocks)
    for block in model.blocks:
        block.mlp.act.register_forward_hook(lambda *_: None)
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        assert_same(fused, model(x))
    assert "mlp" not in calls.names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"act_layer": nn.Hardswish}, "activation.Hardswish runs as a module: its class .*; accepted: gelu, .*relu, "),
        ({"act_layer": "tanh"}, "activation.Tanh runs as a module: its class .*; accepted: gelu, .*relu, "),
        ({"act_layer": nn.GELU, "mlp_layer": SwiGLU}, "activation.GELU runs as a module: in a gated MLP .*: silu$"),
    ],
)
def test_an_activation_that_is_not_fused_is_logged_once(
    options: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_fallbacks", {})
    model = small(**options)
    model(images())
    model(images())
    (message,) = [r.getMessage() for r in caplog.records if "accepted: " in r.getMessage()]
    assert re.search(said, message)


# -- the class token's saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 1},
        {"qk_norm": True, "init_values": 0.3},
        {"reg_tokens": 2, "qkv_bias": False},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
        {"mlp_layer": SwiGLU},
        {"drop_path_rate": 0.5},
        {"pre_norm": True, "fc_norm": True},
    ],
    ids=str,
)
def test_one_token_in_the_last_block_is_exact(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(**options), images(4)
    torch.manual_seed(3)
    want = model.forward_head(model.forward_features(x))
    want_gradients = gradients(model, want)
    calls = Calls(monkeypatch)
    torch.manual_seed(3)
    got = model(x)
    shapes = [shape for name, shape, _ in calls.made if name == "linear" and len(shape) == 3]  # not the head's
    assert shapes[-1][1] == 1, "the saving was not taken"
    assert_same(got, want)
    assert_same(gradients(model, got), want_gradients)


def test_one_token_only_where_it_has_no_visible_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mean(ViT):
        def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
            return x.mean(dim=1)

    class Features(ViT):
        def forward_features(self, x: Tensor, **options: Any) -> Tensor:
            return super().forward_features(x, **options) * 2

    def replaced(model: ViT) -> None:
        model.pool = lambda x: x.mean(dim=1)  # type: ignore[method-assign]

    cases: list[tuple[ViT, Callable[[ViT], Any]]] = [
        (Mean(**SMALL), bool),
        (Features(**SMALL), bool),
        (ViT(**SMALL), replaced),
        (ViT(**SMALL, global_pool="avg"), bool),
        (ViT(**SMALL), lambda m: m.norm.register_forward_hook(lambda *_: None)),
        (ViT(**SMALL), lambda m: m.blocks[-1].mlp.act.register_forward_hook(lambda *_: None)),
        (ViT(**SMALL), lambda m: m.blocks.register_forward_hook(lambda *_: None)),
        (ViT(**SMALL, proj_drop_rate=0.1), bool),
        (ViT(**SMALL), lambda m: setattr(m, "norm", nn.Softmax(dim=1))),
        (ViT(**SMALL), lambda m: setattr(m, "norm", nn.LayerNorm((17, 32)))),
        (ViT(**SMALL), lambda m: setattr(m.blocks[-1], "attn", nn.Identity())),
    ]
    for model, change in cases:
        change(model)
        x = images(dtype=torch.float32)
        torch.manual_seed(0)
        want = model.forward_head(model.forward_features(x))
        torch.manual_seed(0)
        torch.testing.assert_close(model(x), want)


# -- what is done with models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_checkpointing_changes_nothing(pool: str, packed: bool) -> None:
    """Dropout is drawn again as it was."""
    model = small(global_pool=pool, drop_path_rate=0.4, attn_drop_rate=0.5)
    x = [*images(), images(1, (16, 24))[0]] if packed else images()
    runs = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        torch.manual_seed(5)
        out = model(x)
        runs.append([out, *gradients(model, out)])
    assert_same(*runs)
    assert all(g is not None for g in runs[0])


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "class_token": False, "global_pool": "avg"}], ids=str)
def test_intermediates(options: dict[str, Any]) -> None:
    model, x = small(**options).eval(), images(size=(32, 32))
    theirs = timm.models.VisionTransformer(**SMALL, **options).double().eval()
    theirs.load_state_dict(model.state_dict())
    assert_same(model.forward_intermediates(x)[0], model.forward_features(x))
    assert_same(
        model.forward_intermediates(x, 1, norm=True, output_fmt="NLC", intermediates_only=True)[0],
        model.forward_features(x)[:, model.num_prefix_tokens :],
    )
    for call in (
        {"indices": [0, -1]},
        {"indices": 2, "return_prefix_tokens": True, "intermediates_only": True},
        {"indices": [1], "stop_early": True, "output_fmt": "NLC", "norm": True},
    ):
        ours_found, theirs_found = (m.forward_intermediates(x, **call) for m in (model, theirs))
        assert_same(*map(flat, (ours_found, theirs_found)))
    ours_dict, theirs_dict = (
        m.forward_intermediates(x, output_dict=True, return_prefix_tokens=True) for m in (model, theirs)
    )
    assert set(ours_dict) == set(theirs_dict)
    assert_same(flat(list(ours_dict.values())), flat([theirs_dict[key] for key in ours_dict]))
    n = {"n": 2, "reshape": True, "return_prefix_tokens": True, "norm": True}
    assert_same(flat(model.get_intermediate_layers(x, **n)), flat(theirs.get_intermediate_layers(x, **n)))


def flat(nested: Any) -> list[Tensor]:
    return [nested] if isinstance(nested, Tensor) else [t for part in nested for t in flat(part)]


def test_pruning() -> None:
    model, x = small().eval(), images()
    want = model.forward_intermediates(x, [1], intermediates_only=True)
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.blocks) == 2
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.head, nn.Identity)
    assert_same(model.forward_intermediates(x, [1], intermediates_only=True), want)
    assert model(x).shape == (2, 17, 32)


def test_reset_classifier_starts_at_zero() -> None:
    model, x = small(representation_size=24).eval(), images()
    assert model(x).shape == (2, 5)
    assert {"pre_logits.fc.weight", "pre_logits.fc.bias"} <= set(model.state_dict())
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 24)
    assert model.head_hidden_size == 24
    model.reset_classifier(7, "avg")
    assert model.head.weight.dtype == torch.float64
    assert_same(model(x), torch.zeros(2, 7, dtype=torch.float64))
    assert not [name for name in model.state_dict() if "pre_logits" in name]
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 17, 32)


def test_pre_training_head_is_the_papers() -> None:
    model, x = small(representation_size=24).eval(), images()
    pooled = model.forward_features(x)[:, 0]
    fc, head = model.pre_logits.fc, model.head
    assert_same(model(x), torch.tanh(pooled @ fc.weight.T + fc.bias) @ head.weight.T + head.bias)


@pytest.mark.parametrize("mode", ["", "jax", "jax_nlhb", "moco", "reset", "skip"])
@pytest.mark.parametrize("fix", [False, True])
def test_weights_start_as_timms(mode: str, fix: bool) -> None:
    options = {**SMALL, "weight_init": mode, "fix_init": fix, "init_values": 1e-4, "global_pool": "map"}
    torch.manual_seed(0)
    ours = ViT(**options).state_dict()
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(**options).state_dict()
    assert list(ours) == list(theirs)
    if mode == "skip":
        return  # torch.empty tokens
    for name, value in theirs.items():
        spread = value.std() if value.numel() > 1 else value.new_zeros(())
        torch.testing.assert_close(ours[name].mean(), value.mean(), rtol=0, atol=0.2 * float(spread) + 1e-9)
        torch.testing.assert_close(ours[name].std(), spread, rtol=0.2, atol=1e-9)
    if mode.startswith("jax"):
        assert not ours["head.weight"].any()


def test_attributes_are_timms() -> None:
    options = {**SMALL, "reg_tokens": 2, "no_embed_class": True}
    ours, theirs = ViT(**options), timm.models.VisionTransformer(**options)
    for name in (
        "num_classes", "in_chans", "embed_dim", "num_features", "head_hidden_size", "num_prefix_tokens",
        "has_class_token", "feature_info", "global_pool", "grad_checkpointing", "pool_include_prefix", "num_reg_tokens",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.get_classifier() is ours.head


def test_signature_is_timms() -> None:
    import inspect

    def positional(model: type) -> list[str]:
        parameters = inspect.signature(model).parameters.values()
        return [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]

    assert positional(ViT) == positional(timm.models.VisionTransformer)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("change", ["", "hook", "pad"])
def test_uint8_images(channels_last: bool, change: str) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    options = {"dynamic_img_size": True, "dynamic_img_pad": True} if change == "pad" else {}
    model = small(torch.float32, mean=mean, std=std, **options).eval()
    if change == "hook":
        model.patch_embed.register_forward_hook(lambda *_: None)
    pixels = torch.randint(0, 256, (2, 3, 28 if change == "pad" else 32, 32), dtype=torch.uint8)
    ready = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    images = pixels.permute(0, 2, 3, 1).contiguous() if channels_last else pixels
    torch.testing.assert_close(model(images), model(ready), rtol=1e-5, atol=1e-5)
    assert "mean" not in "".join(model.state_dict())


def test_set_input_size_is_timms() -> None:
    ours = small().eval()
    theirs = timm.models.VisionTransformer(**SMALL).double().eval()
    theirs.load_state_dict(ours.state_dict())
    for change in ({"img_size": (48, 24)}, {"img_size": (48, 32), "patch_size": 16}, {"patch_size": (8, 4)}):
        for model in (ours, theirs):
            model.set_input_size(**change)
        assert ours.patch_embed.grid_size == theirs.patch_embed.grid_size
        x = images(size=ours.patch_embed.img_size)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)  # timm resamples in float32
    assert ours.pos_embed.requires_grad
    with pytest.raises(ValueError, match="not divisible"):
        ours.set_input_size((50, 50))
    assert ours.patch_embed.img_size == (48, 32)


def test_functional_call_and_per_sample_gradients() -> None:
    model, x = small().eval(), images()
    parameters = dict(model.named_parameters())
    assert_same(torch.func.functional_call(model, parameters, (x,)), model(x))

    def loss(p: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (image[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    assert_same([per_sample[name].sum(0) for name in parameters], gradients(model, model(x)))


@pytest.mark.parametrize(
    "options", [{}, {"dynamic_img_size": True}, {"global_pool": "map", "drop_path_rate": 0.1}], ids=str
)
def test_symbolic_tracing(options: dict[str, Any]) -> None:
    model, x = small(**options).eval(), images()
    traced = torch.fx.symbolic_trace(model)
    assert_same(traced(x), model(x))
    assert_same(gradients(model, traced(x)), gradients(model, model(x)))  # they share their parameters


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_in_one_graph_for_every_batch(backend: str) -> None:
    torch._dynamo.reset()
    model = small(torch.float32, depth=2, init_values=0.1)
    with backends.backend(backend):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for count in (4, 3, 7):
            x = images(count, dtype=torch.float32)
            torch._dynamo.mark_dynamic(x, 0)
            with torch._dynamo.config.patch(error_on_recompile=count != 4):
                got = compiled(x)
            want = model(x)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            for a, b in zip(gradients(model, got), gradients(model, want), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# -- weights from files ------------------------------------------------------------------------------------------


def google_arrays(model: ViT, layout: str) -> dict[str, np.ndarray]:
    """Return a model's weights as google-research/vision_transformer ("paper") or big_vision (the others) has them."""
    arrays = to_npz(model.state_dict(), model.blocks[0].attn.num_heads)
    if layout == "paper":
        return arrays
    for paper, big_vision in (
        ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
        ("LayerNorm_2", "LayerNorm_1"),
        ("MlpBlock_3", "MlpBlock_0"),
        ("Transformer/posembed_input/pos_embedding", "pos_embedding"),
    ):
        arrays = {name.replace(paper, big_vision): value for name, value in arrays.items()}
    if layout == "stacked":
        each = [[name for name in arrays if f"encoderblock_{i}/" in name] for i in range(len(model.blocks))]
        for names in zip(*each, strict=True):
            blocks = np.stack([arrays.pop(name) for name in names])
            arrays[names[0].replace("encoderblock_0", "encoderblock")] = blocks
    return arrays


@pytest.mark.parametrize(
    ("layout", "prefix", "options"),
    [
        ("paper", "", {}),
        ("paper", "opt/target/", {"representation_size": 24}),
        ("big_vision", "params/", {"class_token": False, "global_pool": "map"}),
        ("stacked", "params/img/", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    ],
)
def test_npz_round_trip(layout: str, prefix: str, options: dict[str, Any], tmp_path: Path) -> None:
    source, model = small(torch.float32, **options), small(torch.float32, **options)
    np.savez(tmp_path / "vit.npz", **{prefix + k: v for k, v in google_arrays(source, layout).items()})
    model.load_pretrained(tmp_path / "vit.npz")
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    if "representation_size" in options:  # which timm has not
        kernel = google_arrays(source, layout)["pre_logits/kernel"]
        assert torch.equal(torch.from_numpy(kernel).T, source.pre_logits.fc.weight)
    else:
        theirs = timm.models.VisionTransformer(**SMALL, **options)
        theirs.load_pretrained(str(tmp_path / "vit.npz"))
        x = images(dtype=torch.float32)
        torch.testing.assert_close(model.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_npz_is_resampled_as_timm_does(tmp_path: Path) -> None:
    np.savez(tmp_path / "vit.npz", **google_arrays(small(torch.float32), "paper"))
    options = {**SMALL, "img_size": (24, 40), "num_classes": 3}
    model, theirs = ViT(**options), timm.models.VisionTransformer(**options)
    for m in (model, theirs):
        m.load_pretrained(str(tmp_path / "vit.npz"))
    torch.testing.assert_close(model.pos_embed, theirs.pos_embed)
    larger = ViT(**{**SMALL, "patch_size": 16, "img_size": 64})
    larger.load_pretrained(tmp_path / "vit.npz")
    assert larger.patch_embed.proj.weight.shape == (32, 3, 16, 16)
    gray = ViT(**SMALL, in_chans=1)
    gray.load_pretrained(tmp_path / "vit.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_state_dict_files(suffix: str, tmp_path: Path) -> None:
    source, model = small(torch.float32), small(torch.float32)
    if suffix == ".pth":
        torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "vit.pth")
    else:
        from safetensors.torch import save_file

        save_file(source.state_dict(), tmp_path / "vit.safetensors")
    load_checkpoint(model, tmp_path / f"vit{suffix}")
    x = images(dtype=torch.float32)
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)


# -- names -------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert len(list_models("vit_*_patch*_224")) == 36
    assert list_models("vit_base_patch*_224") == [f"vit_base_patch{p}_224" for p in (8, 14, 16, 32)]
    assert list_models("*patch32*") == list_models("patch32_224") != []
    with torch.device("meta"):
        for paper, name in (("ViT-B/16", "vit_base_patch16_224"), ("ViT-g/14", "vit_giant_patch14_224")):
            assert str(create_model(paper, depth=1)) == str(create_model(name, depth=1))
        assert create_model("ViT-L/16-384").patch_embed.img_size == (384, 384)
        assert create_model("vit_tiny_patch16_384", img_size=64, num_classes=3).patch_embed.img_size == (64, 64)


@pytest.mark.parametrize("size", VARIANTS)
def test_variants_are_timms(size: str) -> None:
    with torch.device("meta"):
        model = create_model(f"vit_{size}_patch14_224", depth=1)
        variant = VARIANTS[size]
        assert model.blocks[0].mlp.fc1.out_features == variant.mlp
        theirs = {"so400m": "so400m_patch14_siglip", "giant": "giant_patch14", "gigantic": "gigantic_patch14"}
        name = f"vit_{theirs[size]}_224" if size in theirs else f"vit_{size}_patch16_224"
        if size in ("medium", "huge"):
            name = {"medium": "vit_medium_patch16_gap_240", "huge": "vit_huge_patch14_224"}[size]
        peer = timm.create_model(name)
    assert len(peer.blocks) == variant.depth
    ours, block = ({k: v.shape for k, v in m.blocks[0].state_dict().items()} for m in (model, peer))
    assert ours == {**ours, **{k: shape for k, shape in block.items() if "ls" not in k}}
    assert model.blocks[0].attn.num_heads == peer.blocks[0].attn.num_heads


def test_checkpointing_compiles() -> None:
    model = ViT(**SMALL)
    model.set_grad_checkpointing()
    images, gradients = torch.randn(2, 3, 32, 32), []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(images).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_checkpointing_recomputes_on_the_backend_of_forward() -> None:
    model = ViT(**SMALL)
    model.set_grad_checkpointing()
    with fastvit.backend("reference"):
        logits = model(images(dtype=torch.float32))
    seen = []
    real = backends.choose

    def spy(*args: Any, **kw: Any) -> str:
        seen.append(backends.setting())
        return real(*args, **kw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "choose", spy)
        logits.sum().backward()
    assert seen
    assert set(seen) == {"reference"}
    assert backends.setting() == "auto"  # and backward left what was set


def test_a_forward_replaced_on_the_class_is_called() -> None:
    model = ViT(**SMALL).eval()
    calls = []

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return nn.functional.linear(x, self.weight, self.bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", forward)
        model(images(1, dtype=torch.float32))
    assert len(calls) == 3 * 4 + 1


def test_uint8_validation_under_inference_mode_then_training() -> None:
    model = ViT(**SMALL, mean=(0.51, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        model(pixels)
    model(pixels).sum().backward()
    weight, floats = torch.randn(8, 3, 8, 8), torch.rand(1, 3, 16, 16, requires_grad=True)
    with torch.inference_mode():
        fastvit.ops.patch_embed(floats, weight, std=(0.123, 0.2, 0.3))
    fastvit.ops.patch_embed(floats, weight, std=(0.123, 0.2, 0.3)).sum().backward()
    assert floats.grad is not None


@pytest.mark.parametrize("options", [{}, {"dynamic_img_pad": True, "strict_img_size": False}], ids=str)
def test_a_patch_embedding_alone_divides_bytes_by_255(options: dict[str, Any]) -> None:
    embed, pixels = PatchEmbed(32, 8, embed_dim=16, **options), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for x in (pixels, pixels.permute(0, 2, 3, 1)):
        torch.testing.assert_close(embed(x), embed(pixels / 255))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pos_embed", torch.tensor(1.0)),
        ("head.weight", torch.tensor(1.0)),
        ("patch_embed.proj.weight", torch.ones(4, 3)),
    ],
)
def test_keys_with_another_number_of_dimensions_are_named(key: str, value: torch.Tensor) -> None:
    model = ViT(**SMALL)
    with pytest.raises(RuntimeError, match=f"{key}: .*another number of dimensions"):
        model.load_state_dict(model.state_dict() | {key: value})
