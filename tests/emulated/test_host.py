"""The host layer (tests/emulator) against cases worked out by hand: what it says of right and of wrong programs.

The kernels are in tests/emulator/cases.cu; each case returns the error's text, empty where there is none.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def cases(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    for name in ("mma", "ldmatrix", "shuffle", "copy", "barrier", "exp2"):
        getattr(loaded, f"host_{name}").restype = ctypes.c_char_p
    return loaded


def pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [8, 16])
def test_mma(cases: ctypes.CDLL, dtype: torch.dtype, k: int) -> None:
    a, b = torch.randint(-8, 9, (16, k)).to(dtype), torch.randint(-8, 9, (8, k)).to(dtype)
    d = torch.randint(-99, 99, (16, 8)).float()
    exact = d + a.float() @ b.float().T  # integers: every order of summing gives these
    assert cases.host_mma(pointer(d), pointer(a), pointer(b), k, dtype == torch.float16) == b""
    assert torch.equal(d, exact)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [2, 4])
def test_ldmatrix(cases: ctypes.CDLL, n: int, transposed: bool) -> None:
    matrices = torch.arange(n * 64, dtype=torch.int16).view(n, 8, 8)  # numbered elements
    r = torch.full((32, 4), -1, dtype=torch.int32)
    assert cases.host_ldmatrix(pointer(r), pointer(matrices), n, transposed, 0) == b""
    for lane in range(32):
        for i in range(n):
            m = matrices[i].T if transposed else matrices[i]
            low, high = m[lane // 4, lane % 4 * 2].item(), m[lane // 4, lane % 4 * 2 + 1].item()
            assert r[lane, i].item() == low | high << 16
    assert (r[:, n:] == -1).all()


def test_ldmatrix_alignment(cases: ctypes.CDLL) -> None:
    r, matrices = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(256, dtype=torch.int16)
    said = cases.host_ldmatrix(pointer(r), pointer(matrices), 4, False, 1).decode()
    assert "ldmatrix: a row's address is no multiple of 16 (thread " in said
    assert "), block (0, 0, 0), kernel" in said and "ldmatrix_kernel" in said


FROM, XOR, DOWN = range(3)
ALL = 0xFFFFFFFF


@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(cases: ctypes.CDLL, width: int) -> None:
    lanes = list(range(32))
    expected = {
        (FROM, 3): [i - i % width + 3 for i in lanes],
        (XOR, 4): [i ^ 4 for i in lanes],
        (XOR, 16): [i ^ 16 if i ^ 16 < i - i % width + width else i for i in lanes],  # never from a later segment
        (DOWN, 2): [i + 2 if i % width + 2 < width else i for i in lanes],
    }
    for (how, by), values in expected.items():
        out = torch.full((32,), -1.0)
        assert cases.host_shuffle(pointer(out), how, by, width, ctypes.c_uint(ALL)) == b""
        assert out.tolist() == values


def test_a_shuffle_of_some_lanes(cases: ctypes.CDLL) -> None:
    out = torch.full((32,), -1.0)
    assert cases.host_shuffle(pointer(out), XOR, 1, 32, ctypes.c_uint(0x0000FF00)) == b""
    assert out.tolist() == [i ^ 1 if 8 <= i < 16 else -1 for i in range(32)]
    said = cases.host_shuffle(pointer(out), XOR, 16, 32, ctypes.c_uint(0x0000FF00)).decode()
    assert "shuffle: reads a lane that the mask does not name" in said


def test_copies_land_as_late_as_they_may(cases: ctypes.CDLL) -> None:
    data, seen = torch.arange(1.0, 9.0), torch.zeros(3, 8)
    assert cases.host_copy(pointer(seen), pointer(data)) == b""
    assert seen[0].isnan().all()  # nothing has landed
    assert seen[1, :4].tolist() == [1, 2, 3, 4]
    assert seen[1, 4:].isnan().all()  # the second group is under way
    assert seen[2].tolist() == [1, 2, 3, 4, 0, 0, 0, 0]  # outside: zeros


FINE, MISSED, RETURNED, MIXED, MASK, EXCEPTION, SHARED, MISALIGNED, PAST = range(9)


def test_barrier(cases: ctypes.CDLL) -> None:
    order = torch.full((64,), -1, dtype=torch.int32)
    assert cases.host_barrier(pointer(order), FINE, 64) == b""
    assert order.tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (MISSED, "deadlock: threads 32-63 returned; threads 0-31 wait for __syncthreads, block (0, 0, 0), kernel"),
        (RETURNED, "deadlock: thread 5 returned; threads 0-4, 6-63 wait for __syncthreads"),
        (MIXED, "shuffle of 32 threads, while others are at __syncwarp of 32 (thread "),
        (MASK, "__syncwarp: the mask does not name the lane that calls it (thread"),
        (EXCEPTION, "said by a thread"),
        (SHARED, "bytes at offset 256 of 256 bytes of shared memory (thread 63)"),
        (MISALIGNED, "4 past a multiple of 16 at cases.cu:"),
        (PAST, "out of bounds: index -1 of 'int [4]' at cases.cu:"),
    ],
)
def test_what_never_ends_on_a_gpu_ends_in_words_here(cases: ctypes.CDLL, what: int, said: str) -> None:
    assert said in cases.host_barrier(pointer(torch.zeros(64, dtype=torch.int32)), what, 64).decode()


def test_launches_that_cuda_refuses(cases: ctypes.CDLL) -> None:
    assert b"launch: 48 threads in a block" in cases.host_barrier(pointer(torch.zeros(64)), FINE, 48)


def test_exp2_flushes(cases: ctypes.CDLL) -> None:
    x = torch.tensor([0.0, 3.0, -1.0, -126.0, -127.0, -1000.0, 128.0, float("-inf"), 1e-40])
    assert cases.host_exp2(pointer(x), len(x)) == b""
    assert x.tolist() == [1, 8, 0.5, 2.0**-126, 0, 0, float("inf"), 0, 1]
