"""Packed patch embedding's CUDA kernels, executed on the CPU: the cases of every backend, and those of these alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit import ops, reference
from fastvit.cuda import extension
from fastvit.cuda.patch_embed import patch_embed_forward, patch_embed_weight_gradient
from numerics import assert_as_right_as_eager, assert_model_as_right_as_eager, check_op
from packed_patch_cases import PackedPatchCases, make

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(params=HALF, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class TestPackedPatchEmbedding(PackedPatchCases):
    forward = staticmethod(patch_embed_forward)
    weight_gradient = staticmethod(patch_embed_weight_gradient)

    @pytest.mark.parametrize("kind", ["floating", "uint8", "float32"])
    @pytest.mark.parametrize(("columns", "dim"), [((60, 1, 20), 104), ((40, 90, 30), 248), ((1, 95, 300, 3), 504)])
    def test_tiles(self, kind: str, columns: tuple[int, ...], dim: int) -> None:
        """Several tiles in every direction, with a rest: on four multiprocessors the small, the medium, the large."""
        sizes = tuple((2, 8 * n) for n in columns)
        self.check(*make(kind=kind, sizes=sizes, dim=dim, patch=(2, 8), prefix=2))

    @pytest.mark.parametrize("offset", [1, 2, 4])
    @pytest.mark.parametrize("kind", ["floating", "uint8", "float32"])
    def test_unaligned_pixels(self, kind: str, offset: int) -> None:
        """A buffer that begins anywhere: loads are as narrow as it asks."""
        packed, args = make(kind=kind)
        pixels = torch.cat([packed.pixels[:offset], packed.pixels])[offset:]
        self.check(replace(packed, pixels=pixels), args)

    @pytest.mark.parametrize("absent", ["mean", "std"])
    @pytest.mark.parametrize("kind", ["uint8", "mean"])
    def test_mean_or_std_alone(self, kind: str, absent: str) -> None:
        packed, args = make(kind=kind)
        self.check(packed, {**args, absent: None})

    @pytest.mark.parametrize("architecture", [80, 89, 90])
    def test_architectures(self, architecture: int) -> None:
        extension.set_architecture(architecture)
        try:
            self.check(*make())
        finally:
            extension.set_architecture(80)


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("kind", ["floating", "uint8"])
def test_weight_gradient_in_splits(kind: str, splits: int) -> None:
    """Uneven shares of the patches, and more shares than steps: the last ones are zeros."""
    packed, args = make(kind=kind, patch=(2, 2), sizes=((18, 30), (2, 2), (10, 4)))
    layout, weight, dout = packed.layout, args["weight"], torch.randn(146, 24).half()
    partials = torch.empty(splits, 24, 12)
    extension.library.patch_embed_packed_weight_gradient(
        dout, dout, packed.pixels, 2, 2, *layout, args["mean"], args["std"], partials
    )

    def expected(dtype: torch.dtype) -> Tensor:
        patches = reference.normalise_pixels(packed.patches(), args["mean"], args["std"], dtype).flatten(1)
        return (dout.to(dtype).T @ patches.to(dtype)).view(weight.shape)

    exact = expected(torch.float64)
    assert_as_right_as_eager(partials.double().sum(0).view(weight.shape), expected(torch.float16), exact)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_out_dtype(out_dtype: torch.dtype) -> None:
    """Rounded once, to what is asked for."""
    packed, args = make(wide=True)
    exact = reference.patch_embed_packed(
        replace(packed, pixels=packed.pixels.double()),
        **{n: None if t is None else t.double() for n, t in args.items()},
    )
    out = patch_embed_forward(packed.pixels, layout=packed.layout, **args, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert_as_right_as_eager(out, exact.to(out_dtype), exact)


def test_no_patches() -> None:
    packed, args = make()
    none = {name: getattr(packed.layout, name)[:0] for name in ("starts", "sizes", "image", "row", "column")}
    layout = packed.layout._replace(**none, cu_patches=packed.layout.cu_patches[:1])
    args["pos_embed"] = args["pos_embed"][:0]
    assert patch_embed_forward(packed.pixels, layout=layout, **args).shape == (1, 0, 24)
    dweight = patch_embed_weight_gradient(torch.empty(0, 24).half(), packed.pixels, (24, 3, 4, 8), layout=layout)
    assert torch.equal(dweight, torch.zeros(24, 3, 4, 8))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dim": 20}, "width 20; accepted: multiples of 8"),
        ({"channels": 1025, "patch": (1, 1), "kind": "uint8"}, "1025 channels"),
    ],
)
def test_what_is_refused(change: dict[str, Any], says: str) -> None:
    packed, args = make(**change)
    with pytest.raises((ValueError, RuntimeError), match=says):
        patch_embed_forward(packed.pixels, layout=packed.layout, **args)


def test_tables_that_do_not_fit_are_refused() -> None:
    packed, args = make()
    for name, table, says in (
        ("starts", packed.layout.starts.int(), "starts of 5 int32; accepted: 5 int64"),
        ("sizes", packed.layout.sizes[1:], "sizes of 8 int32; accepted: 10 int32"),
        ("row", packed.layout.row[1:], "row of 22 int32; accepted: 23 int32"),
    ):
        with pytest.raises(RuntimeError, match=says):
            patch_embed_forward(packed.pixels, layout=packed.layout._replace(**{name: table}), **args)


# --- through the op, and in a model ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["floating", "uint8", "mean", "float32"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_op_and_every_gradient(dtype: torch.dtype, kind: str, prefix: int) -> None:
    packed, args = make(dtype=dtype, kind=kind, prefix=prefix, wide=True)
    leaves = {"pixels": packed.pixels, **args}
    for name, t in leaves.items():
        if t is not None and t.is_floating_point() and name not in ("mean", "std"):
            t.requires_grad_()

    def on(op: Any) -> Any:
        return lambda pixels, **kw: op(replace(packed, pixels=pixels), **kw)

    with fastvit.backend("cuda"):
        check_op(on(ops.patch_embed_packed), on(reference.patch_embed_packed), leaves)


def test_widths_are_refused_in_words() -> None:
    packed, args = make(dim=20)
    with (
        fastvit.backend("cuda"),
        pytest.raises(fastvit.BackendUnavailable, match=r"patch_embed.*20.*multiples of 8"),
    ):
        ops.patch_embed_packed(packed, **args)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "global_pool": "avg"}], ids=str)
def test_model(dtype: torch.dtype, options: dict[str, Any], architecture: int) -> None:
    """A ViT on packed images, forward and backward, against the reference on each image alone."""
    model = fastvit.ViT(
        img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=8, dynamic_img_size=True, **options
    )
    images = [torch.randn(3, *size).to(dtype) for size in ((8, 16), (24, 16), (8, 8), (16, 32))]

    def run(backend: str, kind: torch.dtype, together: bool) -> list[Tensor]:
        network, given = copy.deepcopy(model).to(kind), [image.to(kind) for image in images]
        with fastvit.backend(backend):
            logits = network(given) if together else torch.cat([network(image[None]) for image in given])
            logits.square().sum().backward()
        return [logits.detach(), *(p.grad for p in network.parameters())]

    extension.set_architecture(architecture)
    try:
        ours = run("cuda", dtype, True)
    finally:
        extension.set_architecture(80)
    assert_model_as_right_as_eager(ours, run("reference", dtype, False), run("reference", torch.float64, False))


class _Launches(TorchDispatchMode):
    """The ops that are called inside, views and new tensors apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.name() and "fill" not in func.name():
            self.names.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("images", [1, 40])
def test_launches_do_not_grow_with_the_images(images: int) -> None:
    """And PyTorch gathers nothing."""
    packed, args = make(sizes=((4, 8), (8, 16)) * images, kind="uint8")
    dout = torch.randn(len(packed.layout.image), 24).half()
    with _Launches() as seen:
        patch_embed_forward(packed.pixels, layout=packed.layout, **args)
        patch_embed_weight_gradient(dout, packed.pixels, args["weight"].shape, layout=packed.layout)
    assert seen.names == [
        "patch_embed_packed_forward",
        "patch_embed_weight_gradient_splits",
        "patch_embed_packed_weight_gradient",
        "sum_partials",
    ]
