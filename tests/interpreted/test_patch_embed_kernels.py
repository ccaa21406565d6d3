"""Patch embedding's kernels in the interpreter, against the reference and its gradients, by the rule of numerics.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.triton.launch import record
from fastvit.triton.patch_embed import (
    patch_embed_forward,
    patch_embed_image_gradient,
    patch_embed_row_gradients,
    patch_embed_weight_gradient,
)
from numerics import DTYPES, assert_as_right_as_eager

SMALL = {"block_m": 16, "block_n": 16, "block_k": 32, "warps": 4, "stages": 2}  # several tiles in every direction


def make(
    *,
    dtype: torch.dtype = torch.float32,
    kind: str = "nchw",
    batch: int = 3,
    channels: int = 3,
    patch: tuple[int, int] = (4, 8),
    grid: tuple[int, int] = (3, 2),
    dim: int = 24,
    prefix: int = 1,
    pos: str = "all",
    bias: bool = True,
    wide: bool = False,
) -> dict[str, Any]:
    """The op's arguments; ``wide`` keeps bias, position and prefix in float32."""
    size = (batch, channels, grid[0] * patch[0], grid[1] * patch[1])
    extra = torch.float32 if wide else dtype
    if "uint8" in kind:
        images = torch.randint(0, 256, size, dtype=torch.uint8)
    else:
        images = torch.rand(size).to(torch.float32 if "float32" in kind else dtype)
    if "nhwc" in kind:  # the layout of decoders, and PyTorch's channels_last
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if "cropped" in kind:  # strides that belong to a larger image
        full = torch.full((batch, channels, size[2] + 1, size[3] + 3), torch.nan).to(dtype)
        full[:, :, 1:, 2:-1] = images
        images = full[:, :, 1:, 2:-1]
    normalise = "uint8" in kind or "mean" in kind
    patches = grid[0] * grid[1]
    return {
        "images": images,
        "weight": (torch.randn(dim, channels, *patch) / (channels * patch[0] * patch[1]) ** 0.5).to(dtype),
        "bias": torch.randn(dim).to(extra) if bias else None,
        "pos_embed": None if pos == "none" else torch.randn(1, patches + prefix * (pos == "all"), dim).to(extra),
        "prefix_tokens": torch.randn(1, prefix, dim).to(extra) if prefix else None,
        "mean": torch.rand(channels) if normalise else None,
        "std": torch.rand(channels) / 4 + 0.2 if normalise else None,
    }


def reference_run(args: dict[str, Any], dout: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The output and every gradient of the reference, in ``dtype`` or as given."""
    leaves = {n: t if t is None or not t.is_floating_point() else t.to(dtype or t.dtype) for n, t in args.items()}
    wanted = {}
    for name, t in leaves.items():
        if t is not None and t.is_floating_point() and name not in ("mean", "std"):
            wanted[name] = leaves[name] = t.detach().requires_grad_()
    if dtype is not None:  # uint8 images become whatever the weight is
        assert leaves["weight"].dtype == dtype
    out = reference.patch_embed(**leaves)
    grads = torch.autograd.grad(out, list(wanted.values()), dout.to(out.dtype))
    return {"out": out, **{f"d{n}": g for n, g in zip(wanted, grads, strict=True)}}


def kernel_run(args: dict[str, Any], dout: Tensor, tile: dict[str, Any] | None) -> dict[str, Tensor]:
    """The same from the kernels; bias, position and prefix come from the row sums, as the ops layer takes them."""
    images, weight, mean, std = args["images"], args["weight"], args["mean"], args["std"]
    prefix = 0 if args["prefix_tokens"] is None else args["prefix_tokens"].shape[1]
    out = {"out": patch_embed_forward(**args, tile=tile)}
    assert out["out"].dtype == weight.dtype
    if images.is_floating_point():
        out["dimages"] = patch_embed_image_gradient(
            dout, weight, images.shape, std=std, prefix=prefix, dtype=images.dtype, tile=tile
        )
    out["dweight"] = patch_embed_weight_gradient(
        dout, images, weight.shape, mean=mean, std=std, prefix=prefix, tile=tile
    )
    rows = patch_embed_row_gradients(dout)
    if args["bias"] is not None:
        out["dbias"] = rows[prefix:].sum(0)
    if args["pos_embed"] is not None:
        out["dpos_embed"] = rows[-args["pos_embed"].shape[1] :][None]
    if prefix:
        out["dprefix_tokens"] = rows[None, :prefix]
    return out


def check(args: dict[str, Any], tile: dict[str, Any] | None = None) -> None:
    weight, prefix_tokens = args["weight"], args["prefix_tokens"]
    batch, _, height, width = args["images"].shape
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    patches = (height // weight.shape[2]) * (width // weight.shape[3])
    dout = torch.randn(batch, prefix + patches, weight.shape[0]).to(weight.dtype)
    runs = [kernel_run(args, dout, tile), reference_run(args, dout, None), reference_run(args, dout, torch.float64)]
    assert runs[0].keys() == runs[1].keys() == runs[2].keys()
    assert_as_right_as_eager(*[list(run.values()) for run in runs], names=list(runs[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nchw", "nhwc", "cropped", "uint8", "uint8 nhwc", "mean", "float32"])
def test_images(dtype: torch.dtype, kind: str) -> None:
    check(make(dtype=dtype, kind=kind, wide=True), SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pos", ["none", "patches", "all"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_rows(dtype: torch.dtype, pos: str, prefix: int, bias: bool) -> None:
    check(make(dtype=dtype, pos=pos, prefix=prefix, bias=bias, kind="uint8 nhwc" if bias else "nchw"), SMALL)


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
    check(args, tile)


def test_far_strides_are_made_contiguous() -> None:
    """Within a patch offsets are int32: channels 2^30 apart do not fit, images that far apart do."""
    weight = torch.empty(24, 3, 16, 16, device="meta")
    for strides, passed_on in (((256, 2**30, 16, 1), (768, 256, 16, 1)), ((2**40, 256, 16, 1),) * 2):
        with record(90) as launches:
            patch_embed_forward(torch.empty_strided((2, 3, 16, 16), strides, device="meta"), weight)
        assert launches[0].args["strides"] == passed_on


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_normalisation_is_float32(scale: float) -> None:
    """bfloat16 weights, float32 images around a large mean: to subtract it in bfloat16 would lose the picture."""
    args = make(dtype=torch.bfloat16, kind="float32 mean", prefix=0, pos="none", bias=False)
    args["mean"] = torch.full((3,), 4.0)
    args["images"] = args["images"] * scale + 4.0
    args["std"] = torch.full((3,), 0.25 * scale)
    check(args)


def test_dout_of_any_layout() -> None:
    args = make()
    dout = torch.randn(24).expand(3, 7, 24)
    eager, exact = (reference_run(args, dout, dtype) for dtype in (None, torch.float64))
    ours = kernel_run(args, dout, SMALL)
    assert_as_right_as_eager(*[list(run.values()) for run in (ours, eager, exact)], names=list(ours))


def test_two_runs_give_the_same_bits() -> None:
    args, dout = make(batch=5, wide=True, dtype=torch.bfloat16), torch.randn(5, 7, 24).bfloat16()
    first, second = kernel_run(args, dout, SMALL), kernel_run(args, dout, SMALL)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["nchw", "uint8 nhwc"])
def test_no_images(kind: str) -> None:
    args = make(kind=kind, batch=0)
    run = kernel_run(args, torch.empty(0, 7, 24), None)
    assert run["out"].shape == (0, 7, 24)
    assert torch.equal(run["dweight"], torch.zeros_like(args["weight"]))
    assert torch.equal(run["dpos_embed"], torch.zeros(1, 7, 24))
    if kind == "nchw":
        assert run["dimages"].shape == args["images"].shape


def test_prefix_rows_ignore_the_weights() -> None:
    """A weight of infinity belongs to the patches; the prefix rows are what they were given."""
    args = make(bias=False, pos="none")
    args["weight"] = torch.full_like(args["weight"], torch.inf)
    out = patch_embed_forward(**args)
    assert torch.equal(out[:, :1], args["prefix_tokens"].expand(3, -1, -1))
