"""torch.export, ONNX and torch.compile of whole models: they see plain ATen ops, at any batch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastvit
from fastvit.cuda import extension

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
OPTIONS = {
    "plain": {},
    "average pool, registers": {"global_pool": "avg", "reg_tokens": 2, "init_values": 0.1},
    "map pool, qk-norm": {"global_pool": "map", "qk_norm": True},
    "pixels, dropped": {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "attn_drop_rate": 0.1, "drop_path_rate": 0.1},
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_exports_with_a_dynamic_batch(name: str, strict: bool) -> None:
    model = fastvit.ViT(**SIZES, **OPTIONS[name]).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all("fastvit" not in target for target in targets)
    for size in (1, 5):
        images = torch.randn(size, 3, 32, 32)
        torch.testing.assert_close(program.module()(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_onnx_with_a_dynamic_batch_and_size(name: str, tmp_path: Path) -> None:
    model = fastvit.ViT(**SIZES, **OPTIONS[name], dynamic_img_size=True).eval()
    rows, columns = (8 * torch.export.Dim(side, min=2, max=64) for side in ("rows", "columns"))
    shapes = {0: torch.export.Dim("batch"), 2: rows, 3: columns}
    program = torch.onnx.export(
        model, (torch.randn(2, 3, 32, 40),), dynamic_shapes=(shapes,), opset_version=18, dynamo=True, verbose=False
    )
    assert program is not None
    assert {node.domain for node in program.model_proto.graph.node} == {""}  # ONNX's own operators alone
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 32, 32), (5, 3, 48, 64)):
        images = torch.randn(shape)
        (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # g++ compiles the model: a minute
def test_compiles_ahead_of_time(tmp_path: Path) -> None:
    model = fastvit.ViT(**SIZES).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(package)
        for size in (1, 5):
            images = torch.randn(size, 3, 32, 32)
            torch.testing.assert_close(run(images), model(images), atol=1e-5, rtol=1e-5)


def test_symbolic_trace_keeps_the_ops_when_there_is_no_mask() -> None:
    model = fastvit.ViT(**SIZES).eval()
    graph = torch.fx.symbolic_trace(model, concrete_args={"attn_mask": None, "is_causal": False})
    names = [node.target.__name__ for node in graph.graph.nodes if callable(node.target)]
    assert names.count("attention_qkvpacked") == 1  # of the first block
    assert names.count("attention") == 1  # of the last one, for the class token
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(graph(images, None, False), model(images))


def test_compiles_with_inductor_forward_and_backward() -> None:
    torch._dynamo.reset()
    model = fastvit.ViT(**SIZES)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True)
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    gradients = torch.autograd.grad(compiled(images).square().sum(), list(model.parameters()))
    for ours, eager in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_for_a_gpu_it_runs_the_kernels(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph. The tensors are fake, so that no GPU is needed, and so is what the GPU says of itself."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(extension, "MISSING", None)
    monkeypatch.setitem(sys.modules, "fastvit._C", SimpleNamespace(ARCHITECTURES="9.0a"))
    extension.built_for.cache_clear()
    called: set[str] = set()

    def note(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    model = fastvit.ViT(
        **SIZES | {"num_heads": 1, "num_classes": 8}, **OPTIONS[name], device="meta", dtype=torch.bfloat16
    )
    fake: Any = FakeTensorMode()
    with fake, fastvit.backend(backend):
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        images = torch.empty(2, 3, 32, 32, dtype=torch.bfloat16, device="cuda")
        torch.compile(model, backend=note, fullgraph=True)(images)
    extension.built_for.cache_clear()
    assert {f"fastvit.{op}.default" for op in ("patch_embed", "attention", "mlp", "linear")} <= {
        target.replace("_qkvpacked", "") for target in called
    }
    assert not any("scaled_dot_product" in target or "conv" in target for target in called)
