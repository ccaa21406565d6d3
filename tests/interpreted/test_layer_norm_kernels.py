"""LayerNorm's kernels and the sums of partial results in the interpreter."""

from __future__ import annotations

from fastvit.triton.layer_norm import layer_norm_backward, layer_norm_forward
from fastvit.triton.reduce import sum_groups, sum_partials
from layer_norm_cases import LayerNormCases, SumCases


class TestLayerNorm(LayerNormCases):
    forward = staticmethod(layer_norm_forward)
    backward = staticmethod(layer_norm_backward)


class TestSums(SumCases):
    sum_partials = staticmethod(sum_partials)
    sum_groups = staticmethod(sum_groups)
