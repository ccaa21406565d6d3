"""The detector of races and of accesses out of bounds: finds seeded bugs, and is silent about right programs."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def cases(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    loaded.host_product.restype = loaded.host_order.restype = ctypes.c_char_p
    return loaded


RIGHT, TAIL, OVERWRITTEN, NOT_SHOWN, WAIT, SWIZZLE, ALL_BLOCKS = range(7)


def product(cases: ctypes.CDLL, bug: int) -> tuple[str, Tensor, Tensor]:
    """What is said of a (33, 72) x (40, 72)^T product with that bug, the result, and what it should be."""
    torch.manual_seed(0)
    a, b, c = torch.randn(33, 72).half(), torch.randn(40, 72).half(), torch.full((33, 40), torch.nan)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (c, a, b)]
    return cases.host_product(*pointers, 33, 40, 72, bug).decode(), c, a.float() @ b.float().T


def test_a_right_product_is_clean(cases: ctypes.CDLL) -> None:
    said, c, exact = product(cases, RIGHT)
    assert said == ""
    torch.testing.assert_close(c, exact)


@pytest.mark.parametrize(
    ("bug", "said"),
    [
        (TAIL, r"out of bounds: write at cases\.cu:\d+.* of 4 bytes at offset 5280 of an array of 5280 bytes"),
        (OVERWRITTEN, r"race: .*(cp\.async|ldmatrix) at cases\.cu:\d+.* and (ldmatrix|cp\.async) at .* shared memory"),
        (
            NOT_SHOWN,
            r"race.*: (cp\.async|ldmatrix) at .* and (ldmatrix|cp\.async) at .* by thread \d+, on shared memory",
        ),
        (WAIT, r"race with an instruction in flight: ldmatrix at .* and cp\.async"),
        (ALL_BLOCKS, r"race: write at .* and write at .* of block \(0, 0, 0\), on an array of 5280 bytes"),
    ],
)
def test_a_seeded_bug_is_found(cases: ctypes.CDLL, bug: int, said: str) -> None:
    text = product(cases, bug)[0]
    assert re.search(said, text), text
    assert re.search(r"\(thread \d+\), block \(\d, \d, 0\), kernel .*product_kernel", text), text


def test_a_wrong_swizzle_is_seen_in_the_numbers_or_as_a_race(cases: ctypes.CDLL) -> None:
    said, c, exact = product(cases, SWIZZLE)
    assert "race" in said or not torch.allclose(c, exact, atol=1e-3)


SYNCWARP, SHUFFLE, HALF_MASK, OTHER_WARP, NAMED, ARRIVE, READS, BYTES = range(8)


@pytest.mark.parametrize(
    ("what", "clean"),
    [
        (SYNCWARP, True),
        (SHUFFLE, False),  # it is no barrier for memory
        (HALF_MASK, False),  # the other half is not among those who met
        (OTHER_WARP, False),
        (NAMED, True),
        (ARRIVE, True),
        (READS, True),
        (BYTES, True),  # neighbours in one word are no race
    ],
)
def test_what_orders_memory(cases: ctypes.CDLL, what: int, clean: bool) -> None:
    out = torch.full((64,), torch.nan)
    said = cases.host_order(ctypes.c_void_p(out.data_ptr()), what).decode()
    assert (said == "") == clean, said
    if clean:
        assert not out.isnan().any()
    else:
        assert "race: " in said and "shared memory, bytes" in said


def test_a_view_is_in_bounds_where_its_elements_are(cases: ctypes.CDLL) -> None:
    """Operators check too: what library.cpp registers are the arrays, to their last elements."""
    from fastvit.cuda.layer_norm import layer_norm_forward

    wide = torch.randn(5, 40)
    out = layer_norm_forward(wide[:, :32], torch.ones(32), torch.zeros(32), 1e-6)
    torch.testing.assert_close(out[0], torch.nn.functional.layer_norm(wide[:, :32], (32,), eps=1e-6))
