"""Patch embedding's cases for every backend: arguments, runs of kernels and reference, and shared assertions.

``launchers`` is the backend's module with ``patch_embed_forward`` and the three gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit import reference
from numerics import assert_as_right_as_eager

OTHER = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}


def make(
    *,
    dtype: torch.dtype,
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
    margin: int = 6,
) -> dict[str, Any]:
    """The op's arguments; ``wide`` keeps bias, position and prefix in float32,
    and rows of a cropped image are ``margin`` pixels longer than those read."""
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
    if "cropped" in kind:  # strides that belong to a larger image
        full = torch.full((batch, channels, size[2] + 1, size[3] + margin), torch.nan).to(pixels)
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
    inputs = {}
    for name, t in leaves.items():
        if t is not None and t.is_floating_point() and name not in ("mean", "std"):
            inputs[name] = leaves[name] = t.detach().requires_grad_()
    out = reference.patch_embed(**leaves)
    grads = torch.autograd.grad(out, list(inputs.values()), dout.to(out.dtype))
    return {"out": out, **{f"d{n}": g for n, g in zip(inputs, grads, strict=True)}}


def kernel_run(launchers: Any, args: dict[str, Any], dout: Tensor, **tile: Any) -> dict[str, Tensor]:
    """The same from the kernels; bias, position and prefix come from the row sums, as the ops layer takes them."""
    images, weight, mean, std, prefix = *(args[n] for n in ("images", "weight", "mean", "std")), prefix_of(args)
    out = {"out": launchers.patch_embed_forward(**args, **tile)}
    assert out["out"].dtype == weight.dtype
    if images.is_floating_point():
        out["dimages"] = launchers.patch_embed_image_gradient(
            dout, weight, images.shape, std=std, prefix=prefix, dtype=images.dtype, **tile
        )
    out["dweight"] = launchers.patch_embed_weight_gradient(
        dout, images, weight.shape, mean=mean, std=std, prefix=prefix, **tile
    )
    rows = launchers.patch_embed_row_gradients(dout)
    if args["bias"] is not None:
        out["dbias"] = rows[prefix:].sum(0)
    if args["pos_embed"] is not None:
        out["dpos_embed"] = rows[-args["pos_embed"].shape[1] :][None]
    if prefix:
        out["dprefix_tokens"] = rows[None, :prefix]
    return out


def check(launchers: Any, args: dict[str, Any], dout: Tensor | None = None, **tile: Any) -> None:
    """Compare the output and every gradient with the reference, by the rule of numerics.py."""
    dout = dout_for(args) if dout is None else dout
    runs = [
        kernel_run(launchers, args, dout, **tile),
        reference_run(args, dout, None),
        reference_run(args, dout, torch.float64),
    ]
    assert runs[0].keys() == runs[1].keys() == runs[2].keys()
    assert_as_right_as_eager(*[list(run.values()) for run in runs], names=list(runs[0]))


def check_normalisation_is_float32(launchers: Any, scale: float) -> None:
    """bfloat16 weights, float32 images around a large mean: to subtract it in bfloat16 would lose the picture."""
    args = make(dtype=torch.bfloat16, kind="float32 mean", prefix=0, pos="none", bias=False)
    args["mean"] = torch.full((3,), 4.0)
    args["images"] = args["images"] * scale + 4.0
    args["std"] = torch.full((3,), 0.25 * scale)
    check(launchers, args)


def check_prefix_rows_ignore_the_weights(launchers: Any, dtype: torch.dtype) -> None:
    """A weight of infinity belongs to the patches; the prefix rows are the prefix tokens."""
    args = make(dtype=dtype, bias=False, pos="none")
    args["weight"] = torch.full_like(args["weight"], torch.inf)
    out = launchers.patch_embed_forward(**args)
    assert torch.equal(out[:, :1], args["prefix_tokens"].expand(3, -1, -1))


def check_two_runs_give_the_same_bits(launchers: Any, args: dict[str, Any], **tile: Any) -> None:
    dout = torch.randn(5, 7, 24).bfloat16()
    first, second = (kernel_run(launchers, args, dout, **tile) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def check_no_images(launchers: Any, kind: str, dtype: torch.dtype) -> None:
    args = make(dtype=dtype, kind=kind, batch=0)
    run = kernel_run(launchers, args, torch.empty(0, 7, 24, dtype=dtype))
    assert run["out"].shape == (0, 7, 24)
    assert torch.equal(run["dweight"], torch.zeros(24, 3, 4, 8))
    assert torch.equal(run["dpos_embed"], torch.zeros(1, 7, 24))
    if kind == "nchw":
        assert run["dimages"].shape == args["images"].shape
