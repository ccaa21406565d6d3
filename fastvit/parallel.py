"""Across devices, on PyTorch's own DTensor. Importing this teaches DTensor to shard the kernel ops."""

from fastvit.ops import sharding

__all__ = ["sharding"]
