"""Every op through ``fastvit.ops`` on the CUDA backend, its kernels executed on the CPU: forward and every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastvit
from cases import CASES, FLOAT32_REFUSED, Case, refused_by_cuda, with_shared_residual
from fastvit import ops, reference
from fastvit.cuda import extension
from numerics import assert_same_bits_twice, check_op

HALF = (torch.float16, torch.bfloat16)


def _patches(make, images: torch.Tensor, width: int, p: int, q: int, prefix: int) -> dict:
    channels = images.shape[1] if images.shape[1] in (1, 3, 5) else images.shape[3]
    height, right = images.shape[2:] if images.shape[1] == channels else images.shape[1:3]
    args = {"images": images, "weight": make(width, channels, p, q, scale=0.1), "bias": make(width)}
    args["pos_embed"] = make(1, height // p * (right // q) + prefix, width, dtype=torch.float32)
    if prefix:
        args["prefix_tokens"] = make(1, prefix, width, dtype=torch.float32)
    if images.dtype == torch.uint8:
        args |= {"mean": torch.rand(channels), "std": torch.rand(channels) + 0.2}
    return args


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


ALSO = [  # what those refused are there for, at sizes that are taken
    Case("patch_embed", "square-16", lambda m: _patches(m, m(2, 3, 12, 12), 16, 4, 4, 1)),
    Case("patch_embed", "oblong-24", lambda m: _patches(m, m(1, 5, 8, 18), 24, 4, 6, 5)),
    Case("patch_embed", "uint8-nchw-16", lambda m: _patches(m, _bytes(2, 3, 8, 8), 16, 4, 4, 0)),
    Case("patch_embed", "uint8-nhwc-16", lambda m: _patches(m, _bytes(2, 8, 12, 3), 16, 4, 4, 0)),
    Case(
        "attention", "lse-40", lambda m: {n: m(1, 7 if n == "q" else 21, 3, 40) for n in "qkv"} | {"return_lse": True}
    ),
    Case(
        "layer_norm",
        "drop-path",
        lambda m: {
            "x": m(2, 3, 40),
            "weight": m(40),
            "bias": m(40),
            "residual": m(2, 3, 40),
            "row_scale": torch.rand(2),
        },
    ),
    Case("attention_qkvpacked", "scale-32", lambda m: {"qkv": m(2, 5, 3, 2, 32), "scale": 0.4}),
]
REFUSED = [case for case in CASES if refused_by_cuda(case, torch.float16)]
TAKEN = [case for case in CASES if case not in REFUSED] + ALSO


@pytest.fixture(autouse=True, params=[80, 90])
def _cuda(request: pytest.FixtureRequest) -> Iterator[None]:
    extension.set_architecture(request.param)
    with fastvit.backend("cuda"):
        yield
    extension.set_architecture(80)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_op_is_as_right_as_eager(case: Case, dtype: torch.dtype) -> None:
    check_op(case.kernel, case.reference, case.args(dtype, "cpu"))


@pytest.mark.parametrize("case", [c for c in TAKEN if c.op == "layer_norm"], ids=str)
def test_layer_norm_in_float32(case: Case) -> None:
    check_op(case.kernel, case.reference, case.args(torch.float32, "cpu"))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("normed", [True, False])
def test_mlp_on_its_own_residual(dtype: torch.dtype, normed: bool) -> None:
    args = next(c for c in CASES if str(c) == "mlp-gelu").args(dtype, "cpu")
    del args["residual"]
    if not normed:
        args["norm"] = None
    check_op(with_shared_residual(ops.mlp), with_shared_residual(reference.mlp), args)


@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_gradients_are_deterministic(case: Case) -> None:
    assert_same_bits_twice(case.kernel, case.args(torch.float16, "cpu"))


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_is_refused(case: Case) -> None:
    with pytest.raises(fastvit.BackendUnavailable, match=f"{case.op}.*{refused_by_cuda(case, torch.float16)}"):
        case.kernel(**case.args(torch.float16, "cpu"))


def test_fc2_of_another_width_is_refused() -> None:
    x, fc1, fc2 = (torch.randn(n, 32, dtype=torch.float16) for n in (4, 32, 12))
    with pytest.raises(fastvit.BackendUnavailable, match=r"mlp.*\(12, 32\).*multiples of 8"):
        ops.mlp(x, fc1, None, fc2, None)


@pytest.mark.parametrize("which", ["x", "dout"])
def test_rows_that_overlap_are_copied(which: str) -> None:
    x, weight = torch.randn(1, 16).bfloat16().expand(6, 16), torch.randn(8, 16).bfloat16().requires_grad_()
    if which == "dout":
        x = x.contiguous().requires_grad_()
    check_op(
        lambda **kw: ops.linear(**kw).sum(0), lambda **kw: reference.linear(**kw).sum(0), {"x": x, "weight": weight}
    )


def test_float32_products_are_refused() -> None:
    for case in CASES:
        if case.op != "layer_norm":
            assert refused_by_cuda(case, torch.float32) == FLOAT32_REFUSED
            with pytest.raises(fastvit.BackendUnavailable, match=FLOAT32_REFUSED):  # of the op, or one that it calls
                case.kernel(**case.args(torch.float32, "cpu"))


MODELS: dict[str, tuple[dict[str, Any], tuple[tuple[int, int], ...]]] = {
    "images of one size": ({"depth": 2}, ()),
    "packed with relative positions": (
        {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "depth": 1}, ((32, 16), (16, 16), (32, 16)),
    ),
    "packed with rope and patch dropout": (
        {"rope": 100.0, "patch_drop_rate": 0.5, "depth": 1}, ((32, 16), (16, 16), (32, 16)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, dtype: torch.dtype) -> None:
    """A whole ViT with LayerScale, forward and backward: as the reference, and within its rounding of float64."""
    options, sizes = MODELS[name]
    sized: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "num_classes": 8}
    model = fastvit.ViT(**sized, **options, init_values=0.5)
    for parameter in model.parameters():  # the zero-initialised ones would hide what multiplies them
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    images = [torch.randn(3, *size) for size in sizes] or torch.randn(2, 3, 32, 32).unbind()
    found = []
    for backend, kind in (("cuda", dtype), ("reference", dtype), ("reference", torch.float64)):
        with fastvit.backend(backend):
            network = model.to(kind)
            network.zero_grad()
            given = [image.to(dtype).to(kind) for image in images]
            torch.manual_seed(2)  # patch dropout
            logits = network(given if sizes else torch.stack(given))
            logits.square().sum().backward()
            found.append([logits.double(), *(p.grad.double() for p in network.parameters())])
    from numerics import assert_model_as_right_as_eager

    assert_model_as_right_as_eager(*found)
