"""Tile choices, apart from the kernels: ``tables/<family>.json``, one list of rows per architecture and dtype."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def _table(family: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    return json.loads((Path(__file__).parent / "tables" / f"{family}.json").read_text())["tiles"]


def rows(family: str, arch: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The rows of ``family`` for ``arch`` (or the nearest older one) and for "half" or "float32"."""
    table = _table(family)
    known = sorted(int(name.removeprefix("sm")) for name in table)
    nearest = max((a for a in known if a <= arch), default=known[0])
    return table[f"sm{nearest}"]["float32" if dtype == torch.float32 else "half"]
