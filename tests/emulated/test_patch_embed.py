"""Patch embedding's CUDA kernels, run on the CPU, against the reference, by the rule of numerics.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import reference
from fastvit.cuda import extension
from fastvit.cuda.patch_embed import (
    patch_embed_forward,
    patch_embed_image_gradient,
    patch_embed_row_gradients,
    patch_embed_weight_gradient,
)
from numerics import assert_as_right_as_eager

HALF = (torch.float16, torch.bfloat16)
OTHER = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}


def make(
    *,
    dtype: torch.dtype = torch.bfloat16,
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
    pixels = torch.float32 if "float32" in kind else OTHER[dtype] if "other" in kind else dtype
    if "uint8" in kind:
        pixels = torch.uint8
        images = torch.randint(0, 256, size, dtype=pixels)
    else:
        images = torch.rand(size).to(pixels)
    if "nhwc" in kind:  # the layout of decoders, and PyTorch's channels_last
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if "cropped" in kind:  # strides that belong to a larger image, 2 or 1 of which are aligned
        full = torch.full((batch, channels, size[2] + 1, size[3] + 6), torch.nan).to(pixels)
        left = 3 if "odd" in kind else 2
        full[:, :, 1:, left : left + size[3]] = images
        images = full[:, :, 1:, left : left + size[3]]
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


def prefix_of(args: dict[str, Any]) -> int:
    return 0 if args["prefix_tokens"] is None else args["prefix_tokens"].shape[1]


def dout_for(args: dict[str, Any]) -> Tensor:
    weight, (batch, _, height, width) = args["weight"], args["images"].shape
    patches = (height // weight.shape[2]) * (width // weight.shape[3])
    return torch.randn(batch, prefix_of(args) + patches, weight.shape[0]).to(weight.dtype)


def reference_run(args: dict[str, Any], dout: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The output and every gradient of the reference, in ``dtype`` or as given."""
    leaves = {n: t if t is None or not t.is_floating_point() else t.to(dtype or t.dtype) for n, t in args.items()}
    wanted = {}
    for name, t in leaves.items():
        if t is not None and t.is_floating_point() and name not in ("mean", "std"):
            wanted[name] = leaves[name] = t.detach().requires_grad_()
    out = reference.patch_embed(**leaves)
    grads = torch.autograd.grad(out, list(wanted.values()), dout.to(out.dtype))
    return {"out": out, **{f"d{n}": g for n, g in zip(wanted, grads, strict=True)}}


def kernel_run(args: dict[str, Any], dout: Tensor) -> dict[str, Tensor]:
    """The same from the kernels; bias, position and prefix come from the row sums, as the ops layer takes them."""
    images, weight, mean, std, prefix = *(args[n] for n in ("images", "weight", "mean", "std")), prefix_of(args)
    out = {"out": patch_embed_forward(**args)}
    if images.is_floating_point():
        out["dimages"] = patch_embed_image_gradient(
            dout, weight, images.shape, std=std, prefix=prefix, dtype=images.dtype
        )
    out["dweight"] = patch_embed_weight_gradient(dout, images, weight.shape, mean=mean, std=std, prefix=prefix)
    rows = patch_embed_row_gradients(dout)
    if args["bias"] is not None:
        out["dbias"] = rows[prefix:].sum(0)
    if args["pos_embed"] is not None:
        out["dpos_embed"] = rows[-args["pos_embed"].shape[1] :][None]
    if prefix:
        out["dprefix_tokens"] = rows[None, :prefix]
    return out


def check(args: dict[str, Any], dout: Tensor | None = None) -> None:
    dout = dout_for(args) if dout is None else dout
    runs = [kernel_run(args, dout), reference_run(args, dout, None), reference_run(args, dout, torch.float64)]
    assert runs[0].keys() == runs[1].keys() == runs[2].keys()
    assert_as_right_as_eager(*[list(run.values()) for run in runs], names=list(runs[0]))


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


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_normalisation_is_float32(scale: float) -> None:
    """bfloat16 weights, float32 images around a large mean: to subtract it in bfloat16 would lose the picture."""
    args = make(kind="float32 mean", prefix=0, pos="none", bias=False)
    args["mean"] = torch.full((3,), 4.0)
    args["images"] = args["images"] * scale + 4.0
    args["std"] = torch.full((3,), 0.25 * scale)
    check(args)


@pytest.mark.parametrize("absent", ["mean", "std"])
@pytest.mark.parametrize("kind", ["uint8", "mean"])
def test_mean_or_std_alone(kind: str, absent: str) -> None:
    check({**make(kind=kind), absent: None})


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_out_dtype(out_dtype: torch.dtype) -> None:
    """Rounded once, to what is asked for."""
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


def test_two_runs_give_the_same_bits() -> None:
    args = make(batch=5, wide=True)
    dout = dout_for(args)
    first, second = kernel_run(args, dout), kernel_run(args, dout)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["nchw", "uint8 nhwc"])
def test_no_images(kind: str) -> None:
    args = make(kind=kind, batch=0)
    run = kernel_run(args, torch.empty(0, 7, 24, dtype=torch.bfloat16))
    assert run["out"].shape == (0, 7, 24)
    assert torch.equal(run["dweight"], torch.zeros(24, 3, 4, 8))
    if kind == "nchw":
        assert run["dimages"].shape == args["images"].shape


def test_prefix_rows_ignore_the_weights() -> None:
    """A weight of infinity belongs to the patches; the prefix rows are what they were given."""
    args = make(bias=False, pos="none")
    args["weight"] = torch.full_like(args["weight"], torch.inf)
    out = patch_embed_forward(**args)
    assert torch.equal(out[:, :1], args["prefix_tokens"].expand(3, -1, -1))


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
