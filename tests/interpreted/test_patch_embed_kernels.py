"""Patch embedding's kernels in the interpreter, against the reference and its gradients, by the rule of numerics.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import patch_embed_cases
from fastvit.triton import patch_embed
from fastvit.triton.launch import record
from fastvit.triton.patch_embed import (
    patch_embed_forward,
    patch_embed_weight_gradient,
)
from numerics import DTYPES

SMALL = {"block_m": 16, "block_n": 16, "block_k": 32, "warps": 4, "stages": 2}  # several tiles in every direction
make = partial(patch_embed_cases.make, dtype=torch.float32, margin=3)
check = partial(patch_embed_cases.check, patch_embed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nchw", "nhwc", "cropped", "uint8", "uint8 nhwc", "mean", "float32"])
def test_images(dtype: torch.dtype, kind: str) -> None:
    check(make(dtype=dtype, kind=kind, wide=True), tile=SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pos", ["none", "patches", "all"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_rows(dtype: torch.dtype, pos: str, prefix: int, bias: bool) -> None:
    check(make(dtype=dtype, pos=pos, prefix=prefix, bias=bias, kind="uint8 nhwc" if bias else "nchw"), tile=SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("patch", "channels", "grid"),
    [((14, 14), 3, (2, 3)), ((16, 16), 3, (3, 2)), ((32, 32), 1, (1, 2)), ((4, 8), 5, (2, 5)), ((3, 1), 1, (4, 7))],
)
def test_patches(dtype: torch.dtype, patch: tuple[int, int], channels: int, grid: tuple[int, int]) -> None:
    """The tiles are the table's: larger than these problems."""
    kind = "uint8" if channels == 3 else "nhwc"
    check(make(dtype=dtype, kind=kind, patch=patch, channels=channels, grid=grid, batch=2))


def test_weight_gradient_in_splits() -> None:
    """Enough patches that several programs share them, in uneven shares."""
    tile = {**SMALL, "block_m": 64, "block_n": 64, "block_k": 16}
    args = make(patch=(2, 2), channels=1, grid=(9, 15), batch=4)
    with record(80) as launches:
        patch_embed_weight_gradient(torch.randn(4, 136, 24), args["images"], (24, 1, 2, 2), prefix=1, tile=tile)
    assert launches[0].grid == (1, 4)
    check(args, tile=tile)


def test_far_strides_are_made_contiguous() -> None:
    """Within a patch offsets are int32: channels 2^30 apart do not fit, images that far apart do."""
    weight = torch.empty(24, 3, 16, 16, device="meta")
    for strides, passed_on in (((256, 2**30, 16, 1), (768, 256, 16, 1)), ((2**40, 256, 16, 1),) * 2):
        with record(90) as launches:
            patch_embed_forward(torch.empty_strided((2, 3, 16, 16), strides, device="meta"), weight)
        assert launches[0].args["strides"] == passed_on


def test_dout_of_any_layout() -> None:
    args = make()
    dout = torch.randn(24).expand(3, 7, 24)
    check(args, dout, tile=SMALL)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_normalisation_is_float32(scale: float) -> None:
    patch_embed_cases.check_normalisation_is_float32(patch_embed, scale)


def test_prefix_rows_ignore_the_weights() -> None:
    patch_embed_cases.check_prefix_rows_ignore_the_weights(patch_embed, torch.float32)


def test_two_runs_give_the_same_bits() -> None:
    args = make(batch=5, dtype=torch.bfloat16, wide=True)
    patch_embed_cases.check_two_runs_give_the_same_bits(patch_embed, args, tile=SMALL)


@pytest.mark.parametrize("kind", ["nchw", "uint8 nhwc"])
def test_no_images(kind: str) -> None:
    patch_embed_cases.check_no_images(patch_embed, kind, torch.float32)
