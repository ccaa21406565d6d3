"""The kernel ops inside PyTorch: opcheck, compile, autocast, second derivatives. In the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from cases import CASES, Case
from fastvit import ops
from numerics import tensors

# One case per op with everything that it fuses: opcheck runs a call a dozen times, the interpreter is slow.
FULL = [
    c
    for c in CASES
    if str(c)
    in (
        "patch_embed-oblong",
        "patch_embed_packed-mix",
        "layer_norm-merge",
        "layer_norm-odd",
        "linear-merge",
        "linear-norm-gelu",
        "mlp-gelu",
        "rotate-prefix",
        "attention-lse",
        "attention_qkvpacked-17x64",
        "attention-bias",
        "attention_qkvpacked-table",
        "attention_qkvpacked-distances",
        "attention_qkvpacked-packed",
    )
]


@pytest.fixture(autouse=True)
def _triton():
    with fastvit.backend("triton"):
        yield


class _Calls(TorchDispatchMode):
    """Collects the calls of the kernel ops with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastvit":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_opcheck(case: Case) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch, for the op and for its backward op."""
    args = case.args(torch.float32, "cpu")
    with _Calls() as seen:
        outputs = [o for o in tensors(case.kernel(**args)) if o.requires_grad]
        torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
    assert len(seen.calls) == 2
    for i, (op, call) in enumerate(seen.calls):  # forward, then backward, whose own derivative is refused
        fresh = [
            a.detach().clone().requires_grad_(a.requires_grad and i == 0) if isinstance(a, torch.Tensor) else a
            for a in call
        ]
        torch.library.opcheck(op, tuple(fresh), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_compiles_forward_and_backward_without_a_graph_break(case: Case) -> None:
    torch._dynamo.reset()
    args = case.args(torch.float32, "cpu")
    leaves = {k: v for k, v in args.items() if isinstance(v, torch.Tensor) and v.requires_grad}

    def step(op):
        outputs = tensors(op(**args))
        return outputs, torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs])

    compiled = torch.compile(lambda **kw: case.kernel(**kw), fullgraph=True, backend="aot_eager")
    for a, b in zip(step(compiled), step(case.kernel), strict=True):
        torch.testing.assert_close(a, b)


def test_batch_and_tokens_are_dynamic_without_recompiling() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weight, norm = torch.randn(3 * 32, 32), (torch.ones(32), torch.zeros(32), 1e-6)

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def half_block(x):
        qkv = ops.linear(x, weight, norm=norm).view(x.shape[0], x.shape[1], 3, 2, 16)
        return ops.linear(ops.attention_qkvpacked(qkv).flatten(2), weight[:32], residual=x)

    for batch, tokens in ((2, 5), (3, 7), (4, 9)):
        x = torch.randn(batch, tokens, 32)
        assert half_block(x).shape == x.shape
    assert sum(len(graph.graph.nodes) > 0 for graph in counter.graphs) == 1


def test_every_mix_of_sizes_is_one_compilation() -> None:
    """Packed sequences: neither their number, nor their lengths, nor the longest, nor the total compiles again."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def step(qkv, cu_seqlens, longest):
        return ops.attention_qkvpacked(qkv, cu_seqlens=cu_seqlens, max_seqlen=longest)

    counts = []
    # No size of the first mix is another's: what is equal when it is first seen is compiled as being so, 3 above all.
    for lengths in ((3, 5, 1, 6), (4, 2, 8), (1, 0, 7, 16, 2)):
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        qkv = torch.randn(1, sum(lengths), 3, 2, 16, requires_grad=True)
        out = step(qkv, starts, max(lengths))
        alone = [ops.attention_qkvpacked(x) for x in qkv.split(lengths, 1)]
        torch.testing.assert_close(out, torch.cat(alone, 1))
        (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
        torch.testing.assert_close(gradient, torch.autograd.grad(torch.cat(alone, 1).square().sum(), qkv)[0])
        counts.append(counter.frame_count)  # 2 for the first: the trace begins anew when it finds that floats stay
    assert counts == counts[:1] * 3


def _weights() -> dict[str, Any]:
    """Calls of the ops that look at attention's weights: no gradient, so that all there is of them is forward."""
    q, k = torch.randn(2, 2, 7, 2, 16)
    _, lse = ops.attention(q, k, k, return_lse=True)
    return {
        "rows": lambda: ops.attention_rows(q, k, lse, torch.tensor([0, -1]), bias=torch.ones(1, 2, 7, 7)),
        "distance": lambda: ops.attention_distance(q, k, lse, (2, 3), patch_size=(4.0, 4.0)),
    }


@pytest.mark.parametrize("name", ["rows", "distance"])
def test_attentions_weights(name: str) -> None:
    torch._dynamo.reset()
    call = _weights()[name]
    with _Calls() as seen:
        expected = call()
    ((op, args),) = seen.calls
    torch.library.opcheck(op, args)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call().dtype == torch.float32


def test_rotations_have_second_derivatives() -> None:
    case = next(c for c in CASES if str(c) == "rotate-prefix")
    args = case.args(torch.float32, "cpu")
    second = []
    for backend in ("triton", "reference"):
        with fastvit.backend(backend):
            first = torch.autograd.grad(sum((o**3).sum() for o in case.kernel(**args)), args["q"], create_graph=True)[0]
            second.append(torch.autograd.grad((first**2).sum(), args["q"])[0])
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("case", [c for c in FULL if c.op != "rotate"], ids=str)
def test_second_derivatives_are_refused(case: Case) -> None:
    args = case.args(torch.float32, "cpu")
    leaves = [v for v in args.values() if isinstance(v, torch.Tensor) and v.requires_grad][:2]
    out = tensors(case.kernel(**args))[0]
    first = torch.autograd.grad((out**2).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivatives.*backend\("reference"\)'):
        torch.autograd.grad(sum((g**2).sum() for g in first), leaves)


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
    x, w = torch.randn(2, 5, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    norm = (torch.ones(16), torch.zeros(16), 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(x, w, norm=norm).dtype == torch.bfloat16
        stream = ops.linear(ops.linear(x, w, norm=norm), w, residual=x)
        assert stream.dtype == torch.float32
        out = ops.mlp(stream, w, None, w, None, norm=norm, residual=stream)
        assert out.dtype == torch.float32
        assert ops.layer_norm(out.bfloat16(), *norm).dtype == torch.float32
    out.sum().backward()
    assert x.grad.dtype == torch.float32 and w.grad.dtype == torch.float32


def test_float64_is_refused_by_name() -> None:
    with pytest.raises(fastvit.BackendUnavailable, match="float64.*accepted: float32, float16, bfloat16"):
        ops.linear(torch.randn(3, 4).double(), torch.randn(5, 4).double())


def test_wide_heads_are_refused_by_name() -> None:
    qkv = torch.randn(1, 2, 3, 1, 160)
    with pytest.raises(fastvit.BackendUnavailable, match="head dim 160.*1 to 128"):
        ops.attention_qkvpacked(qkv)


@pytest.mark.parametrize("op", ["linear", "attention", "layer_norm", "mlp", "patch_embed"])
def test_empty_batches(op: str) -> None:
    if op == "patch_embed":
        assert ops.patch_embed(torch.randn(0, 3, 8, 8), torch.randn(6, 3, 4, 4)).shape == (0, 4, 6)
        return
    x, w = torch.randn(0, 5, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    out = {
        "linear": lambda: ops.linear(x, w, torch.randn(16, requires_grad=True), residual=x),
        "attention": lambda: ops.attention(*[x.view(0, 5, 2, 8)] * 3),
        "layer_norm": lambda: ops.layer_norm(x, torch.ones(16, requires_grad=True), torch.zeros(16)),
        "mlp": lambda: ops.mlp(x, w, None, w, None, residual=x),
    }[op]()
    out.sum().backward()
    assert x.grad.shape == (0, 5, 16)
    assert w.grad is None or (w.grad == 0).all()


COUNTED = ("patch_embed-square", "linear-merge", "mlp-gelu", "attention-5x9x32", "attention_qkvpacked-scale")


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_those_of_the_ops_replaced(name: str) -> None:
    """Forward and backward, counted by PyTorch's own formulas on the reference. (A model would not do: the counter
    watches modules with hooks, and watched modules are not fused.)"""
    case = next(c for c in CASES if str(c) == name)
    counts = []
    for backend in ("triton", "reference"):
        args = case.args(torch.float32, "cpu")
        with fastvit.backend(backend), FlopCounterMode(display=False) as counter:
            (out,) = tensors(case.kernel(**args))
            out.sum().backward()
        counts.append(counter.get_total_flops())
        assert any("fastvit" in str(o) for o in counter.get_flop_counts()["Global"]) == (backend == "triton")
    products = (7, 6) if "attention" in name else (1, 1)  # flash attention's backward computes the scores again
    assert counts[0] * products[1] == counts[1] * products[0] > 0
