"""Packed patch embedding's kernels in the interpreter, against the reference and its gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import PackedImages, pack, reference
from fastvit.triton.launch import record
from fastvit.triton.patch_embed_packed import patch_embed_packed_forward, patch_embed_packed_weight_gradient
from numerics import DTYPES, assert_as_right_as_eager

SMALL = {"block_m": 16, "block_n": 16, "block_k": 32, "warps": 4, "stages": 2}  # several tiles in every direction
SIZES = ((12, 16), (4, 8), (8, 40), (4, 8), (20, 8))  # images of 6, 1, 10, 1 and 5 patches of 4x8


def make(
    *,
    dtype: torch.dtype = torch.float32,
    kind: str = "floating",
    sizes: tuple[tuple[int, int], ...] = SIZES,
    channels: int = 3,
    patch: tuple[int, int] = (4, 8),
    dim: int = 24,
    prefix: int = 1,
    pos: bool = True,
    bias: bool = True,
    wide: bool = False,
) -> tuple[PackedImages, dict[str, Any]]:
    """The images and the op's other arguments; ``wide`` keeps bias, positions and prefix in float32."""
    if kind == "uint8":
        images = [torch.randint(0, 256, (channels, *size), dtype=torch.uint8) for size in sizes]
    else:
        images = [torch.rand(channels, *size).to(torch.float32 if kind == "float32" else dtype) for size in sizes]
    packed, extra = pack(images, patch, channels=channels), torch.float32 if wide else dtype
    normalise = kind in ("uint8", "mean")
    return packed, {
        "weight": (torch.randn(dim, channels, *patch) / (channels * patch[0] * patch[1]) ** 0.5).to(dtype),
        "bias": torch.randn(dim).to(extra) if bias else None,
        "pos_embed": torch.randn(len(packed.layout.image), dim).to(extra) if pos else None,
        "prefix_tokens": torch.randn(1, prefix, dim).to(extra) if prefix else None,
        "mean": torch.rand(channels) if normalise else None,
        "std": torch.rand(channels) / 4 + 0.2 if normalise else None,
    }


def check(packed: PackedImages, args: dict[str, Any], tile: dict[str, Any] | None = None) -> None:
    weight, prefix = args["weight"], 0 if args["prefix_tokens"] is None else args["prefix_tokens"].shape[1]
    tokens = len(packed.layout.image) + len(packed) * prefix
    dout = torch.randn(1, tokens, weight.shape[0]).to(weight.dtype)
    rows = packed.layout.patch_tokens(prefix)

    def reference_run(dtype: torch.dtype | None) -> list[Tensor]:
        leaves = {n: t if t is None else t.to(dtype or t.dtype) for n, t in args.items()}
        leaves["weight"].requires_grad_()
        pixels = packed.pixels if packed.pixels.dtype == torch.uint8 else packed.pixels.to(dtype or packed.pixels.dtype)
        out = reference.patch_embed_packed(replace(packed, pixels=pixels), **leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves["weight"], dout.to(out.dtype))]

    ours = [
        patch_embed_packed_forward(packed.pixels, layout=packed.layout, **args, tile=tile),
        patch_embed_packed_weight_gradient(
            dout[0, rows], packed.pixels, weight.shape, packed.layout, mean=args["mean"], std=args["std"], tile=tile
        ),
    ]
    assert ours[0].dtype == weight.dtype
    assert_as_right_as_eager(ours, reference_run(None), reference_run(torch.float64), ["out", "dweight"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["floating", "uint8", "mean", "float32"])
def test_images(dtype: torch.dtype, kind: str) -> None:
    check(*make(dtype=dtype, kind=kind, wide=True), SMALL)


@pytest.mark.parametrize("pos", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_rows(pos: bool, prefix: int, bias: bool) -> None:
    check(*make(pos=pos, prefix=prefix, bias=bias), SMALL)


@pytest.mark.parametrize(
    ("patch", "channels", "grids"),
    [
        ((14, 14), 3, ((2, 3), (1, 1))),
        ((16, 16), 3, ((3, 2), (1, 5))),
        ((32, 32), 1, ((1, 2),)),
        ((3, 1), 5, ((4, 7),)),
    ],
)
def test_patches(patch: tuple[int, int], channels: int, grids: tuple[tuple[int, int], ...]) -> None:
    """The tiles are the table's: larger than these problems."""
    sizes = tuple((h * patch[0], w * patch[1]) for h, w in grids)
    check(*make(dtype=torch.bfloat16, kind="uint8", patch=patch, channels=channels, sizes=sizes))


def test_weight_gradient_in_splits() -> None:
    """Enough patches that several programs share them, in uneven shares."""
    tile = {**SMALL, "block_m": 64, "block_n": 64, "block_k": 16}
    packed, args = make(patch=(2, 2), channels=1, sizes=((18, 30), (2, 2), (40, 40)))
    dout = torch.randn(len(packed.layout.image), 24)
    with record(80) as launches:
        patch_embed_packed_weight_gradient(dout, packed.pixels, (24, 1, 2, 2), packed.layout, tile=tile)
    assert launches[0].grid == (1, 4)
    check(packed, args, tile)


def test_images_far_into_the_buffer() -> None:
    """The first pixel's place is int64, wherever the image begins; here beyond what int32 holds in bytes of a row."""
    packed, args = make()
    gap = 1 << 20
    moved = replace(
        packed,
        pixels=torch.cat([torch.full((gap,), torch.nan), packed.pixels]),
        layout=packed.layout._replace(starts=packed.layout.starts + gap),
    )
    check(moved, args, SMALL)


def test_prefix_rows_ignore_the_weights() -> None:
    packed, args = make(bias=False, pos=False)
    args["weight"] = torch.full_like(args["weight"], torch.inf)
    out = patch_embed_packed_forward(packed.pixels, layout=packed.layout, **args)
    first = packed.layout.prefix_tokens(1).flatten()
    assert torch.equal(out[0, first], args["prefix_tokens"][0].expand(len(SIZES), -1))


def test_two_runs_give_the_same_bits() -> None:
    packed, args = make(dtype=torch.bfloat16)
    dout = torch.randn(len(packed.layout.image), 24).bfloat16()
    first, second = (
        patch_embed_packed_weight_gradient(dout, packed.pixels, args["weight"].shape, packed.layout) for _ in range(2)
    )
    assert torch.equal(first, second)
