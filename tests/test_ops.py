"""The ops layer on a CPU: who is chosen, what is refused, oneDNN, and living inside PyTorch."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastvit
from cases import CASES, Case
from fastvit import ops, reference
from fastvit.activations import ACTIVATIONS, GATED, columns
from fastvit.cuda import extension
from fastvit.ops import backends, onednn
from numerics import assert_as_right_as_eager, check_op, leaves_of, tensors

FLOATING = [c for c in CASES if "uint8" not in str(c)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_default_backend_is_as_right_as_eager(case: Case, dtype: torch.dtype) -> None:
    check_op(case.kernel, case.reference, case.args(dtype, "cpu"))


@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_reference_has_second_derivatives(case: Case) -> None:
    args = leaves_of(case.args(torch.float64, "cpu"), torch.float64)
    inputs = {k: v for k, v in args.items() if isinstance(v, torch.Tensor) and v.requires_grad}

    def run(*values: torch.Tensor) -> torch.Tensor:
        return tensors(case.kernel(**(args | dict(zip(inputs, values, strict=True)))))[0]

    with fastvit.backend("reference"):
        assert torch.autograd.gradgradcheck(run, tuple(inputs.values()), fast_mode=True)


# --- oneDNN ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _packs_small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_SMALLEST", 1)
    monkeypatch.setattr(onednn, "_NARROW", (0, 0))


def _parameters(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter((torch.randn(shape) * 0.2).to(dtype)) for name, shape in shapes.items()}


@pytest.mark.usefixtures("_packs_small_products")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("activation", (*ACTIVATIONS, *GATED))
@pytest.mark.parametrize("gamma", (True, False))
@pytest.mark.parametrize(("narrow", "amx"), ((False, True), (True, False), (True, True)))
def test_onednn_is_as_right_as_eager(
    dtype: torch.dtype, activation: str, gamma: bool, narrow: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    amx = amx and onednn.BFLOAT16_INSTRUCTIONS  # plain weights run with any of them
    monkeypatch.setattr(onednn, "_AMX", amx)
    if narrow:
        monkeypatch.setattr(onednn, "_NARROW", (1024, 1280))
    packed = 0 if narrow and amx and dtype == torch.bfloat16 else 2
    _check_packed_mlp(dtype, activation, gamma, packed)


@pytest.mark.usefixtures("_packs_small_products")
@pytest.mark.parametrize("gamma", (False, True))
@pytest.mark.parametrize("activation", (*ACTIVATIONS, *GATED))
def test_a_cpu_without_bfloat16_multiplies_in_float32(
    activation: str, gamma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "BFLOAT16_INSTRUCTIONS", False)
    assert _check_packed_mlp(torch.bfloat16, activation, gamma, packed=2) == {torch.float32}


@pytest.mark.parametrize("activation", ("gelu", "swiglu"))
def test_a_cpu_without_bfloat16_compiles_to_float32_products(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "BFLOAT16_INSTRUCTIONS", False)
    products: list[torch.dtype] = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        calls = [node for node in graph.graph.nodes if node.target in (torch._C._nn.linear, torch.conv2d)]
        products.extend(node.args[1].meta["example_value"].dtype for node in calls)
        return graph

    args = {
        "x": torch.randn(2, 17, 48), "fc1_weight": torch.randn(128, 48), "fc1_bias": torch.randn(128),
        "fc2_weight": torch.randn(48, 128 // columns(activation)), "fc2_bias": torch.randn(48),
    }  # fmt: skip
    half = {name: t.bfloat16() for name, t in args.items()}
    exact = {name: t.double() for name, t in half.items()}
    images, patches = torch.randn(2, 3, 8, 8).bfloat16(), torch.randn(16, 3, 4, 4).bfloat16()
    with torch.no_grad():
        mlp = torch.compile(lambda **kw: ops.mlp(**kw, activation=activation), backend=note, fullgraph=True)(**half)
        tokens = torch.compile(ops.patch_embed, backend=note, fullgraph=True)(images, patches)
    assert products == 3 * [torch.float32]
    assert mlp.dtype == tokens.dtype == torch.bfloat16
    theirs = reference.mlp(**half, activation=activation), reference.patch_embed(images, patches)
    assert_as_right_as_eager(mlp, theirs[0], reference.mlp(**exact, activation=activation))
    assert_as_right_as_eager(tokens, theirs[1], reference.patch_embed(images.double(), patches.double()))


def _check_packed_mlp(dtype: torch.dtype, activation: str, gamma: bool, packed: int) -> set[torch.dtype]:
    """An MLP with a norm and a residual, so many of its weights packed, against the reference -> dtypes when packed."""
    onednn._packed.clear()
    p = _parameters(dtype, fc1_weight=(128, 48), fc1_bias=(128,), fc2_bias=(48,))
    p |= _parameters(dtype, fc2_weight=(48, 128 // columns(activation)))
    x = torch.randn(2, 17, 48, dtype=dtype)
    args = p | {"x": x, "residual": x, "activation": activation, "norm": (p["fc2_bias"], p["fc2_bias"], 1e-6)}
    if gamma:
        args["gamma"] = torch.randn(48, dtype=dtype)
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    exact["norm"] = (exact["fc2_bias"], exact["fc2_bias"], 1e-6)
    with torch.no_grad(), fastvit.backend("onednn"):
        out = ops.mlp(**args)
    assert out.dtype == dtype
    assert len(onednn._packed) == packed, "not the path that this test is for"
    assert_as_right_as_eager(out, reference.mlp(**args), reference.mlp(**exact))
    return {p.weight.dtype for p in onednn._packed.values()}


@pytest.mark.usefixtures("_packs_small_products")
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.mul_(2),
        lambda p: p.data.mul_(2),
        lambda p: p.data.__setitem__((3, 5), 7.0),
        lambda p: p.data.copy_(p.data.flip(0)),
        lambda p: p.data.copy_(p.data.flip(1)),
        lambda p: p.data[1].neg_(),
        lambda p: setattr(p, "data", torch.randn_like(p)),
        lambda p: p.detach().numpy().__setitem__((0, 0), 5.0),
    ],
    ids=[
        "in place",
        "through .data",
        "one element",
        "rows moved",
        "columns moved",
        "row negated",
        "new storage",
        "through numpy",
    ],
)
def test_onednn_sees_every_change_of_a_weight(change) -> None:
    x, weight = torch.randn(9, 96), nn.Parameter(torch.randn(2 * onednn._STRETCH, 96))  # whole stretches: places decide
    with torch.no_grad():
        before = ops.linear(x, weight)
        change(weight)
        after = ops.linear(x, weight)
        torch.testing.assert_close(after, x @ weight.T)
    assert not torch.equal(before, after)


@pytest.mark.usefixtures("_packs_small_products")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_onednn_takes_parameters_in_a_flat_buffer(dtype: torch.dtype) -> None:
    flat = torch.randn(1 + 24 * 32).to(dtype)
    weight = nn.Parameter(torch.empty(24, 32, dtype=dtype))
    weight.data = flat[1:].view(24, 32)
    x = torch.randn(9, 32, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(ops.linear(x, weight), x @ weight.T, atol=2e-2, rtol=2e-2)
        flat.mul_(2)
        torch.testing.assert_close(ops.linear(x, weight), x @ weight.T, atol=2e-2, rtol=2e-2)


@pytest.mark.usefixtures("_packs_small_products")
def test_onednn_copies_go_with_their_parameter_and_on_request() -> None:
    onednn._packed.clear()
    weight = nn.Parameter(torch.randn(24, 32))
    with torch.no_grad():
        ops.linear(torch.randn(9, 32), weight)
    assert len(onednn._packed) == 1
    onednn.drop([weight])
    assert len(onednn._packed) == 0
    with torch.no_grad():
        ops.linear(torch.randn(9, 32), weight)
    del weight
    assert len(onednn._packed) == 0


@pytest.mark.usefixtures("_packs_small_products")
@pytest.mark.parametrize(
    "change", [lambda m: m.train(), lambda m: m.double(), lambda m: m.load_state_dict(m.state_dict())]
)
def test_a_model_in_training_moved_or_loaded_keeps_no_copies(change) -> None:
    onednn._packed.clear()
    model = fastvit.ViT(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=5).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert len(onednn._packed) > 0
    change(model)
    assert len(onednn._packed) == 0


@pytest.mark.usefixtures("_packs_small_products")
def test_onednn_leaves_inference_tensors_alone() -> None:
    with torch.inference_mode():
        weight = nn.Parameter(torch.randn(24, 32))
        x = torch.randn(9, 32)
        torch.testing.assert_close(ops.linear(x, weight), x @ weight.T)
        weight.data.mul_(2)
        torch.testing.assert_close(ops.linear(x, weight), x @ weight.T)


# --- who is chosen --------------------------------------------------------------------------------------------


def test_a_backend_made_early_sets_when_entered() -> None:
    made = fastvit.backend("reference")
    fastvit.backend("auto")
    with made:
        assert backends.setting() == "reference"
    assert backends.setting() == "auto"


def test_backend_is_a_setting_and_a_context() -> None:
    assert backends.setting() == "auto"
    with fastvit.backend("reference"):
        assert backends.setting() == "reference"
        with fastvit.backend("onednn"):
            assert backends.setting() == "onednn"
        assert backends.setting() == "reference"
    assert backends.setting() == "auto"


def test_backend_of_some_ops_leaves_the_others() -> None:
    fc1, x = torch.nn.Parameter(torch.randn(8, 8)), torch.randn(3, 8)
    with fastvit.backend("reference"):
        with fastvit.backend("triton", only=("linear",)), torch.no_grad():
            assert backends.setting("linear") == "triton"
            assert backends.setting("mlp") == "reference"
            assert "linear triton" in backends.setting()
            assert "mlp reference" in backends.setting()
            assert backends.choose("mlp", x, needs_grad=False) == "reference"
            if not torch.cuda.is_available():
                with pytest.raises(fastvit.BackendUnavailable, match="ops.linear: backend 'triton'"):
                    ops.linear(x, fc1)
            with fastvit.backend("auto", only="mlp"):
                assert [backends.setting(op) for op in ("layer_norm", "linear", "mlp")] == [
                    "reference",
                    "triton",
                    "auto",
                ]
            assert backends.setting("mlp") == "reference"
        assert backends.setting() == "reference"
    assert backends.setting() == "auto"


def test_unknown_op_is_named() -> None:
    with pytest.raises(ValueError, match="unknown op 'linnear'; accepted: patch_embed, layer_norm, linear"):
        fastvit.backend("triton", only=("mlp", "linnear"))
    assert backends.setting() == "auto"


def test_compiled_code_follows_the_setting_of_its_ops() -> None:
    compiled: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    run = torch.compile(lambda x: ops.layer_norm(x, None, None), backend=keep, fullgraph=True)
    x = torch.randn(3, 8)
    run(x)
    with fastvit.backend("onednn", only=("mlp",)):
        run(x)
    assert len(compiled) == 1  # another op's setting is nothing to it
    with fastvit.backend("reference", only=("layer_norm",)):
        run(x)
    assert len(compiled) == 2


def test_export_is_told_from_compilation() -> None:
    """On a GPU the one takes the reference, and the other the kernels."""

    class Asks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if backends.exporting() else 2 * x

    x = torch.randn(3)
    assert torch.equal(torch.compile(Asks(), backend="eager", fullgraph=True)(x), 2 * x)
    for strict in (True, False):
        assert torch.equal(torch.export.export(Asks(), (x,), strict=strict).module()(x), x + 1)
    assert torch.equal(torch.compile(Asks(), backend="eager", fullgraph=True)(x), 2 * x)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="'tritn'.*accepted: auto, reference, onednn, triton"):
        fastvit.backend("tritn")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_triton_without_a_gpu_says_why() -> None:
    with fastvit.backend("triton"), pytest.raises(fastvit.BackendUnavailable, match="ops.linear.*cpu.*CUDA"):
        ops.linear(torch.randn(3, 4), torch.randn(5, 4))


def test_onednn_with_a_gradient_says_why() -> None:
    with fastvit.backend("onednn"), pytest.raises(fastvit.BackendUnavailable, match="gradient"):
        ops.linear(torch.randn(3, 4, requires_grad=True), torch.randn(5, 4))


def test_fallbacks_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fastvit"):
        backends.note_fallback("ops.x runs on the reference: a test")
        backends.note_fallback("ops.x runs on the reference: a test")
    assert [r.message for r in caplog.records] == ["ops.x runs on the reference: a test"]
    assert "ops.x runs on the reference: a test" in backends.fallbacks()


def test_availability_covers_every_op_and_backend() -> None:
    table = backends.availability()
    assert set(table) == set(backends.OPS)
    for row in table.values():
        assert set(row) == set(backends.BACKENDS) - {"auto"}
        assert row["reference"] is None


# --- inside PyTorch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_reference_compiles_without_a_graph_break(case: Case) -> None:
    torch._dynamo.reset()
    args = case.args(torch.float32, "cpu")
    compiled = torch.compile(lambda **kw: case.kernel(**kw), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(tensors(compiled(**args)), tensors(case.kernel(**args)), strict=True):
        torch.testing.assert_close(ours, eager)


def test_autocast_starts_the_residual_stream_in_float32() -> None:
    images, weight = torch.randn(1, 3, 8, 8), torch.randn(6, 3, 4, 4, requires_grad=True)
    rows = {"pos_embed": torch.randn(1, 5, 6, requires_grad=True), "prefix_tokens": torch.randn(1, 1, 6)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = ops.patch_embed(images, weight, **rows)
        assert tokens.dtype == torch.float32
        assert ops.patch_embed(images, weight).dtype == torch.bfloat16
    torch.testing.assert_close(tokens, ops.patch_embed(images, weight, **rows), atol=0.2, rtol=0.02)
    tokens.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_autocast_keeps_the_residual_stream_in_float32() -> None:
    x, w = torch.randn(2, 5, 16), torch.randn(16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(x, w, norm=(torch.ones(16), torch.zeros(16), 1e-6)).dtype == torch.bfloat16
        assert ops.linear(x, w, residual=x).dtype == torch.float32
        assert ops.mlp(x, w, None, w, None, residual=x).dtype == torch.float32


def test_torch_func_works_under_auto() -> None:
    x, w = torch.randn(4, 6, 8), torch.randn(3, 8)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: ops.linear(x, w, activation="gelu").sum()))(x)
    leaf = x.clone().requires_grad_()
    ops.linear(leaf, w, activation="gelu").sum().backward()
    torch.testing.assert_close(per_sample, leaf.grad)


def test_forward_mode_derivatives_on_the_reference() -> None:
    q, v = torch.randn(2, 1, 5, 2, 8)
    with fastvit.backend("reference"):
        _, tangent = torch.func.jvp(lambda q: ops.attention(q, v, v), (q,), (torch.ones_like(q),))
    assert tangent.isfinite().all()


def test_attention_without_keys_has_a_gradient() -> None:
    q, k = torch.randn(1, 3, 2, 8, requires_grad=True), torch.randn(1, 0, 2, 8)
    ops.attention(q, k, k).sum().backward()
    assert (q.grad == 0).all()


def test_symbolic_trace_sees_one_node_per_op() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.linear(x, self.weight, activation="gelu")

    net = Net()
    graph = torch.fx.symbolic_trace(net)
    assert sum(node.op == "call_function" for node in graph.graph.nodes) == 1
    x = torch.randn(3, 4)
    torch.testing.assert_close(graph(x), net(x))


# --- bad input ------------------------------------------------------------------------------------------------

W = torch.randn(8, 4)
X = torch.randn(2, 3, 4)
Q = torch.randn(2, 4, 2, 8)
LSE = torch.zeros(2, 2, 4)
ANGLES = torch.ones(2, 3, 8)
TABLE = torch.zeros(9, 2)
STARTS = torch.tensor([0, 3, 4], dtype=torch.int32)


def sequences(starts: Any, max_seqlen: Any = 4, **options: Any) -> Any:
    return ops.attention(Q[:1], Q[:1], Q[:1], cu_seqlens=starts, max_seqlen=max_seqlen, **options)


BAD = {
    "width": (lambda: ops.linear(torch.randn(2, 5), W), r"\(2, 5\).*\(8, 4\)"),
    "bias": (lambda: ops.linear(X, W, torch.randn(7)), r"bias has shape \(7,\), expected \(8,\)"),
    "dtypes": (lambda: ops.linear(X.double(), W), r"dtypes differ: x torch.float64, weight torch.float32"),
    "integers": (lambda: ops.linear(X.long(), W.long()), r"torch.int64; accepted"),
    "activation": (lambda: ops.linear(X, W, activation="celu"), r"'celu'; accepted: None, gelu"),
    "gamma alone": (lambda: ops.linear(X, W, gamma=torch.ones(8)), r"residual"),
    "residual": (lambda: ops.linear(X, W, residual=X), r"residual has shape \(2, 3, 4\), expected \(2, 3, 8\)"),
    "norm": (lambda: ops.linear(X, W, norm=(torch.ones(5), None, 1e-6)), r"norm weight has shape \(5,\)"),
    "norm tuple": (lambda: ops.linear(X, W, norm=torch.ones(4)), r"\(weight, bias, eps\)"),
    "mlp": (lambda: ops.mlp(X, W, None, W, None), r"fc2_weight \(8, 4\).*\(D, 8\)"),
    "mlp activation": (lambda: ops.mlp(X, W, None, W, None, activation="celu"), r"swiglu"),
    "row_scale": (
        lambda: ops.layer_norm(X, None, None, residual=X, row_scale=torch.ones(3)),
        r"row_scale has shape \(3,\), expected \(2,\)",
    ),
    "device": (lambda: ops.linear(X, W.to("meta")), r"weight is on meta, x is on cpu"),
    "no pixels": (lambda: ops.patch_embed(torch.zeros(1, 3, 0, 8), torch.zeros(4, 3, 4, 4)), r"0x8 are empty"),
    "no heads": (lambda: ops.attention(*[torch.randn(2, 5, 0, 16)] * 3), r"start at 1"),
    "attention": (lambda: ops.attention(X, X, X), r"\(B, Tq, H, d\)"),
    "packed": (lambda: ops.attention_qkvpacked(torch.randn(1, 2, 4, 1, 8)), r"\(1, 2, 4, 1, 8\), expected"),
    "bias's dimensions": (
        lambda: ops.attention(Q, Q, Q, bias=torch.zeros(4, 4)),
        r"bias has shape \(4, 4\); accepted: .*\(B, H, Tq, Tk\) = \(2, 2, 4, 4\)",
    ),
    "bias's shape": (lambda: ops.attention(Q, Q, Q, bias=torch.zeros(2, 3, 4, 4)), r"bias has shape \(2, 3, 4, 4\)"),
    "bias's dtype": (lambda: ops.attention(Q, Q, Q, bias=torch.zeros(1, 1, 4, 4).bool()), r"bias has dtype torch.bool"),
    "bias and table": (
        lambda: ops.attention(Q, Q, Q, bias=torch.zeros(1, 1, 4, 4), rel_pos_table=TABLE, window=(2, 2)),
        r"bias and rel_pos_table exclude each other",
    ),
    "table alone": (lambda: ops.attention(Q, Q, Q, rel_pos_table=TABLE), r"window is missing"),
    "window alone": (lambda: ops.attention(Q, Q, Q, window=(2, 2)), r"rel_pos_table is missing"),
    "table's window": (
        lambda: ops.attention(Q, Q, Q, rel_pos_table=TABLE, window=(4, 1)),
        r"rel_pos_table has shape \(9, 2\); a window of 4x1 and 2 heads take \(7, 2\), or \(10, 2\) with a class token",
    ),
    "table's heads": (
        lambda: ops.attention(Q, Q, Q, rel_pos_table=TABLE[:, :1], window=(2, 2)),
        r"shape \(9, 1\); a window of 2x2 and 2 heads",
    ),
    "table's tokens": (
        lambda: ops.attention(Q, Q, Q, rel_pos_table=torch.zeros(12, 2), window=(2, 2)),
        r"4 queries and 4 keys; .* 12 rows for a window of 2x2 takes 5",
    ),
    "window": (lambda: ops.attention(Q, Q, Q, rel_pos_table=TABLE, window=(0, 2)), r"window=\(0, 2\).*at least 1"),
    "keys of distances": (
        lambda: ops.attention(Q, Q, Q, rel_pos_keys=torch.zeros(8, 8)),
        r"rel_pos_keys has shape \(8, 8\) for 4 queries and 4 keys; expected .*\(7, 8\) or .*\(2, 7, 8\)",
    ),
    "key_mask's shape": (
        lambda: ops.attention(Q, Q, Q, key_mask=torch.ones(2, 3).bool()),
        r"key_mask has shape \(2, 3\).*expected \(B, Tk\) = \(2, 4\)",
    ),
    "key_mask's dtype": (lambda: ops.attention(Q, Q, Q, key_mask=torch.ones(2, 4)), r"dtype torch.float32; expected"),
    "starts of a batch": (lambda: ops.attention(Q, Q, Q, cu_seqlens=STARTS, max_seqlen=4), r"a batch of 2; .*B = 1"),
    "starts' dtype": (lambda: sequences(STARTS.long()), r"shape \(3,\) and dtype torch.int64 on cpu; .*torch.int32"),
    "starts' shape": (lambda: sequences(STARTS[:1]), r"shape \(1,\).*expected \(n \+ 1,\)"),
    "starts' end": (lambda: sequences(STARTS - 1), r"goes from -1 to 3; expected 0 to 4"),
    "falling starts": (lambda: sequences(torch.tensor([0, 3, 2, 4]).int()), r"has 3 and then 2, sequence 1"),
    "longest": (lambda: sequences(STARTS, max_seqlen=2), r"has 0 and then 3, sequence 0.*max_seqlen=2"),
    "no longest": (lambda: sequences(STARTS, max_seqlen=None), r"max_seqlen=None; expected one tensor and one int"),
    "longest alone": (lambda: ops.attention(Q, Q, Q, max_seqlen=4), r"max_seqlen=4 without cu_seqlens"),
    "starts of keys": (
        lambda: sequences((STARTS, torch.tensor([0, 4]).int()), max_seqlen=(4, 4)),
        r"2 and 1 sequences; they must be as many",
    ),
    "starts and a bias": (
        lambda: sequences(STARTS, bias=torch.zeros(1, 1, 4, 4)),
        r"cu_seqlens and bias can't be combined",
    ),
    "starts and a mask": (
        lambda: sequences(STARTS, key_mask=torch.ones(1, 4).bool()),
        r"cu_seqlens and key_mask can't be combined",
    ),
    "dropout": (lambda: ops.attention(Q, Q, Q, dropout_p=1.0), r"dropout_p=1.0; accepted: from 0 to below 1"),
    "no seed": (lambda: ops.attention(Q, Q, Q, dropout_p=0.1), r"dropout_p=0.1 with a seed None; expected int64"),
    "seed": (
        lambda: ops.attention(Q, Q, Q, dropout_p=0.1, seed=torch.zeros(2)),
        r"a seed of shape \(2,\) and dtype torch.float32; expected int64 of one element",
    ),
    "queries turned": (lambda: ops.attention(Q[:, :2], Q, Q, rope=tuple(ANGLES)), r"ops.rotate: q \(2, 2, 2, 8\)"),
    "rotation": (lambda: ops.rotate(Q, Q[:, :3], *ANGLES), r"q \(2, 4, 2, 8\), k \(2, 3, 2, 8\)"),
    "odd heads": (lambda: ops.rotate(Q[..., :7], Q[..., :7], *ANGLES), r"head dim 7 is odd"),
    "angles": (
        lambda: ops.rotate(Q[:, :2], Q[:, :2], *ANGLES),
        r"cos has shape \(3, 8\).*\(2, T', 8\) with T' up to 2$",
    ),
    "angles of images": (lambda: ops.rotate(Q, Q, *torch.ones(2, 3, 3, 8)), r"cos has shape \(3, 3, 8\)"),
    "sines": (lambda: ops.rotate(Q, Q, ANGLES[0], ANGLES[1][:2]), r"sin has shape \(2, 8\), expected \(3, 8\)"),
    "learned angles": (lambda: ops.rotate(Q, Q, ANGLES[0], ANGLES[1].clone().requires_grad_()), r"no gradient"),
    "rows": (lambda: ops.attention_rows(Q, Q, LSE, (0, 4, -5)), r"rows \[4, -5\]; accepted: from -4 to 3"),
    "rows of a tensor": (lambda: ops.attention_rows(Q, Q, LSE, torch.tensor([4])), r"rows \[4\]; accepted"),
    "rows in int32": (lambda: ops.attention_rows(Q, Q, LSE, torch.zeros(1).int()), r"int32 on cpu; expected \(R,\)"),
    "lse": (lambda: ops.attention_rows(Q, Q, LSE[:1], (0,)), r"lse has shape \(1, 2, 4\), expected \(2, 2, 4\)"),
    "rows of heads": (lambda: ops.attention_rows(Q, X, LSE, (0,)), r"k \(2, 3, 4\); expected .*\(B, Tk, H, d\)"),
    "rows' table": (
        lambda: ops.attention_rows(Q, Q, LSE, (0,), rel_pos_table=torch.ones(9, 2), window=(2, 3)),
        r"rel_pos_table has shape \(9, 2\)",
    ),
    "grid": (lambda: ops.attention_distance(Q, Q, LSE, (5, 1)), r"a grid of 5x1 patches; accepted: from 1 to the 4"),
    "distance": (lambda: ops.attention_distance(Q, Q[:, :3], LSE, (2, 2)), r"4 queries and 3 keys"),
    "channels": (lambda: ops.patch_embed(torch.randn(1, 4, 8, 8), torch.randn(6, 3, 4, 4)), r"3 channels"),
    "patches": (lambda: ops.patch_embed(torch.randn(1, 3, 9, 8), torch.randn(6, 3, 4, 4)), r"9x8.*4x4"),
    "positions": (
        lambda: ops.patch_embed(torch.randn(1, 3, 8, 8), torch.randn(6, 3, 4, 4), pos_embed=torch.randn(1, 3, 6)),
        r"\(1, 3, 6\), expected \(1, 4, 6\)",
    ),
    "mean": (lambda: ops.patch_embed(torch.randn(1, 3, 8, 8), torch.randn(6, 3, 4, 4), mean=[0.5]), r"mean.*\(3,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_cuda_asks_what_the_extension_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for built, takes in (
        ("8.0 9.0a", [(8, 0), (8, 6), (9, 0)]),
        ("9.0a", [(9, 0)]),
        ("8.6+PTX", [(8, 6), (9, 0), (12, 0)]),
    ):
        monkeypatch.setitem(sys.modules, "fastvit._C", SimpleNamespace(ARCHITECTURES=built))
        extension.built_for.cache_clear()
        assert [c for c in ((8, 0), (8, 6), (9, 0), (12, 0)) if extension.built_for(c)] == takes, built
    extension.built_for.cache_clear()
