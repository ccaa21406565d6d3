"""What packed patch embedding is held to, on any backend: the reference and its gradient (the rule: tests/numerics.py).

A backend's test file inherits from PackedPatchCases, names its launchers, and has a fixture ``dtype``: those it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import PackedImages, pack, reference
from numerics import assert_as_right_as_eager

SIZES = ((12, 16), (4, 8), (8, 40), (4, 8), (20, 8))  # images of 6, 1, 10, 1 and 5 patches of 4x8


def make(
    *,
    dtype: torch.dtype = torch.float16,
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
        other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        pixels = {"float32": torch.float32, "other": other}.get(kind, dtype)
        images = [torch.rand(channels, *size).to(pixels) for size in sizes]
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


class PackedPatchCases:
    forward: Callable[..., Tensor]  # patch_embed_forward
    weight_gradient: Callable[..., Tensor]  # patch_embed_weight_gradient

    def check(self, packed: PackedImages, args: dict[str, Any], **options: Any) -> None:
        """``options`` are the launchers' own."""
        weight, prefix = args["weight"], 0 if args["prefix_tokens"] is None else args["prefix_tokens"].shape[1]
        tokens = len(packed.layout.image) + len(packed) * prefix
        dout = torch.randn(1, tokens, weight.shape[0]).to(weight.dtype)
        rows = packed.layout.patch_tokens(prefix)

        def reference_run(dtype: torch.dtype | None) -> list[Tensor]:
            leaves = {n: t if t is None else t.to(dtype or t.dtype) for n, t in args.items()}
            leaves["weight"].requires_grad_()
            pixels = packed.pixels
            if pixels.dtype != torch.uint8:
                pixels = pixels.to(dtype or pixels.dtype)
            out = reference.patch_embed_packed(replace(packed, pixels=pixels), **leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves["weight"], dout.to(out.dtype))]

        ours = [
            self.forward(packed.pixels, layout=packed.layout, **args, **options),
            self.weight_gradient(
                dout[0, rows],
                packed.pixels,
                weight.shape,
                layout=packed.layout,
                mean=args["mean"],
                std=args["std"],
                **options,
            ),
        ]
        assert ours[0].dtype == weight.dtype
        assert_as_right_as_eager(ours, reference_run(None), reference_run(torch.float64), ["out", "dweight"])

    @pytest.mark.parametrize("kind", ["floating", "uint8", "mean", "float32", "other"])
    def test_images(self, dtype: torch.dtype, kind: str) -> None:
        """Every way to read a pixel."""
        self.check(*make(dtype=dtype, kind=kind, wide=True))

    @pytest.mark.parametrize("pos", [False, True])
    @pytest.mark.parametrize("prefix", [0, 1, 5])
    @pytest.mark.parametrize("bias", [False, True])
    def test_rows(self, pos: bool, prefix: int, bias: bool) -> None:
        self.check(*make(pos=pos, prefix=prefix, bias=bias))

    @pytest.mark.parametrize("kind", ["floating", "uint8"])
    @pytest.mark.parametrize(
        ("patch", "channels", "grids"),
        [
            ((14, 14), 3, ((2, 3), (1, 1))),
            ((16, 16), 3, ((3, 2), (1, 5))),
            ((32, 32), 1, ((1, 2),)),
            ((3, 1), 5, ((4, 7),)),
        ],
    )
    def test_patches(
        self, kind: str, patch: tuple[int, int], channels: int, grids: tuple[tuple[int, int], ...]
    ) -> None:
        """Runs of pixels that loads of 8 or of 2 divide, and odd ones; several images, and one."""
        sizes = tuple((h * patch[0], w * patch[1]) for h, w in grids)
        self.check(*make(dtype=torch.bfloat16, kind=kind, patch=patch, channels=channels, sizes=sizes))

    def test_many_images(self) -> None:
        """One tile then begins many images, and so writes the prefix rows of all of them."""
        self.check(*make(sizes=((1, 8),) * 67, patch=(1, 8), channels=1, prefix=3))

    def test_images_far_into_the_buffer(self) -> None:
        """Where an image begins is a number of its own, not the sum of what is before it."""
        packed, args = make()
        gap = 1 << 20
        moved = replace(
            packed,
            pixels=torch.cat([torch.full((gap,), torch.nan, dtype=packed.pixels.dtype), packed.pixels]),
            layout=packed.layout._replace(starts=packed.layout.starts + gap),
        )
        self.check(moved, args)

    def test_prefix_rows_ignore_the_weights(self) -> None:
        """A weight of infinity belongs to the patches; the prefix rows are what they were given."""
        packed, args = make(bias=False, pos=False)
        args["weight"] = torch.full_like(args["weight"], torch.inf)
        out = self.forward(packed.pixels, layout=packed.layout, **args)
        first = packed.layout.prefix_tokens(1).flatten()
        assert torch.equal(out[0, first], args["prefix_tokens"][0].expand(len(SIZES), -1))

    def test_two_runs_give_the_same_bits(self) -> None:
        packed, args = make(dtype=torch.bfloat16)
        dout = torch.randn(len(packed.layout.image), 24).bfloat16()
        first, second = (
            self.weight_gradient(dout, packed.pixels, args["weight"].shape, layout=packed.layout) for _ in range(2)
        )
        assert torch.equal(first, second)
