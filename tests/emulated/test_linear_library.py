"""The linear layer by cuBLASLt's calls, which the CPU runs here, where a table says so; and how a table comes to be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_linear as kernels
import torch

import fastvit
from cases import CASES, Case
from fastvit import env
from fastvit.activations import ACTIVATIONS
from fastvit.cuda import cublas, extension, linear
from fastvit.cuda.linear import KERNEL, linear_forward, linear_input_gradient, linear_weight_gradient
from fastvit.triton import tiles
from fastvit.triton.tiles import Problem
from fastvit.tuning import candidates, tune
from numerics import check_op

CPU = torch.device("cpu")
HALF = (torch.float16, torch.bfloat16)
LINEAR = [case for case in CASES if case.op in ("linear", "mlp")]


class _NoProducts:
    """The extension without the kernels of linear layers: they fail the test that launches one."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        assert not name.startswith("linear_"), f"{name} was launched"
        return getattr(self.library, name)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache; CPU tensors are those of a GPU named interpreter."""
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path))
    tiles.reload()
    yield tmp_path
    tiles.reload()


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "library", _NoProducts(extension.library))


def answer(found: dict[Problem, Any], run: str) -> tune.Table:
    """A table in the cache that says ``run`` to these problems; "kernel" where that is no answer."""
    table = tune.Table(tune.table_path(None, "interpreter"), "interpreter", 80)
    for problem in found:
        runs = tiles.RUNS[problem.fields["op"]]
        tile = {"run": run if run in runs else "kernel"}
        table.add(problem, {"size": problem.size, "key": problem.fields, "tile": tile})
    return table


# --- every combination ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_ops_by_a_table_that_says_library(
    case: Case, dtype: torch.dtype, no_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and every gradient; what is problems again is answered by the table, and no kernel runs."""
    with fastvit.backend("cuda"):
        with monkeypatch.context() as patch, tiles.record_problems() as found:
            # the kernels, which run where nothing is measured
            patch.setattr(extension, "library", extension.library.library)
            check_op(case.kernel, case.reference, case.args(dtype, "cpu"))
        assert {tile["run"] for tile in found.values()} == {"kernel"}
        answer(found, "library")
        with tiles.record_problems() as taken:
            check_op(case.kernel, case.reference, case.args(dtype, "cpu"))
    assert taken.keys() == found.keys()
    assert {tile["run"] for tile in taken.values()} == {"library"}


@pytest.fixture
def by_library(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_run", lambda *args, **kw: "library")


@pytest.mark.usefixtures("by_library")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", ["plain", *ACTIVATIONS, "residual", "gamma", "all"])
def test_epilogue(case: str, dtype: torch.dtype) -> None:
    kernels.test_epilogue(dtype, case)


@pytest.mark.usefixtures("by_library")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_residual_without_a_bias(dtype: torch.dtype) -> None:
    """beta * C; not with a float32 residual, a pre-activation or scales."""
    m, n = kernels.SIZES["small"]
    x, weight = kernels.strided(m, 72, dtype), torch.randn(n, 72).to(dtype)
    for case, save in (("residual", False), ("residual", True), ("gamma", False), ("all", False)):
        extra = {**kernels.extras(case, m, n, dtype), "bias": None, "activation": None}
        kernels.check_forward(x, weight, extra, save)
    scaled = {"row_scale": torch.rand(m // kernels.ROWS), "gamma": torch.randn(n)}
    out, _ = linear_forward(x, weight, **scaled)
    zero = torch.zeros(m, n, dtype=dtype)
    assert torch.equal(out, linear_forward(x, weight, residual=zero, **scaled)[0])


@pytest.mark.usefixtures("by_library")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gamma", ["", "narrow", "wide"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_input_gradient(activation: str | None, gamma: str, dtype: torch.dtype) -> None:
    kernels.test_input_gradient("small", activation, dtype, gamma)
    kernels.test_input_gradient_out_dtype()


@pytest.mark.usefixtures("by_library")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("m", [1, 520])
def test_weight_gradient(m: int, dtype: torch.dtype) -> None:
    kernels.test_weight_gradient("small", m, dtype)


@pytest.mark.usefixtures("by_library")
def test_empty() -> None:
    weight, rows = torch.randn(72, 40).half(), torch.randn(0, 40).half()
    out, preact = linear_forward(rows, weight, activation="gelu", save_preact=True, row_scale=torch.rand(0))
    assert preact is not None and out.shape == preact.shape == (0, 72)
    dx, hidden = linear_input_gradient(out, weight, preact=rows, activation="gelu")
    assert hidden is not None and dx.shape == hidden.shape == (0, 40)
    dweight, dbias, _ = linear_weight_gradient(out, rows)
    assert dbias is not None and not dweight.any() and not dbias.any()


def test_tanh_gelu_is_an_epilogue_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """_addmm_activation is GELU by erf on a CPU, which is why it is not called there."""
    x, weight, bias = torch.randn(9, 16).double(), torch.randn(8, 16).double(), torch.randn(8).double()
    y = torch._addmm_activation(bias, x, weight.mT, use_gelu=True)
    exact = torch.nn.functional.gelu(x @ weight.mT + bias)
    torch.testing.assert_close(y, exact)
    monkeypatch.setattr(torch, "_addmm_activation", None)
    rest: dict[str, Any] = {"residual": None, "gamma": None, "row_scale": None, "save_preact": False}
    out, _ = cublas.linear_forward(x, weight, bias, activation="gelu_tanh", **rest)
    torch.testing.assert_close(out, torch.nn.functional.gelu(x @ weight.mT + bias, approximate="tanh"))


def test_every_combination_is_a_problem_of_its_own() -> None:
    x, weight, bias = torch.randn(8, 16).half(), torch.randn(24, 16).half(), torch.randn(24).half()
    residual = torch.randn(8, 24)
    with tiles.record_problems() as found:
        for extra in (
            {},
            {"activation": "gelu"},
            {"save_preact": True},
            {"residual": residual},
            {"residual": residual.half()},
            {"residual": residual, "gamma": residual[0]},
        ):
            linear_forward(x, weight, bias, **extra)  # type: ignore[arg-type]
        linear_input_gradient(residual.half(), weight)
        linear_input_gradient(residual.half(), weight, gamma=bias)
        for need_bias in (False, True):
            linear_weight_gradient(residual.half(), x, need_bias=need_bias)
    assert len(found) == 10
    with tiles.record_problems() as twice:
        linear_forward(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert twice.keys() < found.keys()  # both 16-bit types are one


# --- fastvit tune --backend cuda ------------------------------------------------------------------------------


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> tune.Problems:
    monkeypatch.setattr(tune, "SECONDS", 0)
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 1, "num_classes": 16}
    found: tune.Problems = {}
    for more in ({}, {"init_values": 0.1, "mlp_layer": fastvit.layers.SwiGLU}):
        for training in (False, True):
            model = fastvit.ViT(**options, **more, device="meta", dtype=torch.bfloat16)
            images = torch.empty(2, 3, 8, 8, device="meta", dtype=torch.bfloat16, requires_grad=training)
            some = candidates.find_problems(model, images, 80, training=training, backend="cuda")
            found |= {problem: (torch.bfloat16, tile) for problem, tile in some.items()}
    return found


def test_every_product_of_a_model_has_a_call_and_passes_its_check(problems: tune.Problems) -> None:
    assert {p.family for p in problems} == {"cuda"}
    assert {p.fields["op"] for p in problems} == set(tiles.RUNS)
    assert {p.fields["activation"] for p in problems} == {None, "gelu", "swiglu"}
    for problem, (dtype, derived) in problems.items():
        assert derived == KERNEL
        assert candidates.is_reproducible(problem, dtype, 80), str(problem)
        check = tune.AccuracyCheck(candidates.launcher_call(problem, dtype, CPU), derived)
        tried = candidates.candidate_configs(problem, 80, 3)
        assert [tile["run"] for tile in tried] == list(tiles.RUNS[problem.fields["op"]])
        assert check.failure(tried[1]) is None, str(problem)


def test_a_library_that_is_wrong_fails(problems: tune.Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cublas._product
    problem = next(p for p in problems if p.fields["op"] == "input")
    check = tune.AccuracyCheck(candidates.launcher_call(problem, torch.bfloat16, CPU), KERNEL)
    monkeypatch.setattr(cublas, "_product", lambda a, b, dtype: 1.02 * right(a, b, dtype))
    assert "wrong by" in str(check.failure({"run": "library"}))


def test_a_run_writes_what_a_launch_then_reads(problems: tune.Problems, folder: Path) -> None:
    some = {p: problems[p] for p in list(problems)[:3]}
    table = tune.Table.open(tune.table_path(None, "interpreter"), "interpreter", 80)
    assert table.path.is_relative_to(folder)
    assert tune.tune(some, table, CPU) == 0
    read = tiles.read(table.path, "interpreter")
    assert read is not None and read.keys() == some.keys()
    for problem, row in read.items():
        assert row["timed"] == 1 and row["refused"] == {}
        with tiles.record_problems() as taken:
            candidates.launcher_call(problem, torch.bfloat16, CPU).run()
        assert taken[problem] == row["tile"]
    sources = tiles.sources("interpreter")
    assert f"backend cuda, kernel or cuBLASLt, measured, 3 problems: {table.path}" in sources
    assert f"tiles       {sources[1]}" in env.render(env.report() | {"tiles": sources})
