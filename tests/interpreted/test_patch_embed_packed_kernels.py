"""Packed patch embedding's Triton kernels in the interpreter: the cases of every backend, and those of their tiles."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastvit.triton.launch import record
from fastvit.triton.patch_embed import patch_embed_forward, patch_embed_weight_gradient
from numerics import DTYPES
from packed_patch_cases import PackedPatchCases, make

SMALL = {"block_m": 16, "block_n": 16, "block_k": 32, "warps": 4, "stages": 2}  # several tiles in every direction
SPLIT = {**SMALL, "block_m": 64, "block_n": 64, "block_k": 16}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class TestPackedPatchEmbedding(PackedPatchCases):
    forward = staticmethod(partial(patch_embed_forward, tile=SMALL))
    weight_gradient = staticmethod(partial(patch_embed_weight_gradient, tile=SMALL))

    def test_tiles_of_the_table(self) -> None:
        """Larger than these problems."""
        sizes = ((28, 42), (14, 14))
        self.check(*make(dtype=torch.bfloat16, kind="uint8", patch=(14, 14), sizes=sizes), tile=None)

    def test_weight_gradient_in_splits(self) -> None:
        """Enough patches that several programs share them, in uneven shares."""
        tile = {**SMALL, "block_m": 64, "block_n": 64, "block_k": 16}
        packed, args = make(dtype=torch.float32, patch=(2, 2), channels=1, sizes=((18, 30), (2, 2), (40, 40)))
        dout = torch.randn(len(packed.layout.image), 24)
        with record(80) as launches:
            self.weight_gradient(dout, packed.pixels, (24, 1, 2, 2), layout=packed.layout, tile=tile)
        assert launches[0].grid == (1, 4)
        self.check(packed, args, tile=tile)
