"""The head dims of attention that tests go through: each kind of code by default, every one with ``-m ""``.

Compiling a dim for g++ and for nvcc takes longer than its tests, so what no test asks for is not compiled either.
"""

from __future__ import annotations

import pytest

QUICK = (32, 40, 64, 72, 80, 128)  # of 8s an even and an odd number, in each of the kernels' tilings
HEAD_DIMS = [pytest.param(dim, marks=() if dim in QUICK else pytest.mark.slow) for dim in range(32, 129, 8)]
