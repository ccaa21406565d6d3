"""Hopper's emulated instructions (tests/emulator/hopper.cpp) against cases worked out by hand, right and wrong ones.

The kernels are in tests/emulator/hopper_cases.cu; layouts are computed here a second time, from the PTX ISA's pictures:
row and chunk of a tile, not addresses.
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[2] / "build" / "emulated" / "fastvit_emulated.so"

NONE, B32, B64, B128 = range(4)  # SwizzleMode
K, MN = range(2)  # Major
ROW_BYTES = (16, 32, 64, 128)


@pytest.fixture(scope="module")
def cases() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("hopper_tma", "hopper_wgmma", "hopper_registers", "hopper_ring", "hopper_map"):
        getattr(library, name).restype = ctypes.c_char_p
    library.hopper_descriptor.restype = ctypes.c_uint64
    return library


def pointer(t: Tensor) -> ctypes.c_void_p:
    assert t.data_ptr() % 16 == 0
    return ctypes.c_void_p(t.data_ptr())


def tma(
    cases: ctypes.CDLL, data: Tensor, box: tuple[int, ...], at: tuple[int, ...], mode: int, bug: int = 0
) -> tuple[str, Tensor, Tensor]:
    """The error, the tile's 16-bit words as they lie in shared memory, and where tile + 1 was stored to.

    ``data`` is int16; box and ``at`` are innermost first.
    """
    rank = data.dim()
    stored = torch.full_like(data, -1)
    size = (ctypes.c_int64 * rank)(*reversed(data.shape))
    stride = (ctypes.c_int64 * rank)(*reversed(data.stride()))
    words = torch.zeros(torch.tensor(box).prod().item(), dtype=torch.int16)
    error = cases.hopper_tma(
        rank, mode, pointer(data), pointer(stored), ctypes.c_int64(data.numel()), size, stride,
        (ctypes.c_int * rank)(*box), (ctypes.c_int * rank)(*at), pointer(words), bug,
    )  # fmt: skip
    return error.decode(), words, stored


def unswizzled(words: Tensor, inner: int, mode: int) -> Tensor:
    """(rows, inner) of a tile: chunk c of row r lies at place c ^ (r / rows in 128 bytes % chunks in a row)."""
    rows = words.view(-1, inner)
    if mode == NONE:
        return rows
    chunks = ROW_BYTES[mode] // 16
    out = torch.empty_like(rows)
    for r, c in itertools.product(range(rows.shape[0]), range(chunks)):
        place = c ^ (r * ROW_BYTES[mode] // 128 % chunks)
        out[r, 8 * c : 8 * c + 8] = rows[r, 8 * place : 8 * place + 8]
    return out


def numbered(*shape: int) -> Tensor:
    return torch.arange(1, 1 + torch.tensor(shape).prod().item()).to(torch.int16).view(shape)


@pytest.mark.parametrize("mode", [NONE, B32, B64, B128])
def test_tma_swizzles(cases: ctypes.CDLL, mode: int) -> None:
    inner = ROW_BYTES[mode] // 2
    data = numbered(24, 2 * inner)
    error, words, stored = tma(cases, data, (inner, 16), (inner, 4), mode)
    assert error == ""
    inside = (slice(4, 20), slice(inner, None))
    assert torch.equal(unswizzled(words, inner, mode), data[inside])
    assert torch.equal(stored[inside], data[inside] + 1)
    stored[inside] = -1
    assert (stored == -1).all()


def test_the_swizzle_of_128_bytes_by_hand(cases: ctypes.CDLL) -> None:
    """Row r of the figure: chunk 0 lies at place r % 8."""
    _, words, _ = tma(cases, numbered(16, 64), (64, 16), (0, 0), B128)
    tile = words.view(16, 8, 8)
    for r in range(16):
        assert tile[r, r % 8, 0] == r * 64 + 1
        assert tile[r, (r % 8) ^ 5, 0] == r * 64 + 41  # chunk 5


@pytest.mark.parametrize("at", [(-8, -3), (40, 20), (-8, 20), (200, 0)])
def test_tma_clips_at_every_side(cases: ctypes.CDLL, at: tuple[int, int]) -> None:
    data = numbered(24, 48)
    error, words, stored = tma(cases, data, (32, 8), at, B64)
    assert error == ""
    wide = torch.zeros(24 + 64, 48 + 512, dtype=torch.int16)
    wide[32:56, 256:304] = data
    expected = wide[32 + at[1] : 40 + at[1], 256 + at[0] : 288 + at[0]]
    assert torch.equal(unswizzled(words, 32, B64), expected)
    assert torch.equal(stored != -1, (stored == data + 1))
    assert (stored != -1).sum() == (expected != 0).sum()


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_tma_of_more_dimensions(cases: ctypes.CDLL, rank: int) -> None:
    shape, box, at = (2, 3, 4, 6, 32)[5 - rank :], (16, 3, 2, 2, 1)[:rank], (8, 2, 1, 2, 1)[:rank]
    data = numbered(*shape)
    error, words, stored = tma(cases, data, box, at, NONE)
    assert error == ""
    padded = torch.nn.functional.pad(data, [0, 8] * rank)
    inside = tuple(slice(a, a + b) for a, b in zip(reversed(at), reversed(box), strict=True))
    assert torch.equal(words.view(*reversed(box)), padded[inside])
    assert torch.equal(stored[inside], data[inside] + 1)


TMA_BUGS = {
    3: "mbarrier_init_fence", 4: "deadlock", 5: "an arrival more", 6: "no multiple of",
}  # fmt: skip


@pytest.mark.parametrize("bug", [1, 2, 3, 4, 5, 6, 7])
def test_wrong_use_of_tma(cases: ctypes.CDLL, bug: int) -> None:
    data = numbered(16, 64)
    error, words, stored = tma(cases, data, (64, 16), (0, 0), B128, bug)
    if bug == 2:  # the kernel ends before its store has read the tile: it never happens
        assert error or (stored == -1).all()
    elif bug == 1:  # what the tile was filled with before: 0xff
        assert error or (words == -1).any()
    else:
        assert error, "not noticed"
    assert TMA_BUGS.get(bug, "") in error


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-8, 9, shape).to(dtype)


def wgmma(
    cases: ctypes.CDLL, a: Tensor, b: Tensor, majors: tuple[int, int] = (K, K), mode: int = B128, bug: int = 0
) -> tuple[str, Tensor]:
    """a b^T for a (64, 64), b (N, 64)."""
    d = torch.full((64, b.shape[0]), torch.nan)
    stored = [x.contiguous() if major == K else x.T.contiguous() for x, major in zip((a, b), majors, strict=True)]
    error = cases.hopper_wgmma(
        a.dtype == torch.float16, b.shape[0], *majors, mode, *map(pointer, stored), pointer(d), bug
    )  # fmt: skip
    return error.decode(), d


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("majors", [(K, K), (K, MN), (MN, K), (MN, MN)])
@pytest.mark.parametrize("mode", [NONE, B32, B64, B128])
def test_wgmma(cases: ctypes.CDLL, mode: int, majors: tuple[int, int], dtype: torch.dtype) -> None:
    """N = 136: two boxes of 64 columns and one of 8, in the widest swizzle, where they are contiguous."""
    a, b = integers(64, 64, dtype=dtype), integers(136, 64, dtype=dtype)
    error, d = wgmma(cases, a, b, majors, mode)
    assert error == ""
    assert torch.equal(d, a.float() @ b.float().T)


@pytest.mark.parametrize("n", [8, 256])
def test_wgmma_of_other_widths(cases: ctypes.CDLL, n: int) -> None:
    a, b = integers(64, 64, dtype=torch.bfloat16), integers(n, 64, dtype=torch.bfloat16)
    error, d = wgmma(cases, a, b)
    assert error == ""
    assert torch.equal(d, a.float() @ b.float().T)


@pytest.mark.parametrize(
    "bug, said",
    [(1, ""), (2, "no wgmma_fence"), (3, ""), (4, "deadlock"), (5, "accumulators were written")],
    ids=["wait", "fence", "wait for the tile", "three warps", "accumulator written"],
)
def test_wrong_use_of_wgmma(cases: ctypes.CDLL, bug: int, said: str) -> None:
    a, b = integers(64, 64, dtype=torch.bfloat16), integers(8, 64, dtype=torch.bfloat16)
    error, d = wgmma(cases, a, b, bug=bug)
    assert error if said else (error or d.isnan().all())
    assert said in error


def registers(cases: ctypes.CDLL, bug: int) -> tuple[str, Tensor, Tensor]:
    a, b = integers(64, 32, dtype=torch.float16), integers(32, 64, dtype=torch.float16)
    d = torch.full((64, 64), torch.nan)
    return cases.hopper_registers(*map(pointer, (a, b, d)), bug).decode(), d, 2 * a.float() @ b.float()


def test_wgmma_with_a_from_registers_and_a_tile_written_by_threads(cases: ctypes.CDLL) -> None:
    error, d, expected = registers(cases, 0)
    assert error == ""
    assert torch.equal(d, expected)


@pytest.mark.parametrize("bug", [1, 2], ids=["fence_async_proxy", "barrier"])
def test_a_tile_that_wgmma_does_not_see_yet(cases: ctypes.CDLL, bug: int) -> None:
    error, d, expected = registers(cases, bug)
    assert error or not torch.equal(d, expected)


def ring(cases: ctypes.CDLL, bug: int) -> tuple[str, Tensor, Tensor]:
    rows = torch.randn(7, 32)
    out = torch.full_like(rows, torch.nan)
    return cases.hopper_ring(pointer(rows), pointer(out), rows.shape[0], bug).decode(), out, 2 * rows


def test_a_ring_of_mbarriers(cases: ctypes.CDLL) -> None:
    error, out, expected = ring(cases, 0)
    assert error == ""
    assert torch.equal(out, expected)


@pytest.mark.parametrize("bug", [1, 2, 3], ids=["no wait for an empty slot", "no arrival", "wrong parity"])
def test_a_ring_that_does_not_turn(cases: ctypes.CDLL, bug: int) -> None:
    error, out, expected = ring(cases, bug)
    assert error or not torch.equal(out, expected)
    if bug > 1:
        assert "deadlock" in error and "an mbarrier" in error


def test_what_a_tensor_map_refuses(cases: ctypes.CDLL) -> None:
    def refused(stride: int, box: int, mode: int) -> str:
        return cases.hopper_map(ctypes.c_int64(stride), box, mode).decode()

    assert refused(64, 64, B128) == ""
    assert "stride" in refused(68, 64, B128)
    assert "stride" in refused(0, 64, B128)
    assert "box" in refused(64, 257, B128)
    assert "swizzle" in refused(64, 64, B64)


def test_the_bits_of_a_descriptor(cases: ctypes.CDLL) -> None:
    """Address / 16 from bit 0, leading / 16 from bit 16, stride / 16 from bit 32, the mode in the top two bits."""
    described = cases.hopper_descriptor(ctypes.c_int64(0x12340), B128, 1024, 4096)
    assert described == (1 << 62) | (64 << 32) | (256 << 16) | 0x1234
    assert cases.hopper_descriptor(ctypes.c_int64(0), B32, 256, 16) >> 62 == 3
    assert cases.hopper_descriptor(ctypes.c_int64(0), NONE, 256, 16) >> 62 == 0
