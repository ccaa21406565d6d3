"""Benchmarks: fastvit beside the networks that people use. See ``python -m benchmarks --help``."""

import os

# PyTorch's profiler, which counts memory on the CPU, otherwise reports as an error that there is no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
