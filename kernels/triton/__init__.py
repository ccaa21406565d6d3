"""Triton kernels, one file per family; see docs/kernels.md. Installed as ``fastvit.triton``."""
