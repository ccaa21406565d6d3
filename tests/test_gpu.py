"""The kernels on a GPU: every case of the interpreter natively, real shapes, and PyTorch's GPU machinery.

All of it on the Triton kernels and again on the CUDA ones. What these do not take is named, and must be refused in
words: a refusal of anything else fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch._inductor.compile_fx import compile_fx
from torch.utils._pytree import tree_map

import fastvit
from cases import CASES, FLOAT32_REFUSED, Case, refused_by_cuda, with_shared_residual
from fastvit import ops, reference
from fastvit.cuda import extension, linear
from numerics import DTYPES, assert_same_bits_twice, check_op

pytestmark = pytest.mark.gpu

HALF = (torch.float16, torch.bfloat16)
GIB = 2**30


Taken = Callable[[str | None], AbstractContextManager[object]]


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Taken]:
    """A context for what only Triton takes: given what backend cuda says of it, or None where both take it."""
    if request.param == "cuda" and extension.MISSING:
        pytest.skip(extension.MISSING)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions too are float32 where products are

    def context(said: str | None) -> AbstractContextManager[object]:
        refused = request.param == "cuda" and said is not None
        return pytest.raises(fastvit.BackendUnavailable, match=said) if refused else nullcontext()

    with fastvit.backend(request.param):
        yield context


def _in(dtype: torch.dtype) -> str | None:
    """What backend cuda says of products in a dtype."""
    return FLOAT32_REFUSED if dtype == torch.float32 else None


def _memory_for(gib: int) -> None:
    if torch.cuda.mem_get_info()[0] < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def _leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_is_as_right_as_eager(case: Case, dtype: torch.dtype, taken: Taken) -> None:
    with taken(refused_by_cuda(case, dtype)):
        check_op(case.kernel, case.reference, case.args(dtype, "cuda"))


@pytest.mark.parametrize("taken", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.op in ("linear", "mlp")], ids=str)
@pytest.mark.parametrize("run", ["library", "folded"])
def test_what_a_table_may_say(
    run: str, case: Case, dtype: torch.dtype, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products by cuBLASLt, its tanh GELU in inference, and norms folded in, which inference alone does."""
    monkeypatch.setattr(linear, "_run", lambda *args, **kw: run)
    args = case.args(dtype, "cuda")
    check_op(case.kernel, case.reference, args)
    check_op(case.kernel, case.reference, tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, args))


@pytest.mark.parametrize("taken", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mean", [0.0, 8.0, 100.0])
def test_a_norm_folded_in_of_rows_off_zero(
    mean: float, dtype: torch.dtype, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_run", lambda *args, **kw: "folded")
    x, weight, bias = (_leaf(*shape, dtype=dtype) for shape in ((4, 197, 768), (2304, 768), (2304,)))
    norm = (_leaf(768, dtype=dtype), _leaf(768, dtype=dtype), 1e-6)
    args = {"x": x + mean, "weight": weight * 768**-0.5, "bias": bias, "norm": norm}
    check_op(ops.linear, reference.linear, tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, args))


TOKENS = (1, 2, 15, 16, 17, 50, 65, 145, 197, 198, 257, 261, 577, 785, 1025, 1370)
HEAD_DIMS = (32, 64, 72, 80, 88, 96, 104, 128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_at_every_size(tokens: int, head_dim: int, dtype: torch.dtype, taken: Taken) -> None:
    args = {"qkv": _leaf(2, tokens, 3, 2, head_dim, dtype=dtype), "return_lse": True}
    with taken(_in(dtype)):
        check_op(ops.attention_qkvpacked, reference.attention_qkvpacked, args)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_attention_from_one_query(dtype: torch.dtype) -> None:
    q, k, v = (_leaf(4, t, 12, 64, dtype=dtype) for t in (1, 197, 197))
    check_op(ops.attention, reference.attention, {"q": q, "k": k, "v": v})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 197, 768), (8, 197, 768), (3, 577, 1024), (2, 257, 1280)])
def test_mlp_and_linear_at_real_sizes(batch: int, tokens: int, width: int, dtype: torch.dtype, taken: Taken) -> None:
    x = _leaf(batch, tokens, width, dtype=dtype)
    norm = (_leaf(width, dtype=dtype), _leaf(width, dtype=dtype), 1e-6)
    scale = width**-0.5
    args = {
        "x": x,
        "fc1_weight": _leaf(4 * width, width, dtype=dtype, scale=scale),
        "fc1_bias": _leaf(4 * width, dtype=dtype),
        "fc2_weight": _leaf(width, 4 * width, dtype=dtype, scale=scale),
        "fc2_bias": _leaf(width, dtype=dtype),
        "norm": norm,
        "gamma": _leaf(width, dtype=dtype),
    }
    with taken(_in(dtype)):
        check_op(with_shared_residual(ops.mlp), with_shared_residual(reference.mlp), args)
    args = {"x": x, "weight": _leaf(3 * width, width, dtype=dtype, scale=scale), "bias": None, "norm": norm}
    with taken(_in(dtype)):
        check_op(ops.linear, reference.linear, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("patch", "size"), [(16, (224, 224)), (14, (224, 126)), (32, (384, 384)), (8, (96, 64))])
def test_patch_embed_at_real_sizes(patch: int, size: tuple[int, int], dtype: torch.dtype, taken: Taken) -> None:
    tokens = (size[0] // patch) * (size[1] // patch)
    args = {
        "images": _leaf(3, 3, *size, dtype=dtype),
        "weight": _leaf(384, 3, patch, patch, dtype=dtype, scale=0.02),
        "bias": _leaf(384, dtype=dtype),
        "pos_embed": _leaf(1, 1 + tokens, 384, dtype=dtype),
        "prefix_tokens": _leaf(1, 1, 384, dtype=dtype),
    }
    with taken(_in(dtype)):
        check_op(ops.patch_embed, reference.patch_embed, args)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_deterministic(case: Case, taken: Taken) -> None:
    with taken(refused_by_cuda(case, torch.float16)):
        assert_same_bits_twice(case.kernel, case.args(torch.float16, "cuda"))


def test_offsets_past_two_to_the_31() -> None:
    """B * T * 3 * D elements of qkv pass 2^31; the last images are checked against the same images alone."""
    _memory_for(40)
    qkv = torch.randn(940, 1025, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    assert torch.equal(ops.attention_qkvpacked(qkv)[-2:], ops.attention_qkvpacked(qkv[-2:].clone()))
    rows, weight = qkv.view(-1, 768), torch.randn(64, 768, device="cuda", dtype=torch.bfloat16)
    tail = ops.linear(rows, weight)[-64:]
    torch.testing.assert_close(tail, ops.linear(rows[-64:].clone(), weight), atol=1e-2, rtol=1e-2)
    norm = torch.ones(768, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(ops.layer_norm(rows, norm, norm)[-64:], ops.layer_norm(rows[-64:].clone(), norm, norm))


# --- the model ------------------------------------------------------------------------------------------------


def _models(**kw):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_base_patch16_224", depth=3, **kw).cuda()
    ours = fastvit.create_model("vit_base_patch16_224", depth=3, **kw).cuda()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("init_values", [None, 0.1])
def test_model_is_as_right_as_timm_in_bfloat16(init_values: float | None) -> None:
    ours, theirs = _models(init_values=init_values)
    images = torch.randn(4, 3, 224, 224, device="cuda")
    exact = theirs.double()(images.double())
    logits = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.bfloat16()
        logits[name] = model(images.bfloat16())
    error = {name: (value.double() - exact).abs().max().item() for name, value in logits.items()}
    assert error["ours"] <= 2 * error["theirs"], error


def test_model_in_float32_equals_timm(taken: Taken) -> None:
    ours, theirs = _models()
    images = torch.randn(4, 3, 224, 224, device="cuda")
    with taken(FLOAT32_REFUSED):
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)


def test_model_compiles_forward_and_backward() -> None:
    ours, _ = _models()
    called: set[str] = set()

    def note(graph: torch.fx.GraphModule, inputs: object) -> Any:
        called.update(str(node.target) for node in graph.graph.nodes)
        return compile_fx(graph, inputs)

    compiled = torch.compile(ours, fullgraph=True, backend=note)
    images = torch.randn(4, 3, 224, 224, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, eager = compiled(images).float().square().mean(), ours(images).float().square().mean()
    loss.backward()
    torch.testing.assert_close(loss, eager, atol=1e-2, rtol=1e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    assert {"fastvit.patch_embed", "fastvit.mlp", "fastvit.attention_qkvpacked"} <= {
        name.removesuffix(".default") for name in called
    }


def test_model_in_a_cuda_graph() -> None:
    ours, _ = _models()
    ours.eval().bfloat16()
    images = torch.randn(4, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    run = fastvit.graphed(ours, [(4, 3, 224, 224), (1, 3, 224, 224)])
    with torch.no_grad():
        for _ in range(2):
            results = [(run(x), ours(x)) for x in (images, images[:1], images.neg())]
            for replayed, eager in results:  # the caller's own: no later replay wrote over them
                assert torch.equal(replayed, eager)
            next(ours.parameters()).mul_(1.5)  # in place: the graphs read the model's own weights
    with pytest.raises(ValueError, match=r"images \(2, 3, 224, 224\) in torch.bfloat16; captured: \[\(4, 3, "):
        run(images[:2])


def test_uint8_images_equal_normalised_ones(taken: Taken) -> None:
    ours, _ = _models()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    model = fastvit.create_model("vit_base_patch16_224", depth=3, mean=mean, std=std).cuda()
    model.load_state_dict(ours.state_dict())
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, device="cuda")
    floats = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(mean, device="cuda").view(3, 1, 1)) / torch.tensor(
        std, device="cuda"
    ).view(3, 1, 1)
    with taken(FLOAT32_REFUSED):
        torch.testing.assert_close(model(images), ours(floats), atol=1e-4, rtol=1e-4)


def test_training_keeps_less_memory_than_timm() -> None:
    ours, theirs = _models()
    peaks = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.bfloat16()
        images = torch.randn(64, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
        model(images[:1]).sum().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model(images).sum()
        peaks[name] = torch.cuda.memory_allocated() - before
        loss.backward()
        del loss, images
    assert peaks["ours"] <= 0.65 * peaks["theirs"], peaks


def test_threads_and_streams() -> None:
    x, w = (torch.randn(n, 256, device="cuda", dtype=torch.bfloat16) for n in (64, 256))
    expected = ops.linear(x, w)
    results: list[torch.Tensor | None] = [None] * 8

    def run(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results[i] = ops.linear(x, w)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    workers = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(r is not None and torch.equal(r, expected) for r in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_inputs_on_another_device_than_the_current_one() -> None:
    x, w = (torch.randn(n, 64, device="cuda:1", dtype=torch.float16) for n in (8, 64))
    with torch.cuda.device(0):
        torch.testing.assert_close(ops.linear(x, w), x @ w.T, atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="cuda:0.*cuda:1"):
        ops.linear(x, w.to("cuda:0"))
