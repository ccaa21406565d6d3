"""The linear layer's kernels for compute capability 8.0, run on the CPU, against the reference and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.activations import ACTIVATIONS
from fastvit.cuda.linear import linear_forward, linear_input_gradient, linear_weight_gradient
from numerics import assert_as_right_as_eager, strided

HALF = (torch.float16, torch.bfloat16)
ROWS = 13  # of an image

# On the emulated device's four multiprocessors these (M, N) take the tile of that name (csrc/sm80/linear_sm80_tiles.h).
# All end in parts of a tile, and so does K.
SIZES = {"small": (65, 104), "medium": (195, 248), "large": (247, 504)}


def cast(values: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Fresh leaves of ``dtype`` (None: their own)."""
    return {
        name: v.detach().to(dtype or v.dtype).requires_grad_() if isinstance(v, Tensor) else v
        for name, v in values.items()
    }


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, **extra: Any) -> Tensor:
    """reference.linear on (M, K) rows that are ROWS to an image."""
    if extra.get("residual") is not None:
        extra["residual"] = extra["residual"].unflatten(0, (-1, ROWS))
    return reference.linear(x.unflatten(0, (-1, ROWS)), weight, bias, **extra).flatten(0, 1)


def extras(case: str, m: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of the epilogue."""
    wide = torch.float32
    merge = {"residual": strided(m, n, wide), "gamma": torch.randn(n), "row_scale": torch.rand(m // ROWS) * 2}
    return {
        "plain": {},
        "gelu": {"bias": torch.randn(n), "activation": "gelu"},
        **{name: {"bias": torch.randn(n).to(dtype), "activation": name} for name in ACTIVATIONS if name != "gelu"},
        "residual": {"bias": torch.randn(n).to(dtype), "residual": strided(m, n, dtype)},
        "gamma": {"residual": strided(m, n, dtype), "gamma": torch.randn(n).to(dtype)},
        "all": {"bias": torch.randn(n), "activation": "gelu", **merge},
    }[case]


def check_forward(x: Tensor, weight: Tensor, extra: dict[str, Any], save_preact: bool) -> None:
    out, preact = linear_forward(x, weight, save_preact=save_preact, **extra)
    assert out.dtype == (extra["residual"].dtype if "residual" in extra else x.dtype)
    assert (preact is not None) == save_preact

    def outputs(dtype: torch.dtype | None) -> list[Tensor]:
        args = cast({"x": x, "weight": weight, **extra}, dtype)
        wanted = [linear(**args)]
        return [*wanted, linear(args["x"], args["weight"], args.get("bias"))] if save_preact else wanted

    ours = [out] if preact is None else [out, preact]
    assert_as_right_as_eager(ours, outputs(None), outputs(torch.float64), ["out", "preact"])


@pytest.mark.parametrize("case", ["plain", *ACTIVATIONS, "residual", "gamma", "all"])
@pytest.mark.parametrize("dtype", HALF)
def test_epilogue(dtype: torch.dtype, case: str) -> None:
    m, n = SIZES["small"]
    x, weight = strided(m, 72, dtype), torch.randn(n, 72).to(dtype)
    check_forward(x, weight, extras(case, m, n, dtype), save_preact=case != "plain")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", ["medium", "large"])
def test_tiles(size: str, dtype: torch.dtype) -> None:
    m, n = SIZES[size]
    x, weight = strided(m, 104, dtype), torch.randn(n, 104).to(dtype)
    check_forward(x, weight, extras("all", m, n, dtype), save_preact=True)


@pytest.mark.parametrize("k", [8, 64, 136, 320])
def test_steps(k: int) -> None:
    """Fewer steps than stages, as many, and more, so that the ring of stages goes round."""
    x, weight = torch.randn(ROWS, k).half(), torch.randn(16, k).half()
    check_forward(x, weight, {}, save_preact=False)


def test_groups_of_row_tiles() -> None:
    """More row tiles than share a group, and a last group that is not full: every tile is computed once."""
    x, weight = torch.randn(90 * ROWS, 16).half(), torch.randn(136, 16).half()
    check_forward(x, weight, {}, save_preact=False)


@pytest.mark.parametrize("gamma", ["", "narrow", "wide"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("size", "activation"),
    [
        ("small", None),
        *(("small", activation) for activation in ACTIVATIONS),
        ("medium", "gelu"),
        ("large", "gelu"),
    ],
)
def test_input_gradient(size: str, activation: str | None, dtype: torch.dtype, gamma: str) -> None:
    """The gradient to p of gamma * (act(p) W^T), and act(p) beside it."""
    (m, k), n = SIZES[size], 104
    leaves = {
        "p": torch.randn(m, k).to(dtype),
        "weight": torch.randn(n, k).to(dtype),
        "gamma": torch.randn(n).to(torch.float32 if gamma == "wide" else dtype) if gamma else None,
    }
    dout = strided(m, n, dtype)

    def expected(to: torch.dtype | None) -> list[Tensor]:
        args = cast(leaves, to)
        hidden = reference.activate(args["p"], activation)
        scaled = dout.to(hidden.dtype) if args["gamma"] is None else (dout * args["gamma"]).to(hidden.dtype)
        (dp,) = torch.autograd.grad(hidden, args["p"], scaled @ args["weight"])
        return [dp, hidden] if activation else [dp]

    preact = leaves["p"] if activation else None
    dp, hidden = linear_input_gradient(
        dout, leaves["weight"], gamma=leaves["gamma"], preact=preact, activation=activation
    )
    assert dp.dtype == dtype and (hidden is None) == (activation is None)
    ours = [dp] if hidden is None else [dp, hidden]
    assert_as_right_as_eager(ours, expected(None), expected(torch.float64), ["dp", "hidden"])


def test_input_gradient_out_dtype() -> None:
    dout, weight = torch.randn(17, 24).bfloat16(), torch.randn(24, 40).bfloat16()
    dx, _ = linear_input_gradient(dout, weight, out_dtype=torch.float32)
    assert dx.dtype == torch.float32
    assert_as_right_as_eager(dx, dout.float() @ weight.float(), dout.double() @ weight.double())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("size", "m"), [("small", 1), ("small", 520), ("medium", 33), ("large", 130)])
def test_weight_gradient(size: str, m: int, dtype: torch.dtype) -> None:
    """One row, two splits, parts of a step; without a bias no sums; always the same bits."""
    n, k = SIZES[size]
    n -= n % 8  # a size of the weight now
    dout, x = strided(m, n, dtype), strided(m, k, dtype)
    dweight, dbias, dgamma = linear_weight_gradient(dout, x)
    assert dgamma is None and dbias is not None and dweight.dtype == dtype and dbias.dtype == torch.float32
    eager, exact = ((dout.to(d).T @ x.to(d), dout.to(d).sum(0, dtype=d)) for d in (dtype, torch.float64))
    assert_as_right_as_eager([dweight, dbias], eager, exact, ["dweight", "dbias"])
    again, none, _ = linear_weight_gradient(dout, x, need_bias=False)
    assert none is None and torch.equal(again, dweight)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_splits(splits: int) -> None:
    """Any number of splits, more than there are steps too: theirs are zeros."""
    dout, x = torch.randn(130, 24).half(), torch.randn(130, 40).half()
    partials, sums = torch.empty(splits, 24, 40), torch.empty(splits, 24)
    torch.ops.fastvit_emulated.linear_weight_gradient(x, dout, x, partials, sums)
    eager, exact = ((dout.to(d).T @ x.to(d), dout.to(d).sum(0, dtype=d)) for d in (torch.float32, torch.float64))
    assert_as_right_as_eager([partials.sum(0), sums.sum(0)], eager, exact, ["partials", "sums"])


def test_split_count_is_chosen() -> None:
    """Few tiles and many rows are split; many tiles are not."""

    def splits(m: int, n: int, k: int) -> int:
        return int(torch.ops.fastvit_emulated.linear_weight_gradient_splits(torch.empty(0), m, n, k))

    assert splits(50432, 128, 128) > 1
    assert splits(197, 4096, 4096) == 1 and splits(0, 8, 8) == 1


def test_empty() -> None:
    weight, rows = torch.randn(72, 40).half(), torch.randn(0, 40).half()
    out, preact = linear_forward(rows, weight, activation="gelu", save_preact=True)
    assert preact is not None and out.shape == preact.shape == (0, 72)
    dx, hidden = linear_input_gradient(out, weight, preact=rows, activation="gelu")
    assert hidden is not None and dx.shape == hidden.shape == (0, 40)
    dweight, dbias, _ = linear_weight_gradient(out, rows)
    assert dbias is not None and not dweight.any() and not dbias.any()
    dout, sums = torch.randn(5, 8).half(), torch.empty(1, 8)
    torch.ops.fastvit_emulated.linear_weight_gradient(dout, dout, torch.empty(5, 0).half(), torch.empty(1, 8, 0), sums)
    assert_as_right_as_eager(sums[0], dout.float().sum(0), dout.double().sum(0))
    bias = torch.randn(72).half()
    assert torch.equal(linear_forward(torch.empty(3, 0).half(), torch.empty(72, 0).half(), bias)[0], bias.expand(3, 72))


def test_refusals() -> None:
    x, weight = torch.randn(6, 16).half(), torch.randn(32, 16).half()
    with pytest.raises(RuntimeError, match=r"weight is \(20, 16\); accepted: multiples of 8"):
        linear_forward(x, weight[:20])
    with pytest.raises(RuntimeError, match=r"weight is \(32, 12\); accepted: multiples of 8"):
        linear_forward(x[:, :12], weight[:, :12])
    with pytest.raises(RuntimeError, match="x is bfloat16; accepted: float16"):
        linear_forward(x.bfloat16(), weight)
    out = torch.empty(6, 32).half()
    op = torch.ops.fastvit_emulated.linear_forward
    with pytest.raises(RuntimeError, match="operands are float32; accepted: float16, bfloat16"):
        op(x, x.float(), weight.float(), None, "", None, None, None, out.float(), None)
    with pytest.raises(RuntimeError, match="x has rows 17 elements apart; accepted: 8 or a multiple"):
        op(x, strided(6, 16, torch.float16, gap=1), weight, None, "", None, None, None, out, None)
    with pytest.raises(RuntimeError, match="address that 16 does not divide"):
        op(x, torch.randn(97).half()[1:].view(6, 16), weight, None, "", None, None, None, out, None)
    with pytest.raises(RuntimeError, match='unknown activation "celu"'):
        op(x, x, weight, None, "celu", None, None, None, out, None)
    with pytest.raises(RuntimeError, match="4 row scales for 6 rows"):
        op(x, x, weight, None, "", None, None, torch.rand(4), out, None)
