"""What LayerNorm's kernels are held to, on any backend: the reference and its gradients (the rule: tests/numerics.py).

A backend's test file inherits from these classes and names its launchers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import reference
from numerics import DTYPES, assert_as_right_as_eager, strided

EPS = 1e-6


def plain(args: dict[str, Tensor | None], dy: Tensor, dtype: torch.dtype | None, out: torch.dtype) -> list[Tensor]:
    """The reference's y and gradients: of x, weight and bias."""
    x, weight, bias = (None if t is None else t.to(dtype or t.dtype).requires_grad_() for t in args.values())
    y = reference.layer_norm(x, weight, bias, EPS, out_dtype=dtype or out)
    return [y, *torch.autograd.grad(y, [t for t in (x, weight, bias) if t is not None], dy.to(y.dtype))]


def merged(args: dict[str, Tensor | None], upstream: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """The reference's y, stream and gradients: of x, residual, weight, bias and gamma."""
    leaves = {
        name: None if t is None else t.to(dtype or t.dtype).requires_grad_(name != "row_scale")
        for name, t in args.items()
    }
    x, row_scale = leaves["x"], leaves["row_scale"]
    if row_scale is not None:  # as images of equally many rows
        leaves["x"] = x.view(len(row_scale), -1, x.shape[-1])
        leaves["residual"] = leaves["residual"].view_as(leaves["x"])
    x_in, weight, bias = leaves.pop("x"), leaves.pop("weight"), leaves.pop("bias")
    y, stream = reference.layer_norm(x_in, weight, bias, EPS, **leaves, out_dtype=dtype or args["x"].dtype)
    wanted = [x, leaves["residual"], weight, bias, leaves["gamma"]]
    upstream = [g.view_as(o).to(o.dtype) for g, o in zip(upstream, (y, stream), strict=True)]
    grads = torch.autograd.grad([y, stream], [t for t in wanted if t is not None], upstream)
    return [t.reshape(-1, t.shape[-1]) if t.ndim == 3 else t for t in (y, stream, *grads)]


class LayerNormCases:
    forward: Callable[..., Any]  # layer_norm_forward
    backward: Callable[..., Any]  # layer_norm_backward

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rows", "width"), [(1, 1), (13, 1), (37, 17), (7, 192), (13, 768), (3, 1152)])
    @pytest.mark.parametrize("affine", ["same", "float32", "weight", "none"])
    def test_layer_norm(self, dtype: torch.dtype, rows: int, width: int, affine: str) -> None:
        x = strided(rows, width, dtype, gap=3).add_(0.5)  # neither centred nor aligned
        kind = torch.float32 if affine == "float32" else dtype
        weight = None if affine == "none" else torch.randn(width).to(kind)
        bias = torch.randn(width).to(kind) if affine in ("same", "float32") else None
        dy = strided(rows, width, dtype, gap=3)
        y, stream, mean, rstd = self.forward(x, weight, bias, EPS)
        assert stream is None and y.dtype == dtype
        dx, dresidual, dweight, dbias, dgamma = self.backward(dy, None, x, weight, mean, rstd)
        assert dresidual is None and dgamma is None and dx.dtype == dtype and dweight.dtype == torch.float32

        args = {"x": x, "weight": weight, "bias": bias}
        ours = [y, dx, *([] if weight is None else [dweight]), *([] if bias is None else [dbias])]
        names = ["y", "dx", *(["dweight"] if weight is not None else []), *(["dbias"] if bias is not None else [])]
        assert_as_right_as_eager(ours, plain(args, dy, None, dtype), plain(args, dy, torch.float64, dtype), names)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("wide", [False, True])  # the residual stream in float32
    @pytest.mark.parametrize("scales", ["none", "gamma", "row_scale", "both"])
    @pytest.mark.parametrize("width", [17, 192])
    def test_residual(self, dtype: torch.dtype, wide: bool, scales: str, width: int) -> None:
        images, rows = 3, 15
        stream_dtype = torch.float32 if wide else dtype
        x = torch.randn(rows, width).to(dtype)
        args = {
            "x": x,
            "residual": torch.randn(rows, width).to(stream_dtype),
            "weight": torch.randn(width),
            "bias": torch.randn(width),
            "gamma": torch.randn(width).to(stream_dtype) if scales in ("gamma", "both") else None,
            "row_scale": torch.tensor([0.0, 1.25, 1.0]) if scales in ("row_scale", "both") else None,
        }
        assert args["row_scale"] is None or len(args["row_scale"]) == images
        y, stream, mean, rstd = self.forward(**args, eps=EPS, out_dtype=dtype)
        assert y.dtype == dtype and stream.dtype == stream_dtype
        dy, dstream = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(stream_dtype)
        branch = {"branch": x, "gamma": args["gamma"], "row_scale": args["row_scale"]}
        dx, dresidual, dweight, dbias, dgamma = self.backward(dy, dstream, stream, args["weight"], mean, rstd, **branch)
        assert dx.dtype == dtype and dresidual.dtype == stream_dtype

        ours = [y, stream, dx, dresidual, dweight, dbias, *([] if dgamma is None else [dgamma])]
        names = ["y", "stream", "dx", "dresidual", "dweight", "dbias", "dgamma"][: len(ours)]
        upstream = [dy, dstream]
        assert_as_right_as_eager(ours, merged(args, upstream, None), merged(args, upstream, torch.float64), names)

    def test_variance_does_not_cancel(self) -> None:
        """Values of 1000 +- 1: a one-pass variance in float32 would lose most of its digits."""
        x = 1000 + torch.randn(5, 192)
        y, _, mean, rstd = self.forward(x, None, None, EPS)
        exact = torch.nn.functional.layer_norm(x.double(), (192,), eps=EPS)
        assert_as_right_as_eager(y, torch.nn.functional.layer_norm(x, (192,), eps=EPS), exact)
        assert torch.allclose(rstd.double(), x.double().var(1, correction=0).add(EPS).rsqrt(), rtol=1e-6)
        assert torch.allclose(mean.double(), x.double().mean(1), rtol=1e-6)

    def test_statistics_are_those_of_the_rounded_stream(self) -> None:
        x, residual = torch.randn(5, 17).bfloat16(), torch.randn(5, 17).bfloat16()
        y, stream, mean, rstd = self.forward(x, None, None, EPS, residual=residual, out_dtype=torch.float32)
        again, _, mean_again, rstd_again = self.forward(stream, None, None, EPS, out_dtype=torch.float32)
        assert torch.equal(y, again) and torch.equal(mean, mean_again) and torch.equal(rstd, rstd_again)

    def test_persistent_programs_cover_all_rows(self) -> None:
        """More rows than programs, an uneven share each, and upstream gradients that are expanded."""
        width = 2000
        x, weight, gamma = torch.randn(37, width), torch.randn(width), torch.randn(width)
        args = {"x": x, "residual": torch.randn(37, width), "weight": weight, "bias": weight, "gamma": gamma}
        args["row_scale"] = None
        upstream = [torch.randn(1, width).expand(37, -1), torch.randn(37, 1).expand(-1, width)]
        y, stream, mean, rstd = self.forward(**args, eps=EPS)
        dx, dresidual, dweight, dbias, dgamma = self.backward(
            *upstream, stream, weight, mean, rstd, branch=x, gamma=gamma
        )
        ours = [y, stream, dx, dresidual, dweight, dbias, dgamma]
        args["bias"] = weight.clone()  # a leaf of its own
        assert_as_right_as_eager(ours, merged(args, upstream, None), merged(args, upstream, torch.float64))

    def test_two_runs_give_the_same_bits(self) -> None:
        x, dy, gamma = torch.randn(37, 192), torch.randn(37, 192), torch.randn(192)

        def run() -> list[Tensor]:
            y, stream, mean, rstd = self.forward(x, gamma, gamma, EPS, residual=dy, gamma=gamma)
            gradients = self.backward(dy, dy, stream, gamma, mean, rstd, branch=x, gamma=gamma)
            return [y, stream, mean, rstd, *gradients]

        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))

    def test_no_rows(self) -> None:
        x, weight, row_scale = torch.empty(0, 17), torch.randn(17), torch.empty(0)
        merge = {"gamma": weight, "row_scale": row_scale}
        y, stream, mean, rstd = self.forward(x, weight, weight, EPS, residual=x, **merge)
        assert y.shape == stream.shape == (0, 17) and mean.shape == rstd.shape == (0,)
        dx, dresidual, *sums = self.backward(y, None, stream, weight, mean, rstd, branch=x, **merge)
        assert dx.shape == dresidual.shape == (0, 17)
        assert all(torch.equal(s, torch.zeros(17)) for s in sums)

    def test_parameters_can_be_left_out(self) -> None:
        x, dy = torch.randn(5, 17), torch.randn(5, 17)
        _, _, mean, rstd = self.forward(x, None, None, EPS)
        dx, *_ = self.backward(dy, None, x, None, mean, rstd)
        alone, *rest = self.backward(dy, None, x, None, mean, rstd, need_params=False)
        assert torch.equal(dx, alone) and rest == [None] * 4

    def test_too_wide_is_refused(self) -> None:
        with pytest.raises(ValueError, match="D <= 8192; got 8193"):
            self.forward(torch.empty(1, 8193), None, None, EPS)


class SumCases:
    sum_partials: Callable[[Tensor], Tensor]
    sum_groups: Callable[[Tensor], tuple[Tensor, ...]]

    @pytest.mark.parametrize("shape", [(0, 5), (1, 7), (3, 2, 65), (70, 3), (33, 0), (9, 64), (35, 300, 8)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sum_partials(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        partials = torch.randn(shape).to(dtype)
        ours = self.sum_partials(partials)
        assert ours.dtype == torch.float32
        assert_as_right_as_eager(ours, partials.float().sum(0), partials.double().sum(0))

    def test_sum_groups(self) -> None:
        partials = torch.randn(37, 3, 70)
        ours = self.sum_groups(partials)
        assert_as_right_as_eager(ours, partials.sum(0).unbind(), partials.double().sum(0).unbind())
        assert len({t.untyped_storage().data_ptr() for t in ours}) == 3
