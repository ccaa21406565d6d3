"""LayerNorm's CUDA kernels, executed on the CPU: the cases of every backend, and those of how these kernels tile."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.cuda.layer_norm import layer_norm_backward, layer_norm_forward
from layer_norm_cases import EPS, LayerNormCases
from numerics import DTYPES, assert_as_right_as_eager, strided


class TestLayerNorm(LayerNormCases):
    forward = staticmethod(layer_norm_forward)
    backward = staticmethod(layer_norm_backward)


def check(tensors: dict[str, Tensor], out_dtype: torch.dtype, dy: Tensor, dstream: Tensor) -> None:
    """y, the stream, and every gradient, with a residual, gamma, weight and bias."""
    merge = {name: tensors[name] for name in ("residual", "gamma")}
    y, stream, mean, rstd = layer_norm_forward(
        tensors["x"], tensors["weight"], tensors["bias"], EPS, **merge, out_dtype=out_dtype
    )
    gradients = layer_norm_backward(
        dy, dstream, stream, tensors["weight"], mean, rstd, branch=tensors["x"], gamma=tensors["gamma"]
    )
    assert y.dtype == out_dtype and gradients[0].dtype == tensors["x"].dtype

    def expected(dtype: torch.dtype | None) -> list[Tensor]:
        leaves = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}
        x, weight, bias = (leaves[name] for name in ("x", "weight", "bias"))
        outputs = reference.layer_norm(
            x, weight, bias, EPS, residual=leaves["residual"], gamma=leaves["gamma"], out_dtype=dtype or out_dtype
        )
        upstream = [g.to(o.dtype) for g, o in zip((dy, dstream), outputs, strict=True)]
        order = [leaves[name] for name in ("x", "residual", "weight", "bias", "gamma")]
        return [*outputs, *torch.autograd.grad(outputs, order, upstream)]

    names = ["y", "stream", "dx", "dresidual", "dweight", "dbias", "dgamma"]
    assert_as_right_as_eager([y, stream, *gradients], expected(None), expected(torch.float64), names)


def drawn(rows: int, width: int, x: torch.dtype, residual: torch.dtype, parameters: torch.dtype) -> dict[str, Tensor]:
    vectors = {name: torch.randn(width).to(parameters) for name in ("weight", "bias", "gamma")}
    return {"x": strided(rows, width, x), "residual": strided(rows, width, residual), **vectors}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width"),
    [(17, 8), (9, 200), (5, 256), (3, 264), (5, 384), (11, 768), (3, 1024), (3, 1280), (5, 1288), (3, 2056)],
)
def test_vectors(dtype: torch.dtype, rows: int, width: int) -> None:
    """Rows that are read 16 bytes a lane: every number of pieces, and teams of one warp and of several."""
    dy, dstream = strided(rows, width, dtype), strided(rows, width, dtype)
    check(drawn(rows, width, dtype, dtype, dtype), dtype, dy, dstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [4096, 6152, 8191, 8192])
def test_wide(dtype: torch.dtype, width: int) -> None:
    """Up to 16 warps to a row; 8191 is read value by value."""
    check(drawn(2, width, dtype, dtype, dtype), dtype, strided(2, width, dtype), strided(2, width, dtype))


@pytest.mark.parametrize("width", [40, 41])
@pytest.mark.parametrize(("x", "residual", "out"), list(itertools.product(DTYPES, repeat=3)))
def test_dtypes(x: torch.dtype, residual: torch.dtype, out: torch.dtype, width: int) -> None:
    """Every combination, whether or not there is a kernel for it alone; the parameters' and dstream's differ too."""
    parameters = DTYPES[(DTYPES.index(x) + DTYPES.index(out)) % 3]
    dstream = strided(5, width, DTYPES[(DTYPES.index(residual) + DTYPES.index(out)) % 3])
    check(drawn(5, width, x, residual, parameters), out, strided(5, width, out), dstream)


@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias", "gamma", "dy", "dstream"])
def test_unaligned_addresses(name: str) -> None:
    """One operand that starts between 16-byte boundaries."""
    rows, width, dtype = 3, 64, torch.bfloat16
    upstream = {key: torch.randn(rows, width).to(dtype) for key in ("dy", "dstream")}
    all_of = {**drawn(rows, width, dtype, dtype, dtype), **upstream}
    given = all_of[name]
    wide = torch.full((*given.shape[:-1], width + 8), torch.nan, dtype=dtype)
    wide[..., 1 : width + 1] = given
    all_of[name] = wide[..., 1 : width + 1]
    dy, dstream = all_of.pop("dy"), all_of.pop("dstream")
    check(all_of, dtype, dy, dstream)


@pytest.mark.parametrize("width", [24, 800])
def test_many_rows(width: int) -> None:
    """More rows than the backward's blocks take at once, by teams of one warp and of two; a last round in part."""
    rows = 4 * 16 * 4 + 3 if width == 24 else 83
    dtype = torch.float32
    check(drawn(rows, width, dtype, dtype, dtype), dtype, strided(rows, width, dtype), strided(rows, width, dtype))


def test_rounds_once() -> None:
    """y is the float32 result rounded: a second rounding on the way would show."""
    x, weight = torch.randn(7, 96), torch.randn(96)
    wide, *_ = layer_norm_forward(x, weight, weight, EPS)
    narrow, *_ = layer_norm_forward(x, weight, weight, EPS, out_dtype=torch.bfloat16)
    assert torch.equal(wide.bfloat16(), narrow)


def test_row_scale_must_divide() -> None:
    x = torch.randn(6, 16)
    with pytest.raises(ValueError, match="4 entries, which do not divide the 6 rows"):
        layer_norm_forward(x, None, None, EPS, residual=x, row_scale=torch.rand(4))
