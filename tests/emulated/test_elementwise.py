"""The CUDA kernels that only pass over memory, executed on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.activations import ACTIVATIONS, GATED, columns
from fastvit.cuda import extension
from fastvit.cuda.elementwise import (
    activation_gradient,
    gated_forward,
    scale_rows,
    sum_groups,
    sum_partials,
)
from layer_norm_cases import SumCases
from numerics import DTYPES, assert_as_right_as_eager, strided

NAMES = (*ACTIVATIONS, *GATED)


class TestSums(SumCases):
    sum_partials = staticmethod(sum_partials)
    sum_groups = staticmethod(sum_groups)


def test_sums_are_the_same_bits_twice() -> None:
    partials = torch.randn(100, 72)
    assert torch.equal(sum_partials(partials), sum_partials(partials))


# (rows, width, gap between rows): vectors and values, rows narrower and wider than a block, several to a block.
SHAPES = [(1, 1, 0), (67, 8, 0), (5, 768, 8), (9, 100, 4), (3, 101, 3), (2, 2568, 0), (2, 521, 0)]


@pytest.mark.parametrize(("x", "out"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize(("rows", "width", "gap"), SHAPES)
def test_scale_rows(x: torch.dtype, out: torch.dtype, rows: int, width: int, gap: int) -> None:
    given = strided(rows, width, x, gap)
    images = rows if rows % 3 else 3
    scale = torch.rand(images) * 2
    ours = scale_rows(given, out, scale)
    exact = given.double() * scale.double().repeat_interleave(rows // images)[:, None]
    assert ours.dtype == out
    assert torch.equal(ours, exact.float().to(out))  # one product, which float32 and then the dtype round
    assert torch.equal(scale_rows(given, out), given.to(out))


def expected(p: Tensor, activation: str, dout: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    p = p.detach().to(dtype or p.dtype).requires_grad_()
    hidden = reference.activate(p, activation)
    return [*torch.autograd.grad(hidden, p, dout.to(hidden.dtype)), hidden]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(("rows", "width", "gap"), [(3, 1200, 8), (7, 24, 1), (2, 601, 3)])
def test_activation_gradient(activation: str, dtype: torch.dtype, rows: int, width: int, gap: int) -> None:
    """Far into both tails."""
    size = columns(activation) * width
    wide = torch.full((rows, size + gap), torch.nan, dtype=dtype)
    wide[:, :size] = torch.linspace(-12, 12, rows * size)[torch.randperm(rows * size)].view(rows, size)
    preact, dout = wide[:, :size], strided(rows, width, dtype, gap)
    ours = activation_gradient(dout, preact, activation)
    eager, exact = (expected(preact, activation, dout, to) for to in (None, torch.float64))
    assert_as_right_as_eager(ours, eager, exact, ["dpreact", "hidden"])


@pytest.mark.parametrize("activation", NAMES)
def test_activation_gradient_takes_other_dtypes(activation: str) -> None:
    preact, dout = torch.randn(3, 32).half(), torch.randn(3, 32 // columns(activation))
    ours = activation_gradient(dout, preact, activation)
    eager, exact = (expected(preact, activation, dout, to) for to in (None, torch.float64))
    assert ours[0].dtype == ours[1].dtype == torch.float16
    assert_as_right_as_eager(ours, eager, exact, ["dpreact", "hidden"])


# x g'(x) of the sigmoids takes 1 - g(x), which cancels where x is large, in eager PyTorch too.
@pytest.mark.parametrize(
    ("activation", "slope_roundings"), [(name, 2 if name == "gelu" else 20) for name in ACTIVATIONS]
)
def test_activations_are_float32_right(activation: str, slope_roundings: int) -> None:
    """Value and slope within a few roundings of the float64 ones, everywhere; nothing but zero far to the left."""
    x = torch.cat([torch.linspace(-14, 14, 4001), torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4])])[None]
    found = activation_gradient(torch.ones_like(x), x, activation)
    true = expected(x, activation, torch.ones_like(x), torch.float64)
    for got, exact, roundings in zip(found, true, (slope_roundings, 2), strict=True):
        allowed = roundings * torch.finfo(torch.float32).eps * exact.abs().clamp(min=0.5)
        assert ((got.double() - exact).abs() <= allowed).all()
    assert found[1][x <= -100].abs().max() == 0


def test_gelu_keeps_its_digits_in_the_tail() -> None:
    """0.5 + 0.5 erf cancels where the normal distribution is small; the kernels' polynomial does not."""
    x = torch.linspace(-6, -2, 1000)[None]
    _, value = activation_gradient(torch.ones_like(x), x, "gelu")
    _, true = expected(x, "gelu", torch.ones_like(x), torch.float64)
    exact = x.double() * torch.special.ndtr(x.double())
    assert torch.allclose(true, exact, rtol=1e-6)
    assert ((value.double() - exact) / exact).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "gap"), SHAPES)
def test_gated_forward(dtype: torch.dtype, rows: int, width: int, gap: int) -> None:
    x = strided(rows, 2 * width, dtype, gap)
    exact = reference.activate(x.double(), "swiglu")
    assert_as_right_as_eager(gated_forward(x, "swiglu"), reference.activate(x, "swiglu"), exact)


def test_activation_refusals() -> None:
    with pytest.raises(ValueError, match="unknown activation 'celu'; accepted: .*gelu_tanh.*swiglu"):
        activation_gradient(torch.randn(6, 32), torch.randn(6, 32), "celu")
    with pytest.raises(ValueError, match=r"\(6, 32\) does not fit preact \(6, 32\)"):
        activation_gradient(torch.randn(6, 32), torch.randn(6, 32), "swiglu")
    x = torch.randn(6, 32)
    with pytest.raises(RuntimeError, match="preact has 33 columns; accepted: 32 or.*64"):
        extension.library.activation_gradient(x, x, torch.randn(6, 33), "gelu", torch.randn(6, 33), x)


def test_the_map_and_the_kernels_have_the_same_activations() -> None:
    x = torch.randn(6, 32)
    with pytest.raises(RuntimeError, match='unknown activation "celu"') as refusal:
        extension.library.activation_gradient(x, x, x, "celu", x, x)
    assert str(refusal.value).splitlines()[0].partition('accepted: "", ')[2].split(", ") == list(ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(3, 8), (5, 768), (4, 13), (1, 3000)])
@pytest.mark.parametrize("parts", ["gamma", "gamma, bias", "gamma alone", "none", "no sums"])
def test_finish_weight_gradient(dtype: torch.dtype, n: int, k: int, parts: str) -> None:
    """With gamma: dweight, dgamma, and the sums scaled in place; without one, g rounded and the sums as they were."""
    g, sums, weight, bias, gamma = torch.randn(n, k), torch.randn(n), torch.randn(n, k), torch.randn(n), torch.randn(n)
    weight, bias = weight.to(dtype), bias.to(dtype) if "bias" in parts else None
    gamma = gamma if "gamma" in parts else None
    wanted = gamma is not None and parts != "gamma alone"
    dweight = torch.full((n, k), torch.nan, dtype=dtype)
    dgamma = torch.full((n,), torch.nan) if wanted else None
    given = None if parts == "no sums" else sums.clone()
    finish = extension.library.finish_weight_gradient
    finish(g, g, given, weight if wanted else None, bias, gamma, dweight, dgamma)

    def truth(to: torch.dtype) -> list[Tensor]:
        scale = torch.ones(n, dtype=to) if gamma is None else gamma.to(to)
        found = [(g.to(to) * scale[:, None]).to(dtype if to == torch.float32 else to)]
        if given is not None:
            found.append(sums.to(to) * scale)
        if wanted:
            dot = (weight.to(to) * g.to(to)).sum(1)
            found.append(dot if bias is None else dot + bias.to(to) * sums.to(to))
        return found

    ours = [t for t in (dweight, given, dgamma) if t is not None]
    assert_as_right_as_eager(ours, truth(torch.float32), truth(torch.float64))


def test_nothing_to_do() -> None:
    assert gated_forward(torch.empty(0, 32), "swiglu").shape == (0, 16)
    assert scale_rows(torch.empty(0, 8), torch.float16).shape == (0, 8)
    dpreact, hidden = activation_gradient(torch.empty(0, 8), torch.empty(0, 16), "swiglu")
    assert dpreact.shape == (0, 16) and hidden.shape == (0, 8)
