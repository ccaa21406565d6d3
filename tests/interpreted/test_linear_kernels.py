"""The GEMM family's kernels in the interpreter, against the reference and its gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.activations import ACTIVATIONS, GATED, columns
from fastvit.triton import launch, tiles
from fastvit.triton.activations import FORMULAS, activation_gradient
from fastvit.triton.linear import choose, forms, linear_forward
from fastvit.triton.linear_backward import linear_input_gradient, linear_weight_gradient
from numerics import DTYPES, assert_as_right_as_eager, strided

HALF = (torch.float16, torch.bfloat16)
NAMES = (*ACTIVATIONS, *GATED)
TILE = {"block_m": 32, "block_n": 32, "block_k": 32, "warps": 4, "stages": 2, "parts": 2}


def launched(arch: int, call: Callable[[], Any]) -> list[str]:
    """The names of the kernels that ``call`` launches on ``arch``."""
    with launch.record(arch) as launches:
        call()
    return [launch.kernel.fn.__name__ for launch in launches]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int = 1, **extra: Any) -> Tensor:
    """reference.linear on (M, K) rows that are ``rows`` to an image."""
    if extra.get("residual") is not None:
        extra["residual"] = extra["residual"].unflatten(0, (-1, rows))
    return reference.linear(x.unflatten(0, (-1, rows)), weight, bias, **extra).flatten(0, 1)


def cast(values: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Fresh leaves of ``dtype`` (None: their own)."""
    return {
        name: v.detach().to(dtype or v.dtype).requires_grad_() if isinstance(v, Tensor) else v
        for name, v in values.items()
    }


def forward_case(name: str, m: int, n: int, dtype: torch.dtype) -> tuple[dict[str, Any], int]:
    """Arguments beside x, weight and bias, and the rows of an image."""
    rows = 13 if m % 13 == 0 else 1
    scale = torch.rand(m // rows) * 2
    return {
        "plain": ({}, 1),
        **{name: ({"activation": name}, 1) for name in NAMES},
        "residual": ({"residual": torch.randn(m, n).to(dtype), "gamma": torch.randn(n).to(dtype)}, 1),
        "wide residual": ({"residual": torch.randn(m, n), "gamma": torch.randn(n), "row_scale": scale}, rows),
        "all": (
            {"residual": torch.randn(m, n), "gamma": torch.randn(n), "row_scale": scale, "activation": "gelu"},
            rows,
        ),
    }[name]


CASES = ("plain", *NAMES, "residual", "wide residual", "all")


def check_forward(x: Tensor, weight: Tensor, bias: Tensor | None, case: str, tile: dict[str, Any]) -> None:
    extra, rows = forward_case(case, x.shape[0], weight.shape[0], x.dtype)
    out, preact = linear_forward(x, weight, bias, save_preact=case != "plain", tile=tile, **extra)
    assert out.dtype == (extra["residual"].dtype if "residual" in extra else x.dtype)

    def reference_outputs(dtype: torch.dtype | None) -> list[Tensor]:
        args = cast({"x": x, "weight": weight, "bias": bias, **extra}, dtype)
        outputs = [linear(rows=rows, **args)]
        return outputs if preact is None else [*outputs, linear(args["x"], args["weight"], args["bias"])]

    assert_as_right_as_eager(
        [out, preact], reference_outputs(None), reference_outputs(torch.float64), ["out", "preact"]
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_pointer(dtype: torch.dtype, case: str) -> None:
    """N, K and the rows' stride suit no tile and no descriptor, so even Hopper takes pointers."""
    x, weight, bias = strided(65, 50, dtype, gap=3), torch.randn(100, 50).to(dtype), torch.randn(100)
    assert launched(90, lambda: linear_forward(x, weight))[0] == "linear_pointer_kernel"
    check_forward(x, weight, bias, case, TILE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", HALF)
def test_forward_tma(dtype: torch.dtype, case: str) -> None:
    x, weight, bias = strided(65, 40, dtype), torch.randn(80, 40).to(dtype), torch.randn(80).to(dtype)
    assert launched(90, lambda: linear_forward(x, weight))[0] == "linear_tma_kernel"
    with launch.assume(90):
        check_forward(x, weight, bias, case, TILE)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 72), (17, 48, 24), (33, 208, 16)])
@pytest.mark.parametrize("parts", [1, 4])
def test_forward_shapes(arch: int, m: int, n: int, k: int, parts: int) -> None:
    """One row, fewer columns than a tile, more tiles than one group, and every way to cut the epilogue."""
    x, weight = torch.randn(m, k).half(), torch.randn(n, k).half()
    with launch.assume(arch):
        check_forward(x, weight, None, "gelu", {**TILE, "block_n": 64, "parts": parts})


def test_groups_of_row_tiles() -> None:
    """More row tiles than share a group, and a last group that is not full: every tile is computed once."""
    x, weight = torch.randn(16 * 11 - 3, 16), torch.randn(40, 16)
    check_forward(x, weight, None, "plain", {**TILE, "block_m": 16})


@pytest.mark.parametrize(
    ("activation", "scaled"),
    [*[(a, s) for a in (None, "gelu") for s in ("gamma", "gamma, row_scale", "wide")], *[(a, "") for a in NAMES]],
)
@pytest.mark.parametrize(("arch", "dtype"), [(80, d) for d in DTYPES] + [(90, torch.bfloat16)])
def test_gradients(arch: int, dtype: torch.dtype, activation: str | None, scaled: str) -> None:
    """Every gradient of residual + row_scale * gamma * (act(p) W^T + b), W's rows split over three programs."""
    m, n, k, rows = 65, 40, 80, 13
    wide = torch.float32 if scaled == "wide" else dtype
    leaves = {
        "p": strided(m, columns(activation) * k, dtype),
        "weight": torch.randn(n, k).to(dtype),
        "bias": torch.randn(n).to(dtype),
        "gamma": torch.randn(n).to(wide) if scaled else None,
        "residual": torch.randn(m, n).to(wide),
    }
    row_scale = torch.rand(m // rows) * 2 if "row_scale" in scaled or scaled == "wide" else None
    dout = strided(m, n, wide)

    def reference_gradients(to: torch.dtype | None) -> list[Tensor]:
        args = cast(leaves, to)
        hidden = reference.activate(args["p"], activation)
        out = linear(
            hidden, args["weight"], args["bias"], rows,
            residual=args["residual"], gamma=args["gamma"], row_scale=row_scale,
        )  # fmt: skip
        wanted = [args[name] for name in ("p", "weight", "bias", "gamma") if args[name] is not None]
        gradients = torch.autograd.grad(out, wanted, dout.to(out.dtype))
        return [*([hidden] if activation else []), *gradients]

    weight, bias, gamma = leaves["weight"], leaves["bias"], leaves["gamma"]
    with launch.assume(arch):
        preact = leaves["p"] if activation else None
        dp, hidden = linear_input_gradient(
            dout, weight, gamma=gamma, row_scale=row_scale, preact=preact, activation=activation, tile=TILE
        )
        x = leaves["p"] if hidden is None else hidden
        dweight, dbias, dgamma = linear_weight_gradient(
            dout, x, weight=weight, bias=bias, gamma=gamma, row_scale=row_scale, tile={**TILE, "splits": 3}
        )
    assert dweight.dtype == dp.dtype == dtype and dbias is not None and dbias.dtype == torch.float32
    assert (hidden is None) == (activation is None) and (dgamma is None) == (gamma is None)
    ours = [t for t in (hidden, dp, dweight, dbias, dgamma) if t is not None]
    names = [*(["hidden"] if activation else []), "dp", "dweight", "dbias", "dgamma"]
    assert_as_right_as_eager(ours, reference_gradients(None), reference_gradients(torch.float64), names)


@pytest.mark.parametrize("gamma", [False, True])
def test_input_gradient_takes_tma_where_it_can(gamma: bool) -> None:
    """gamma scales what is summed over, so those tiles pass through registers: the pointer form."""
    dout, weight = torch.randn(17, 24).half(), torch.randn(24, 48).half()
    names = launched(90, lambda: linear_input_gradient(dout, weight, gamma=torch.randn(24) if gamma else None))
    assert names == ["linear_pointer_kernel" if gamma else "linear_tma_kernel"]


def test_input_gradient_out_dtype() -> None:
    dout, weight = torch.randn(17, 24).bfloat16(), torch.randn(24, 40).bfloat16()
    dx, _ = linear_input_gradient(dout, weight, out_dtype=torch.float32, tile=TILE)
    exact = dout.double() @ weight.double()
    assert dx.dtype == torch.float32
    assert_as_right_as_eager(dx, dout.float() @ weight.float(), exact)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 24, 40), (17, 100, 50), (65, 40, 33)])
def test_weight_gradient_splits(m: int, n: int, k: int, splits: int) -> None:
    """Any number of splits, also more than there are rows for; without a bias no sums; always the same bits."""
    dout, x = strided(m, n, torch.bfloat16, gap=3), strided(m, k, torch.bfloat16, gap=5)
    tile = {**TILE, "splits": splits}
    dweight, dbias, dgamma = linear_weight_gradient(dout, x, tile=tile)
    eager, exact = ((dout.to(d).T @ x.to(d), dout.to(d).sum(0, dtype=d)) for d in (torch.bfloat16, torch.float64))
    assert dgamma is None
    assert_as_right_as_eager([dweight, dbias], eager, exact, ["dweight", "dbias"])
    again, none, _ = linear_weight_gradient(dout, x, need_bias=False, tile=tile)
    assert none is None and torch.equal(again, dweight)


def test_gamma_without_dbias() -> None:
    """A frozen bias still takes part in gamma's gradient."""
    dout, x, weight, bias, gamma = (torch.randn(s) for s in ((17, 24), (17, 40), (24, 40), (24,), (24,)))
    _, none, dgamma = linear_weight_gradient(dout, x, weight=weight, bias=bias, gamma=gamma, need_bias=False, tile=TILE)
    y, exact = ((x.to(d) @ weight.to(d).T + bias) * dout.to(d) for d in (torch.float32, torch.float64))
    assert none is None
    assert_as_right_as_eager(dgamma, y.sum(0), exact.sum(0))


def test_rows_too_far_apart_for_32_bits_are_copied() -> None:
    """Offsets inside a tile are 32-bit: 128 rows of 2^24 elements would pass 2^31."""
    torch.use_deterministic_algorithms(False)  # do not fill what lies between the rows
    x = torch.empty(3, 2**24).half()[:, :16]
    x[:] = torch.randn(3, 16)
    assert launch.rows_contiguous(x).is_contiguous() and launch.rows_contiguous(x[:1].expand(3, -1)).stride() == (0, 1)
    check_forward(x, torch.randn(8, 16).half(), None, "plain", TILE)


def test_split_count_is_chosen() -> None:
    """Few tiles and many rows are split; many tiles are not."""

    def splits(m: int, n: int, k: int) -> int:
        dout, x = (torch.empty(m, size, device="meta", dtype=torch.bfloat16) for size in (n, k))
        with launch.record(90) as launches:
            linear_weight_gradient(dout, x)
        assert len(launches) == (1 if launches[0].grid[1] == 1 else 2)
        return launches[0].grid[1]

    assert splits(50432, 768, 768) > 1
    assert splits(197, 16384, 16384) == 1


@pytest.mark.parametrize("arch", [80, 90])
def test_empty(arch: int) -> None:
    x, weight, dout = torch.randn(0, 40).half(), torch.randn(72, 40).half(), torch.randn(0, 72)
    gamma, scale = torch.randn(72), torch.rand(0)
    with launch.assume(arch):
        out, preact = linear_forward(x, weight, activation="gelu", residual=dout, save_preact=True)
        assert out.shape == dout.shape and out.dtype == torch.float32
        assert preact is not None and preact.shape == dout.shape
        assert linear_forward(x, weight, activation="swiglu")[0].shape == (0, 36)
        dx, hidden = linear_input_gradient(dout, weight, gamma=gamma, preact=x, activation="gelu")
        assert hidden is not None and dx.shape == hidden.shape == x.shape
        gradients = linear_weight_gradient(dout, x, weight=weight, gamma=gamma, tile=TILE)
    for gradient, shape in zip(gradients, [(72, 40), (72,), (72,)], strict=True):
        assert gradient is not None and torch.equal(gradient, torch.zeros(shape).to(gradient.dtype))
    with pytest.raises(ValueError, match="row_scale"):
        linear_forward(torch.randn(3, 40).half(), weight, row_scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", NAMES)
def test_activation_gradient(activation: str, dtype: torch.dtype) -> None:
    """Far into both tails, over more than one block of columns."""
    preact = torch.linspace(-12, 12, 3 * 1200).view(3, 1200).to(dtype)
    dout = strided(3, 1200 // columns(activation), dtype, gap=1)

    def expected(to: torch.dtype | None) -> list[Tensor]:
        p = preact.detach().to(to or dtype).requires_grad_()
        hidden = reference.activate(p, activation)
        return [*torch.autograd.grad(hidden, p, dout.to(hidden.dtype)), hidden]

    ours = activation_gradient(dout, preact, activation)
    assert_as_right_as_eager(ours, expected(None), expected(torch.float64), ["dpreact", "hidden"])


def test_every_activation_of_the_map_has_a_formula() -> None:
    assert FORMULAS.keys() - {None} == ACTIVATIONS.keys()


def test_refusals() -> None:
    x, weight = torch.randn(6, 16), torch.randn(32, 16)
    with pytest.raises(ValueError, match="unknown activation 'celu'"):
        linear_forward(x, weight, activation="celu")
    with pytest.raises(ValueError, match="swiglu takes no residual"):
        linear_forward(x, weight, activation="swiglu", gamma=torch.randn(32))
    with pytest.raises(ValueError, match="row_scale has 4 entries"):
        linear_forward(x, weight, row_scale=torch.rand(4))
    with pytest.raises(ValueError, match="go together"):
        linear_input_gradient(torch.randn(6, 32), weight, activation="gelu")
    with pytest.raises(ValueError, match="unknown activation 'celu'"):
        linear_input_gradient(torch.randn(6, 32), weight, activation="celu", preact=x)
    with pytest.raises(ValueError, match="needs the weight"):
        linear_weight_gradient(torch.randn(6, 32), x, gamma=torch.randn(32))
    with pytest.raises(ValueError, match="does not fit"):
        activation_gradient(torch.randn(6, 32), torch.randn(6, 32), "swiglu")


@pytest.mark.parametrize("arch", launch.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_table(arch: int, dtype: torch.dtype) -> None:
    """Every GEMM finds a tile, a table's own shape finds its own row, and few kernels are compiled."""
    rows = tiles.rows("linear", arch, dtype)
    kernels = defaultdict(set)
    for row in rows:
        assert choose(row["op"], arch, dtype, row["m"], row["n"], row["k"], (row["form"],)) == row
        kernels[row["op"], row["form"]].add(tuple(v for k, v in row.items() if k not in ("m", "n", "k")))
    assert max(map(len, kernels.values())) <= 6
    for op in ("forward", "input", "weight"):
        assert choose(op, arch, dtype, 1, 1, 1, ("pointer",))["form"] == "pointer"
        half = dtype != torch.float32  # float32 may spill where rows are not aligned: it has one tile for both
        assert choose(op, arch, dtype, 1, 1, 1, forms(17, 16))["form"] == ("unaligned" if half else "pointer")
    with pytest.raises(LookupError, match="no row for sideways"):
        choose("sideways", arch, dtype, 1, 1, 1, ("pointer",))
