"""Patch embedding's CUDA kernels, run on the CPU, against the reference, by the rule of numerics.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import patch_embed_cases
from fastvit import reference
from fastvit.cuda import extension, patch_embed
from fastvit.cuda.patch_embed import (
    patch_embed_forward,
)
from numerics import assert_as_right_as_eager
from patch_embed_cases import dout_for, reference_run

HALF = (torch.float16, torch.bfloat16)
make = partial(patch_embed_cases.make, dtype=torch.bfloat16)
check = partial(patch_embed_cases.check, patch_embed)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "kind",
    [
        *("nchw", "nhwc", "cropped", "cropped odd", "mean", "other", "other mean"),
        *("uint8", "uint8 nhwc", "uint8 cropped", "float32", "float32 mean", "float32 nhwc", "float32 cropped mean"),
    ],
)
def test_images(dtype: torch.dtype, kind: str) -> None:
    """Every way to read a pixel."""
    check(make(dtype=dtype, kind=kind, wide=True))


@pytest.mark.parametrize("pos", ["none", "patches", "all"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_rows(pos: str, prefix: int, bias: bool) -> None:
    check(make(pos=pos, prefix=prefix, bias=bias, patch=(2, 8), channels=1, kind="uint8 nhwc" if bias else "nchw"))


@pytest.mark.parametrize("kind", ["nchw", "nhwc", "uint8", "uint8 nhwc", "float32 mean"])
@pytest.mark.parametrize(
    ("patch", "channels", "grid"),
    [((14, 14), 3, (2, 1)), ((16, 16), 3, (1, 2)), ((32, 32), 1, (1, 2)), ((4, 6), 3, (2, 5)), ((3, 1), 1, (4, 7)),
     ((3, 3), 5, (2, 3)), ((1, 1), 8, (3, 3))],
)  # fmt: skip
def test_patches(kind: str, patch: tuple[int, int], channels: int, grid: tuple[int, int]) -> None:
    """Runs that loads of 8 or 2 pixels divide, and odd ones; rows of the weight that 16, 4 and 2 bytes divide."""
    check(make(kind=kind, patch=patch, channels=channels, grid=grid, batch=2))


@pytest.mark.parametrize("kind", ["nchw", "uint8", "uint8 nhwc", "float32"])
@pytest.mark.parametrize(("batch", "grid", "dim"), [(1, (13, 5), 104), (3, (5, 13), 248), (19, (1, 13), 504)])
def test_tiles(kind: str, batch: int, grid: tuple[int, int], dim: int) -> None:
    """Several tiles in every direction, with a rest: on four multiprocessors the small, the medium, the large one."""
    check(make(kind=kind, batch=batch, grid=grid, dim=dim, patch=(2, 8), prefix=2))


def test_one_patch_an_image() -> None:
    """One tile then begins many images, and so writes the prefix rows of all of them."""
    check(make(batch=67, grid=(1, 1), patch=(1, 8), channels=1, prefix=3))


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("kind", ["nchw", "uint8 nhwc"])
def test_weight_gradient_in_splits(kind: str, splits: int) -> None:
    """Uneven shares of the rows, and more shares than steps: the last ones are zeros."""
    args = make(kind=kind, patch=(2, 2), channels=3, grid=(5, 9), batch=3)
    dout, images, weight = dout_for(args), args["images"], args["weight"]
    partials = torch.empty(splits, 24, 12)
    torch.ops.fastvit_emulated.patch_embed_weight_gradient(
        dout, dout, images, args["mean"], args["std"], 2, 2, 1, partials
    )
    eager, exact = (reference_run(args, dout, dtype)["dweight"] for dtype in (None, torch.float64))
    assert_as_right_as_eager(partials.double().sum(0).view(weight.shape), eager, exact)


def test_splits_fill_the_device() -> None:
    """Four multiprocessors; no split below 512 rows."""
    splits = torch.ops.fastvit_emulated.patch_embed_weight_gradient_splits
    like = torch.empty(0)
    assert [splits(like, rows, 24, 48) for rows in (0, 1023, 1024, 10**6)] == [1, 1, 2, 4]
    assert splits(like, 10**6, 129, 256) == 2
    assert splits(like, 10**6, 768, 768) == 1


@pytest.mark.parametrize("absent", ["mean", "std"])
@pytest.mark.parametrize("kind", ["uint8", "mean"])
def test_mean_or_std_alone(kind: str, absent: str) -> None:
    check({**make(kind=kind), absent: None})


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_out_dtype(out_dtype: torch.dtype) -> None:
    """The result is rounded once, to ``out_dtype``."""
    args = make(wide=True)
    exact = reference.patch_embed(**{n: None if t is None else t.double() for n, t in args.items()})
    out = patch_embed_forward(**args, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert_as_right_as_eager(out, exact.to(out_dtype), exact)


def test_unaligned() -> None:
    """Vectors, positions and a weight that begin anywhere."""
    args = make(dim=16, pos="patches")
    for name in ("weight", "bias", "pos_embed", "prefix_tokens"):
        buffer = torch.empty(args[name].numel() + 3, dtype=args[name].dtype)
        buffer[3:] = args[name].flatten()
        args[name] = buffer[3:].view(args[name].shape)
    check(args)
    weight = args["weight"]
    out = torch.empty(3, 7, 16, dtype=weight.dtype)
    positions, prefix = args["pos_embed"][0], args["prefix_tokens"][0]
    torch.ops.fastvit_emulated.patch_embed_forward(
        args["images"], args["images"], weight, args["bias"], positions, prefix, None, None, out
    )
    assert weight.data_ptr() % 16
    assert_as_right_as_eager(
        out, patch_embed_forward(**args), reference_run(args, dout_for(args), torch.float64)["out"]
    )


def test_dout_of_any_layout() -> None:
    args = make()
    check(args, torch.randn(24).bfloat16().expand(3, 7, 24))


@pytest.mark.parametrize("architecture", [80, 89, 90])
def test_architectures(architecture: int) -> None:
    extension.set_architecture(architecture)
    try:
        check(make())
    finally:
        extension.set_architecture(80)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dim": 20}, "width 20; accepted: multiples of 8"),
        ({"channels": 1025, "patch": (1, 1), "kind": "uint8"}, "1025 channels"),
    ],
)
def test_what_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=says):
        patch_embed_forward(**make(**change))


def test_far_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a patch the kernels count in 32 bits: channels 2^30 apart do not fit. (The memory is never touched.)"""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    images = torch.empty(2**31 + 32, dtype=torch.uint8).as_strided((1, 3, 4, 8), (0, 2**30, 8, 1))
    args = make(kind="uint8", batch=1, grid=(1, 1))
    with pytest.raises((ValueError, RuntimeError), match="2147483679 elements"):
        patch_embed_forward(**{**args, "images": images})


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_normalisation_is_float32(scale: float) -> None:
    patch_embed_cases.check_normalisation_is_float32(patch_embed, scale)


def test_prefix_rows_ignore_the_weights() -> None:
    patch_embed_cases.check_prefix_rows_ignore_the_weights(patch_embed, torch.bfloat16)


def test_two_runs_give_the_same_bits() -> None:
    args = make(batch=5, dtype=torch.bfloat16, wide=True)
    patch_embed_cases.check_two_runs_give_the_same_bits(patch_embed, args)


@pytest.mark.parametrize("kind", ["nchw", "uint8 nhwc"])
def test_no_images(kind: str) -> None:
    patch_embed_cases.check_no_images(patch_embed, kind, torch.bfloat16)
