"""BEiT's block against timm's: outputs, input gradients and every parameter's, the table's above all."""

from __future__ import annotations

import copy

import pytest
import torch

import fastvit
from beit_cases import HEADS, OPTIONS, WIDTH, pair, run
from numerics import assert_as_right_as_eager


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_block_is_timms(name: str, shared: bool) -> None:
    ours, theirs = pair(torch.float64, **OPTIONS[name])
    x = torch.randn(3, 13, WIDTH, dtype=torch.float64)
    rest = (torch.randn(HEADS, 13, 13, dtype=torch.float64),) if shared else ()
    got, want = run(ours, x, *rest), run(theirs, x, *rest)
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_float32_is_as_right_as_timms(backend: str) -> None:
    ours, theirs = pair(torch.float32, **OPTIONS["BEiT"])
    x = torch.randn(3, 13, WIDTH)
    exact = run(copy.deepcopy(theirs).double(), x.double())
    with fastvit.backend(backend):
        got = run(ours, x)
        with torch.no_grad():  # oneDNN's linears under auto
            torch.testing.assert_close(ours(x), got["out"], rtol=1e-5, atol=1e-5)
    want = run(theirs, x)
    assert_as_right_as_eager(*[list(run.values()) for run in (got, want, exact)], names=list(got))


@pytest.mark.parametrize("watch", ["attn", "attn.qkv", "attn.attn_drop", "mlp", "attn.proj"])
def test_hooks_change_nothing(watch: str) -> None:
    ours, _ = pair(torch.float64, **OPTIONS["BEiT"])
    x, seen = torch.randn(2, 13, WIDTH, dtype=torch.float64), []
    want = run(ours, x)
    ours.zero_grad()
    ours.get_submodule(watch).register_forward_hook(lambda *_: seen.append(1))
    got = run(ours, x)
    assert seen
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-11)


def test_wrong_number_of_tokens() -> None:
    ours, _ = pair(torch.float32, **OPTIONS["BEiT"])
    with pytest.raises(ValueError, match=r"a rel_pos_table of 38 rows for a window of 3x4 takes 13 of both"):
        ours(torch.randn(1, 17, WIDTH))
