"""A LayerNorm folded into the linear layer after it, by both generations' GEMMs: as right as one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_linear import SIZES as SM80_SIZES
from test_linear_sm90 import SIZES as SM90_SIZES
from torch import Tensor

import fastvit
from fastvit import ops, reference
from fastvit.activations import ACTIVATIONS, GATED
from fastvit.cuda import extension, linear
from fastvit.cuda.layer_norm import layer_norm_forward
from fastvit.cuda.linear import fold_norm, linear_folded_forward, linear_normed_forward
from fastvit.triton import tiles
from fastvit.tuning import tune
from numerics import assert_as_right_as_eager, check_op, strided

HALF = (torch.float16, torch.bfloat16)
EPS = 1e-6
# One (architecture, (M, N, K)) for each tile, as the other tests have them; with ends of tiles and of steps.
TILES = [(80, (*size, 104)) for size in SM80_SIZES.values()] + [(90, size) for size in SM90_SIZES[:4]]


@pytest.fixture(autouse=True)
def _restore():
    yield
    extension.set_architecture(80)


def layer(n: int, k: int, dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    """A linear layer behind a norm, scaled as in a network; norm and bias in float32."""
    norm = (1 + 0.5 * torch.randn(k), 0.5 * torch.randn(k), EPS)
    return {"norm": norm, "weight": (torch.randn(n, k) * k**-0.5).to(dtype), "bias": torch.randn(n), **changes}


def check(x: Tensor, activation: str | None, **given: Any) -> None:
    """out, mean and rstd by the rule; what is eager is LayerNorm and then the product."""
    out, mean, rstd = linear_folded_forward(x, activation=activation, **given)
    assert out.dtype == x.dtype and mean.dtype == rstd.dtype == torch.float32

    def expected(to: torch.dtype | None) -> list[Tensor]:
        def cast(t: Any) -> Any:
            return t.to(to) if to is not None and isinstance(t, Tensor) else t

        norm = tuple(map(cast, given["norm"]))
        y = reference.linear(cast(x), cast(given["weight"]), cast(given["bias"]), norm=norm)
        rows = x.to(to or torch.float32)
        rstd = (rows.var(1, correction=0) + EPS).rsqrt()
        return [reference.activate(y, activation), rows.mean(1), rstd]

    assert_as_right_as_eager([out, mean, rstd], expected(None), expected(torch.float64), ["out", "mean", "rstd"])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("arch", "size"), TILES, ids=str)
def test_tiles(arch: int, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    extension.set_architecture(arch)
    m, n, k = size
    check(strided(m, k, dtype), "gelu", **layer(n, k, dtype))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS, *GATED])
def test_activations_and_parameters(activation: str | None, arch: int) -> None:
    """Without biases too; parameters in 16 bits; rows that no vector reads."""
    extension.set_architecture(arch)
    x = torch.randn(21, 41).half()[:, 1:]
    norm = (torch.randn(41).half()[1:], None, EPS)
    check(x, activation, **layer(48, 40, torch.float16, norm=norm, bias=None))


# What a stream looks like: rows off zero by many deviations, and channels larger than the others.
STREAMS = {
    "off by 8 deviations": lambda m, k: torch.randn(m, k) + 8,
    "off by 100": lambda m, k: torch.randn(m, k) - 100,
    "of all sizes": lambda m, k: (torch.randn(m, k) + 3) * torch.logspace(-3, 3, m).view(-1, 1),
    "with large channels": lambda m, k: torch.randn(m, k) * (1 + 60 * (torch.arange(k) % 32 == 5)),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("stream", STREAMS)
def test_streams(stream: str, arch: int, dtype: torch.dtype) -> None:
    extension.set_architecture(arch)
    check(STREAMS[stream](29, 264).to(dtype), None, **layer(72, 264, dtype))


@pytest.mark.parametrize("arch", [80, 90])
def test_where_folding_is_not_as_right(arch: int) -> None:
    """Rows that do not vary at all, far from zero: what is left of the difference is multiplied by 1 / sqrt(eps).

    docs/explanation/cuda.md says so; this is why a table has to ask for it.
    """
    extension.set_architecture(arch)
    x = torch.full((8, 264), 300.0).half()
    given = layer(72, 264, torch.float16)
    with pytest.raises(AssertionError, match="out: error"):
        check(x, None, **given)
    out, _, _ = linear_normed_forward(x, given["norm"], given["weight"], given["bias"])
    wide = [t.double() if isinstance(t, Tensor) else t for t in given["norm"]]
    exact = reference.linear(x.double(), given["weight"].double(), given["bias"].double(), norm=tuple(wide))
    assert_as_right_as_eager(out, reference.linear(x, **given), exact)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_fold_norm(dtype: torch.dtype, wide: bool) -> None:
    """More columns than a block takes at once, and parameters of both kinds."""
    n, k = 5, 2120
    weight, (g, b, bias) = torch.randn(n, k).to(dtype), (torch.randn(size) for size in (k, k, n))
    if not wide:
        g, b, bias = (t.to(dtype) for t in (g, b, bias))
    folded, sums, offsets = fold_norm(weight, bias, g, b)
    assert torch.equal(folded, (weight.float() * g.float()).to(dtype))
    exact = [folded.double().sum(1), weight.double() @ b.double() + bias]
    assert_as_right_as_eager([sums, offsets], [folded.float().sum(1), weight.float() @ b.float() + bias], exact)
    folded, sums, offsets = fold_norm(weight, None, None, None)
    assert torch.equal(folded, weight) and not offsets.any()


def test_statistics_alone_are_the_norms() -> None:
    x = strided(37, 96, torch.bfloat16) + 3
    _, _, mean, rstd = layer_norm_forward(x, None, None, EPS)
    given = layer(8, 96, torch.bfloat16)
    for ours, theirs in zip(linear_folded_forward(x, **given)[1:], (mean, rstd), strict=True):
        assert torch.equal(ours, theirs)


def test_empty() -> None:
    for arch in (80, 90):
        extension.set_architecture(arch)
        out, mean, rstd = linear_folded_forward(torch.empty(0, 16).half(), **layer(24, 16, torch.float16))
        assert out.shape == (0, 24) and mean.shape == rstd.shape == (0,)


@pytest.mark.parametrize("arch", [80, 90])
def test_refusals(arch: int) -> None:
    extension.set_architecture(arch)
    x, weight, out = torch.randn(6, 16).half(), torch.randn(32, 16).half(), torch.empty(6, 32).half()
    rows, columns = torch.rand(6), torch.rand(32)
    forward = torch.ops.fastvit_emulated.linear_folded_forward
    for given in [
        (None, columns, rows, rows),
        (columns, columns.half(), rows, rows),
        (columns, columns, rows[:5], rows),
        (columns, columns, rows, None),
    ]:
        with pytest.raises(RuntimeError, match=r"linear_folded_forward: .*(sums|offsets|mean|rstd).*accepted: "):
            forward(x, x, weight, *given, "", out)
    with pytest.raises(RuntimeError, match="out is float32; accepted: float16"):
        forward(x, x, weight, columns, columns, rows, rows, "", out.float())
    with pytest.raises(RuntimeError, match='unknown activation "swiglu"'):
        forward(x, x, weight, columns, columns, rows, rows, "swiglu", out)
    fold = torch.ops.fastvit_emulated.fold_norm
    with pytest.raises(RuntimeError, match="a width of 12; accepted: multiples of 8"):
        fold(x, x[:, :12].contiguous(), None, None, None, x[:, :12].contiguous(), rows, rows)
    with pytest.raises(RuntimeError, match="weight is float32"):
        fold(x, x.float(), None, None, None, x.float(), rows, rows)


# --- chosen by a table ----------------------------------------------------------------------------------------


@pytest.fixture
def folds(tmp_path, monkeypatch):
    """A function that lets a table say "folded" to whatever a call asks of op "normed"."""
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path))
    tiles.reload()

    def answer(call: Any) -> None:
        with tiles.record_problems() as found:
            call()
        table = tune.Table(tune.table_path(None, "interpreter"), "interpreter", 80)
        for problem in found:
            if problem.fields["op"] == "normed":
                table.add(problem, {"size": problem.size, "key": problem.fields, "tile": {"run": "folded"}})

    yield answer
    tiles.reload()


def _block(dtype: torch.dtype, grad: bool) -> dict[str, Any]:
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype).requires_grad_(grad)

    return {
        "x": random(2, 9, 32),
        "fc1_weight": random(64, 32, scale=0.2),
        "fc1_bias": random(64),
        "fc2_weight": random(32, 64, scale=0.2),
        "fc2_bias": random(32),
        "norm": (random(32), random(32), EPS),
    }


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_inference_folds_where_a_table_says_so(
    folds: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, arch: int
) -> None:
    extension.set_architecture(arch)
    calls = []
    right = linear_folded_forward

    def spy(*args: Any, **kw: Any) -> Any:
        calls.append(kw["activation"])
        return right(*args, **kw)

    monkeypatch.setattr(linear, "linear_folded_forward", spy)
    args = _block(dtype, grad=False)
    plain = {"x": args["x"], "weight": args["fc1_weight"], "bias": args["fc1_bias"], "norm": args["norm"]}
    with fastvit.backend("cuda"):
        for op, given, activation in (("linear", plain, None), ("mlp", args, "gelu")):
            kernel, eager = getattr(ops, op), getattr(reference, op)
            folds(lambda kernel=kernel, given=given: kernel(**given))
            assert calls == []
            check_op(kernel, eager, given)
            assert calls == [activation]
            calls.clear()
        trained = _block(dtype, grad=True)
        check_op(ops.mlp, reference.mlp, trained)  # backward keeps what folding never writes
        wide = {**plain, "x": args["x"].float()}  # a float32 stream would be rounded before its mean is off
        merged = {**plain, "residual": torch.randn(2, 9, 64).to(dtype)}
        for given in (wide, merged):
            folds(lambda given=given: ops.linear(**given))  # nothing is problem_, so nothing is answered
            check_op(ops.linear, reference.linear, given)
    assert calls == []
