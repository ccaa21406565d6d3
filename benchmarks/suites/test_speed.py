"""Micro-benchmarks of the ops and of a small model: ``pytest benchmarks --benchmark-only``.

They are for comparing one commit with another on one machine. Each runs at ViT-B's sizes (the model: ViT-S) and 224
pixels, on the GPU where there is one, on data that is the same in every run and stays in the caches. The backends of
one case stand in one group of the table. A result is compared with the reference's before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from benchmarks import op_impls
from fastvit import ops
from fastvit.cuda import extension
from fastvit.ops import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative error of an op's result, in the root mean square
MODEL_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}  # of logits: roundings add up (the tests hold models closer)
MODEL = "vit_small_patch16_224"
B = 64 if DEVICE.type == "cuda" else 1
SIZES = op_impls.sizes("vit_base_patch16_224", 224, B)
NAMES = ("patch_embed", "layer_norm", "linear+norm", "linear+gelu", "linear+residual", "mlp", "attention")
CASES = {name: op_impls.CASES[name] for name in NAMES} | {
    "attention q, k, v": op_impls.Case(
        "attention", lambda random, s: {name: random(B, s.tokens, s.heads, s.width // s.heads) for name in "qkv"}
    )
}


def clock() -> float:
    """Return seconds; on a GPU, after its work is done. pytest-benchmark reads it before and after each round."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# A round repeats the call until it lasts min_time, so that the synchronisation around it weighs little.
pytestmark = pytest.mark.benchmark(timer=clock, min_time=0.005, max_time=0.4, min_rounds=5, disable_gc=True)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, PyTorch multiplies in float32 but convolves in tf32, unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _arguments(case: str, dtype: str) -> dict[str, Any]:
    """Return the case's arguments, alike in every run."""
    torch.manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> nn.Parameter:
        return nn.Parameter((torch.randn(shape, device=DEVICE) * scale).to(DTYPES[dtype]))

    return CASES[case].arguments(random, SIZES)


def _op(case: str) -> str:
    return CASES[case].op


def _backends(op: str, gradients: bool) -> list[str]:
    """Return the backends that differ from one another on this device."""
    if DEVICE.type == "cuda":
        return ["reference", "triton"] if extension.MISSING else ["reference", "triton", "cuda"]
    return ["reference", "onednn"] if op in backends.ONEDNN_OPS and not gradients else ["reference"]


def _cases(gradients: bool) -> list[tuple[str, str, str]]:
    return [(case, d, backend) for case in CASES for d in DTYPES for backend in _backends(_op(case), gradients)]


def _time(benchmark: Any, run: Callable[[], object], name: str, dtype: str, backend: str) -> None:
    """Time ``run``, which has run before, in the group of ``name`` and ``dtype``."""
    device = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "cpu"
    benchmark.group = f"{name}, {dtype}"
    benchmark.extra_info.update(
        backend=backend, device=device, batch=B, threads=torch.get_num_threads(), torch=torch.__version__
    )
    benchmark(run)


def _check(run: Callable[[], Tensor], tolerance: float) -> None:
    """Check ``run`` against its result on the reference."""
    got = run().float()
    with fastvit.backend("reference"):
        expected = run().float()
    error = ((got - expected).norm() / expected.norm()).item()
    assert error <= tolerance, f"relative error {error:.1e} against the reference: not worth timing"


@pytest.mark.parametrize(("case", "dtype", "backend"), _cases(gradients=False))
def test_forward(benchmark: Any, case: str, dtype: str, backend: str) -> None:
    arguments = _arguments(case, dtype)

    def run() -> Tensor:
        out: Tensor = getattr(ops, _op(case))(**arguments)
        return out

    with fastvit.backend(backend), torch.no_grad():
        _check(run, TOLERANCE[dtype])
        _time(benchmark, run, f"{case} forward", dtype, backend)


@pytest.mark.parametrize(("case", "dtype", "backend"), _cases(gradients=True))
def test_backward(benchmark: Any, case: str, dtype: str, backend: str) -> None:
    arguments = _arguments(case, dtype)
    leaves = op_impls.leaves(arguments)
    with fastvit.backend(backend):
        out = getattr(ops, _op(case))(**arguments)
    upstream = torch.randn_like(out)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    run()
    _time(benchmark, run, f"{case} backward", dtype, backend)


def _model(dtype: str) -> tuple[fastvit.ViT, Tensor]:
    torch.manual_seed(0)
    model = fastvit.create_model(MODEL, device=DEVICE, dtype=DTYPES[dtype])
    return model, torch.randn(B, 3, 224, 224, device=DEVICE).to(DTYPES[dtype])


@pytest.mark.parametrize("backend", _backends("linear", gradients=False))
@pytest.mark.parametrize("dtype", DTYPES)
def test_model_forward(benchmark: Any, dtype: str, backend: str) -> None:
    model, images = _model(dtype)
    model.eval()

    def run() -> Tensor:
        out: Tensor = model(images)
        return out

    with fastvit.backend(backend), torch.no_grad():
        _check(run, MODEL_TOLERANCE[dtype])
        _time(benchmark, run, f"{MODEL} forward", dtype, backend)


@pytest.mark.parametrize("backend", _backends("linear", gradients=True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_model_training_step(benchmark: Any, dtype: str, backend: str) -> None:
    """Forward, cross-entropy, backward and a step of SGD."""
    model, images = _model(dtype)
    labels = torch.arange(B, device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    with fastvit.backend(backend):
        run()
        _time(benchmark, run, f"{MODEL} training step", dtype, backend)
