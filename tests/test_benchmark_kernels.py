"""The suites ``kernels`` and ``waterfall``: what they count, that wrong kernels are not timed, that caches are cold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import fastvit
from benchmarks import op_impls
from benchmarks.measurements import Measurement, MeasurementFailed, Unavailable
from benchmarks.op_impls import CASES
from benchmarks.suite import Options, run
from benchmarks.suites import kernels, waterfall
from fastvit import ops
from fastvit.ops import backends

MODEL = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"dtypes": ("float32",), "models": (MODEL,), "sizes": (32,), "batches": (1,), "budget": 0.01}


def measurement(contender: str, op: str, direction: str = "forward", dtype: str = "float32") -> Measurement:
    what = {"op": op, "model": MODEL, "size": 32, "batch": 2, "direction": direction, "dtype": dtype}
    return Measurement(contender, tuple(what.items()))


@pytest.fixture
def _own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a contender sets for good in the process that is its own; and make little data."""
    monkeypatch.setattr(kernels, "cache_bytes", lambda device: 2**15)
    monkeypatch.setattr(kernels.measure, "SLICE", 1e-3)
    cuda = torch.backends.cuda
    enabled = [cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled()]
    with fastvit.backend(backends.setting()):
        yield
    for name, value in zip(("flash", "cudnn", "mem_efficient", "math"), [*enabled, True], strict=True):
        getattr(cuda, f"enable_{name}_sdp")(value)


# --- FLOPs and bytes ------------------------------------------------------------------------------------------


# ViT-B/16 at 224 px, batch 256, bfloat16, by hand. x is (50432, 768): 38.73e6 elements, 77.46 MB.
X = 256 * 197 * 768
MIX, PAIRS = (64 * sum(n**power for n in (50, 394, 99, 247)) for power in (1, 2))  # tokens of 256 images of a mix
FORWARD = {  # case: (multiply-adds, elements read and written)
    "attention": (2 * 256 * 12 * 197 * 197 * 64, 3 * X + X),
    "attention+bias": (2 * 256 * 12 * 197 * 197 * 64, 3 * X + X + 12 * 197 * 197),
    "attention+table": (2 * 256 * 12 * 197 * 197 * 64, 3 * X + X + (27 * 27 + 3) * 12),
    "attention+distances": (3 * 256 * 12 * 197 * 197 * 64, 3 * X + X + 393 * 64),
    "attention+mask": (2 * 256 * 12 * 197 * 197 * 64, 3 * X + X + 256 * 197 // 2),  # bytes
    "attention+packed": (2 * 768 * PAIRS, 4 * MIX * 768 + 2 * 257),  # starts in int32
    "rotate": (0, 4 * X + 2 * 2 * 196 * 64),  # angles in float32
    "linear+norm": (X * 2304, X + 2 * 768 + 2304 * 768 + 2304 + 3 * X),
    "linear+residual": (X * 768, X + 768 * 768 + 768 + X + X),
    "linear+gelu": (X * 3072, X + 3072 * 768 + 3072 + 4 * X),
    "mlp": (2 * X * 3072, X + 2 * 768 + 2 * 3072 * 768 + 3072 + 768 + X),
    "layer_norm": (0, X + 2 * 768 + X),
    "layer_norm+residual": (0, 2 * X + 2 * 768 + 2 * X),
    "patch_embed": (256 * 196 * 768 * 768, 256 * 3 * 224**2 + 768 * 768 + 768 + 197 * 768 + 768 + X),
}
BACKWARD = {
    "attention": (5 * 256 * 12 * 197 * 197 * 64, X + 3 * X + 3 * X),
    "attention+distances": (8 * 256 * 12 * 197 * 197 * 64, X + 3 * X + 3 * X + 2 * 393 * 64),
    "attention+packed": (5 * 768 * PAIRS, 7 * MIX * 768 + 2 * 257),
    "linear+residual": (2 * X * 768, X + 2 * (X + 768 * 768 + 768)),
    "mlp": (4 * X * 3072, X + 2 * (X + 2 * 768 + 2 * 3072 * 768 + 3072 + 768)),
    "layer_norm": (0, X + 2 * (X + 2 * 768)),
    "patch_embed": (256 * 196 * 768 * 768, 256 * 3 * 224**2 + 2 * (768 * 768 + 768 + 197 * 768 + 768) + X),
}


@pytest.mark.parametrize("backward", [False, True])
def test_flops_and_bytes_equal_a_count_by_hand(backward: bool) -> None:
    sizes = op_impls.sizes("vit_base_patch16_224", 224, 256)
    for name, (products, elements) in (BACKWARD if backward else FORWARD).items():
        found = op_impls.work(CASES[name], sizes, torch.bfloat16, backward=backward)
        assert (found.flops, found.bytes) == (2 * products, 2 * elements), name


def test_sizes_are_the_models() -> None:
    assert op_impls.sizes("vit_huge_patch14_224", 224, 64) == (64, 224, 14, 257, 1280, 16, 5120)
    assert op_impls.sizes("vit_base_patch16_224", 100, 1)[1:4] == (96, 16, 37)
    with pytest.raises(ValueError, match="resnet50 has none of the ops"):
        op_impls.sizes("resnet50", 224, 1)
    with pytest.raises(ValueError, match="8 pixels are too few"):
        op_impls.sizes(MODEL, 8, 1)


# --- contenders -----------------------------------------------------------------------------------------------


ON_GPUS = ("sdpa-cudnn", "sdpa-efficient", "xformers", "varlen", "flex", "cublaslt", *op_impls.OURS)


@pytest.mark.usefixtures("_own_process")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_contender_computes_the_op(direction: str) -> None:
    tried = set()
    for op, case in CASES.items():
        for dtype in ("float32", "bfloat16"):
            expected = kernels.Kernel(measurement("torch", op, direction, dtype), "cpu").expected()
            for name in case.impls:
                if name == "torch-compile":  # seconds of its compiler; below
                    continue
                with fastvit.backend("auto"):
                    try:
                        subject = kernels.Kernel(measurement(name, op, direction, dtype), "cpu")
                    except (Unavailable, fastvit.BackendUnavailable) as error:
                        masked = name == "sdpa-flash" and op != "attention"  # no gradient of a mask
                        assert name in ON_GPUS or masked, error
                        continue
                    assert subject.prepare(expected, None)["error_ratio"] < 20, (op, name)
                    assert subject.sample()[0] > 0
                tried.add(name)
    assert tried >= {"torch", "fastvit", "fastvit-reference", "sdpa-flash", "sdpa-math", "unfold"}


@pytest.mark.parametrize("op", ["attention+bias", "attention+table", "attention+mask", "attention+packed"])
def test_flex_attention_computes_the_same(op: str) -> None:
    """Here it is not compiled, and so can run on a CPU."""
    with torch.no_grad():
        arguments = CASES[op].arguments(lambda *shape: torch.randn(shape), op_impls.sizes(MODEL, 32, 2))
        found = op_impls.flex(arguments, flex_attention)(**arguments)
        torch.testing.assert_close(found, ops.attention_qkvpacked(**arguments))


@pytest.mark.usefixtures("_own_process")
def test_a_backend_of_sdpa_is_the_only_one() -> None:
    attention = CASES["attention"]
    arguments = {"qkv": torch.randn(1, 5, 3, 2, 16)}
    attention.impls["sdpa-math"]("attention_qkvpacked", arguments)
    assert torch.backends.cuda.math_sdp_enabled()
    assert not torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(Unavailable, match=r"no kernel for these tensors \(cpu\)"):
        attention.impls["sdpa-cudnn"]("attention_qkvpacked", arguments)
    assert not torch.backends.cuda.math_sdp_enabled()


@pytest.mark.usefixtures("_own_process")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", ["linear+norm", "linear+residual", "linear+gelu", "linear+gelu_tanh", "mlp"])
def test_cublaslts_calls_compute_the_op(op: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU they would be another library's, and are no contender; there they are checked."""
    expected = kernels.Kernel(measurement("torch", op, direction, "bfloat16"), "cpu").expected()
    with pytest.raises(Unavailable, match="CUDA devices only"):
        kernels.Kernel(measurement("cublaslt", op, direction, "bfloat16"), "cpu")
    monkeypatch.setitem(op_impls.LINEAR, "cublaslt", lambda op, arguments: op_impls.with_epilogues(op))
    subject = kernels.Kernel(measurement("cublaslt", op, direction, "bfloat16"), "cpu")
    assert subject.prepare(expected, None)["error_ratio"] <= 2


@pytest.mark.usefixtures("_own_process")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_call_is_on_the_next_of_many_arguments(direction: str) -> None:
    calls: list[int] = []
    subject = kernels.Kernel(measurement("torch", "layer_norm", direction), "cpu")
    right = subject.function

    def counted(**arguments: torch.Tensor) -> Any:
        calls.append(arguments["x"].data_ptr())
        return right(**arguments)

    subject.function = counted
    subject.prepare(subject.expected(), None)
    rows = 4 * 2 * 5 * 192  # bytes of x, and of the outputs' gradients: 2 images of 5 tokens
    read = rows + 2 * 4 * 192 + (rows if direction == "backward" else 0)
    assert len(subject.sets) == -(-2 * 2**15 // read) > 2
    assert len({given["x"].data_ptr() for given, _ in subject.sets}) == len(subject.sets)
    before = len(calls)
    for _ in subject.sets:
        subject.run()
    # A backward pass runs no forward pass again; forward every set is read once in a lap.
    assert sorted(calls[before:]) == (
        [] if direction == "backward" else sorted(g["x"].data_ptr() for g, _ in subject.sets)
    )


class Wrong(kernels.Kernel):
    """fastvit's is off by 1%."""

    def __init__(self, measurement: Measurement, device: str) -> None:
        super().__init__(measurement, device)
        right = self.function
        if measurement.contender == "fastvit":
            self.function = lambda **arguments: 1.01 * right(**arguments)
            self.found = self._results(self.function, self.arguments)


@pytest.mark.usefixtures("_own_process")
@pytest.mark.parametrize(("direction", "what"), [("forward", "output 0"), ("backward", "gradient 0")])
def test_a_kernel_off_by_a_percent_is_refused(direction: str, what: str) -> None:
    for op in ("attention", "mlp", "layer_norm", "patch_embed"):
        expected = kernels.Kernel(measurement("torch", op, direction), "cpu").expected()
        with fastvit.backend("auto"), pytest.raises(MeasurementFailed, match=f"wrong {what}: the largest error is"):
            Wrong(measurement("fastvit", op, direction), "cpu").prepare(expected, None)


# --- whole runs -----------------------------------------------------------------------------------------------


def test_kernels_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CASES", {"attention": CASES["attention"]})
    contenders = ("torch", "fastvit", "fastvit-triton")
    options = Options(contenders=contenders, modes=("inference", "training"), **(TINY | {"batches": (64,)}))
    rows = run(kernels.SUITE, options, tmp_path, "a test")
    assert [(row["direction"], row["contender"]) for row in rows] == [
        (direction, contender) for direction in ("forward", "backward") for contender in contenders
    ]
    assert (tmp_path / "kernels.csv").exists()
    for row in rows:
        if row["contender"] == "fastvit-triton":
            assert row["status"] == "unavailable"
            assert "triton takes CUDA tensors" in row["reason"]
            continue
        assert row["status"] == "ok", row
        assert row["shape"] == "64x5x3x3x64"
        assert row["timed"] == "wall clock"
        assert row["sets"] >= 2
        assert row["tflops_per_s"] == pytest.approx(row["flops"] / row["median_s"] / 1e12)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
        compute, memory = row["flops"] / row["peak_tflops_per_s"] / 1e12, row["bytes"] / row["copy_gb_per_s"] / 1e9
        assert row["floor_s"] == pytest.approx(max(compute, memory))
        assert row["floor_percent"] == pytest.approx(100 * row["floor_s"] / row["median_s"])
        assert 0 < row["floor_percent"] < 200  # of its own time, give or take noise
    assert rows[0]["flops"] == 4 * 64 * 5 * 5 * 192


def test_a_wrong_kernel_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CASES", {"layer_norm": CASES["layer_norm"]})
    monkeypatch.setattr(kernels, "Kernel", Wrong)
    options = Options(contenders=("torch", "fastvit"), **(TINY | {"batches": (64,)}))
    right, wrong = run(kernels.SUITE, options, tmp_path, "a test")
    assert right["status"] == "ok"
    assert wrong["status"] == "failed"
    assert wrong["reason"].startswith("wrong output 0: the largest error is")
    assert "median_s" not in wrong


def test_waterfall_end_to_end(tmp_path: Path) -> None:
    steps = waterfall.STEPS["cpu"]
    rows = run(waterfall.SUITE, Options(contenders=steps, **TINY), tmp_path, "a test")
    assert tuple(row["contender"] for row in rows) == steps
    for row in rows:
        assert row["status"] == "ok", row
        assert row["batch"] == 1
        assert row["images_per_s"] == pytest.approx(1 / row["median_s"])
        assert row["ratio"] == pytest.approx(row["images_per_s"] / rows[0]["images_per_s"])


def test_each_step_of_the_waterfall_adds_one_thing() -> None:
    what = (("model", MODEL), ("size", 32), ("mode", "inference"), ("dtype", "float32"))
    seen = []
    with fastvit.backend("auto"):
        for name in waterfall.STEPS["cpu"]:
            step = waterfall.Step(Measurement(name, what), "cpu", (1,))
            fused = [op for op in backends.OPS if backends.setting(op) == "onednn"]
            assert all(backends.setting(op) == "reference" for op in backends.OPS if op not in fused)
            seen.append((fused, isinstance(step.model, waterfall.EveryToken)))
    steps = [["patch_embed", "linear", "mlp"][:count] for count in range(4)]
    assert seen == [*((step, True) for step in steps), (steps[-1], False)]
    assert {waterfall.step_of(op) for op in backends.OPS} < set(waterfall.STEPS["cuda"])


def test_bad_options_name_what_is_accepted(tmp_path: Path) -> None:
    for suite, options, message in (
        (kernels.SUITE, {"contenders": ("flash",)}, "no contender 'flash'; accepted: torch, sdpa-flash"),
        (kernels.SUITE, {"models": ("resnet50",), "contenders": ("torch",)}, "resnet50 has none of the ops"),
        (
            waterfall.SUITE,
            {"contenders": ("attention",)},
            "no step 'attention' on a cpu; accepted: reference, patch_embed, linear, mlp",
        ),
        (waterfall.SUITE, {"models": ("resnet50",), "contenders": ("mlp",)}, "resnet50 has nothing to fuse"),
    ):
        with pytest.raises(ValueError, match=message):
            run(suite, Options(**options), tmp_path, "a test")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    """Every contender of both suites, at small sizes."""
    both = {"device": "cuda", "sizes": (64,), "models": (MODEL,), "batches": (8,), "budget": 0.1}
    for suite in (kernels.SUITE, waterfall.SUITE):
        rows = run(suite, replace(suite.defaults["cuda"], **both), tmp_path, "a test")
        assert not [row for row in rows if row["status"] == "failed"]
        assert all(row["status"] == "ok" for row in rows if row["contender"] not in ("xformers", "sdpa-cudnn"))
