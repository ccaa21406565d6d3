"""Triton kernels, one file per family; see docs/explanation/kernels.md. Installed as ``fastvit.triton``."""

from __future__ import annotations

import importlib


def _import_error() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error}); fastvit is tested with Triton on Linux"
    return None


MISSING = _import_error()  # why Triton can't be imported, or None
