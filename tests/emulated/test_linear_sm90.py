"""The linear layer's kernels for Hopper (TMA, mbarriers, wgmma), run on the CPU, against the reference."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_linear import cast, check_forward, extras
from torch import Tensor

from fastvit import reference
from fastvit.activations import ACTIVATIONS
from fastvit.cuda import extension
from fastvit.cuda.linear import linear_input_gradient, linear_weight_gradient
from numerics import assert_as_right_as_eager, strided

HALF = (torch.float16, torch.bfloat16)
CASES = ["plain", *ACTIVATIONS, "residual", "gamma", "all"]
MULTIPROCESSORS = 4  # of the emulated device

# (M, N, K) of products that take each of the tiles, as test_sizes_take_their_tiles says. All end in parts of a tile,
# and so do their sums. 1, 4 and 5 have more tiles than multiprocessors and longer sums than stages, so that it matters
# that consumers take turns and that rings go round.
TILES = ((128, 256), (128, 192), (128, 128), (64, 64))
SIZES = ((260, 200, 616), (65, 1032, 296), (65, 392, 232), (65, 104, 72), (65, 1544, 808), (13, 264, 552))


@pytest.fixture(autouse=True)
def _hopper() -> Iterator[None]:
    extension.set_architecture(90)
    yield
    extension.set_architecture(80)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The functions of csrc/sm90/linear_sm90_tiles.h."""
    folder = tmp_path_factory.mktemp("table")
    csrc = Path(__file__).parents[2] / "csrc"
    (folder / "table.cpp").write_text(
        '#include "linear_sm90_tiles.h"\n'
        "using namespace fastvit::sm90;\n"
        'extern "C" int block_m(long m, long n, long k, int p) { return kTiles[choose_tile(m, n, k, p)].block_m; }\n'
        'extern "C" int block_n(long m, long n, long k, int p) { return kTiles[choose_tile(m, n, k, p)].block_n; }\n'
        'extern "C" long splits(long m, long n, long k, int p) { return choose_splits(m, n, k, p); }\n'
    )
    command = [
        "g++",
        "-std=c++20",
        "-shared",
        "-fPIC",
        f"-I{csrc}/sm90",
        f"-I{csrc}/include",
        "table.cpp",
        "-o",
        "table.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "table.so"))


def tile(table: ctypes.CDLL, m: int, n: int, k: int, multiprocessors: int) -> tuple[int, int]:
    sizes = [ctypes.c_long(size) for size in (m, n, k)]
    return table.block_m(*sizes, multiprocessors), table.block_n(*sizes, multiprocessors)


def test_sizes_take_their_tiles(table: ctypes.CDLL) -> None:
    taken = [tile(table, m, n, k, MULTIPROCESSORS) for m, n, k in SIZES]
    assert taken == [*TILES, TILES[0], TILES[3]]


def test_table(table: ctypes.CDLL) -> None:
    """ViT-B/16 at 224 px on 132 multiprocessors: small tiles for one image, large ones for many; splits likewise."""
    assert tile(table, 197, 768, 768, 132) == (64, 64)
    assert tile(table, 197 * 256, 2304, 768, 132) == (128, 192)
    assert tile(table, 197 * 256, 768, 3072, 132) == (128, 256)
    few, many = ((ctypes.c_long(m), ctypes.c_long(768), ctypes.c_long(768), 132) for m in (64, 197 * 256))
    assert table.splits(*few) == 1 and table.splits(*many) > 4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", HALF)
def test_epilogue(dtype: torch.dtype, case: str) -> None:
    m, n, k = SIZES[3]
    x, weight = strided(m, k, dtype), torch.randn(n, k).to(dtype)
    check_forward(x, weight, extras(case, m, n, dtype), save_preact=case != "plain")


@pytest.mark.parametrize(("size", "case"), [*[(s, "all") for s in range(6)], (0, "gamma"), (1, "gamma"), (2, "gamma")])
def test_tiles(size: int, case: str) -> None:
    """A residual in float32 with everything else, and one in 16 bits."""
    (m, n, k), dtype = SIZES[size], HALF[size % 2]
    x, weight = strided(m, k, dtype), torch.randn(n, k).to(dtype)
    check_forward(x, weight, extras(case, m, n, dtype), save_preact=case == "all")


@pytest.mark.parametrize("k", [8, 64, 512, 528, 1096])
def test_steps(k: int) -> None:
    """Fewer steps than stages, as many, and more, so that the ring of stages goes round."""
    x, weight = torch.randn(13, k).half(), torch.randn(16, k).half()
    check_forward(x, weight, {}, save_preact=False)


def test_groups_of_row_tiles() -> None:
    """More row tiles than share a group, and a last group that is not full: every tile is computed once."""
    x, weight = torch.randn(90 * 13, 16).half(), torch.randn(72, 16).half()
    check_forward(x, weight, {}, save_preact=False)


@pytest.mark.parametrize("wide", [False, True])
def test_what_no_vector_can_read(wide: bool) -> None:
    """Vectors that begin anywhere; a residual whose rows TMA can't address."""
    dtype = torch.float32 if wide else torch.bfloat16
    m, n, k = SIZES[3]
    x, weight = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    bias, gamma, residual = (
        torch.randn(n + 1).to(dtype)[1:],
        torch.randn(n + 1).to(dtype)[1:],
        strided(m, n, dtype, gap=1),
    )
    out = torch.empty(m, n, dtype=dtype)
    torch.ops.fastvit_emulated.linear_forward(x, x, weight, bias, "", residual, gamma, None, out, None)

    def expected(to: torch.dtype) -> Tensor:
        return residual.to(to) + gamma.to(to) * (x.to(to) @ weight.to(to).T + bias.to(to))

    assert_as_right_as_eager(out, expected(torch.bfloat16), expected(torch.float64))


@pytest.mark.parametrize(
    ("size", "activation"),
    [*[(3, a) for a in (None, *ACTIVATIONS)], (0, "gelu"), (1, "gelu"), (2, "gelu"), (5, None)],
)
@pytest.mark.parametrize("dtype", HALF)
def test_input_gradient(dtype: torch.dtype, size: int, activation: str | None) -> None:
    """The gradient to p of act(p) W^T, and act(p) beside it; W as it lies, summed over its rows."""
    m, k, n = SIZES[size]
    leaves = {"p": torch.randn(m, k).to(dtype), "weight": torch.randn(n, k).to(dtype)}
    dout = strided(m, n, dtype)

    def expected(to: torch.dtype | None) -> list[Tensor]:
        args = cast(leaves, to)
        hidden = reference.activate(args["p"], activation)
        (dp,) = torch.autograd.grad(hidden, args["p"], dout.to(hidden.dtype) @ args["weight"])
        return [dp, hidden] if activation else [dp]

    preact = leaves["p"] if activation else None
    dp, hidden = linear_input_gradient(dout, leaves["weight"], preact=preact, activation=activation)
    ours = [dp] if hidden is None else [dp, hidden]
    assert_as_right_as_eager(ours, expected(None), expected(torch.float64), ["dp", "hidden"])


def test_input_gradient_in_float32() -> None:
    dout, weight = torch.randn(17, 24).bfloat16(), torch.randn(24, 40).bfloat16()
    dx, _ = linear_input_gradient(dout, weight, out_dtype=torch.float32)
    assert dx.dtype == torch.float32
    assert_as_right_as_eager(dx, dout.float() @ weight.float(), dout.double() @ weight.double())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 24, 40), (67, 136, 264), (333, 392, 200)])
def test_weight_gradient(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """One row, parts of a tile and of a step, more than one tile each way; without a bias no sums; the same bits."""
    dout, x = strided(m, n, dtype), strided(m, k, dtype)
    dweight, dbias, _ = linear_weight_gradient(dout, x)
    eager, exact = ((dout.to(d).T @ x.to(d), dout.to(d).sum(0, dtype=d)) for d in (dtype, torch.float64))
    assert_as_right_as_eager([dweight, dbias], eager, exact, ["dweight", "dbias"])
    again, none, _ = linear_weight_gradient(dout, x, need_bias=False)
    assert none is None and torch.equal(again, dweight)


@pytest.mark.parametrize("splits", [1, 2, 3, 9])
def test_splits(splits: int) -> None:
    """Any number of splits, of unequal lengths, and more than there are steps: theirs are zeros."""
    dout, x = torch.randn(450, 24).half(), torch.randn(450, 136).half()
    partials, sums = torch.empty(splits, 24, 136), torch.empty(splits, 24)
    torch.ops.fastvit_emulated.linear_weight_gradient(x, dout, x, partials, sums)
    eager, exact = ((dout.to(d).T @ x.to(d), dout.to(d).sum(0, dtype=d)) for d in (torch.float32, torch.float64))
    assert_as_right_as_eager([partials.sum(0), sums.sum(0)], eager, exact, ["partials", "sums"])
    assert splits < 9 or not partials[0].any()


def test_refusals() -> None:
    x, weight, out = torch.randn(6, 16).half(), torch.randn(32, 16).half(), torch.empty(6, 32).half()
    forward = torch.ops.fastvit_emulated.linear_forward
    with pytest.raises(RuntimeError, match="x; accepted: rows on 16-byte boundaries"):
        forward(x, strided(6, 16, torch.float16, gap=1), weight, None, "", None, None, None, out, None)
    with pytest.raises(RuntimeError, match="x is bfloat16; accepted: float16 or bfloat16, both operands the same"):
        forward(x, x.bfloat16(), weight, None, "", None, None, None, out, None)
    with pytest.raises(RuntimeError, match="out is float16; accepted: float32"):
        forward(x, x, weight, None, "", torch.randn(6, 32), None, None, out, None)
    with pytest.raises(RuntimeError, match='unknown activation "celu"'):
        forward(x, x, weight, None, "celu", None, None, None, out, None)
    with pytest.raises(RuntimeError, match="row_scale has 4 entries"):
        forward(x, x, weight, None, "", None, None, torch.rand(4), out, None)
    dx = torch.empty(6, 16).half()
    with pytest.raises(RuntimeError, match="an activation, preact and hidden go together"):
        torch.ops.fastvit_emulated.linear_input_gradient(x, out, weight, None, None, "gelu", dx, None)
