"""Tile choices, apart from the kernels: derived for every architecture, measured for some GPUs.

``tables/<family>.json`` holds derived rows, one list per architecture and dtype. A table measured on one GPU
(``fastvit tune`` writes it) holds rows for exact problems and goes before them: first the user's own, in
:func:`cache_folder`, then the one shipped in ``tables/measured/``, both named after the GPU. The launchers of products,
of attention without options and of patch embedding call :func:`choose`.

The family "cuda" has no tiles and nothing derived: its rows name the implementation of a linear layer's product on the
CUDA backend (``fastvit/cuda/linear.py``). Its tile is {"run": one of :data:`RUNS`}, of which the first is the default.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fastvit.triton.launch import device_name

Row = dict[str, Any]

FORMAT = 1  # of measured tables; raised when a kernel changes the meaning of a row
SHIPPED = Path(__file__).parent / "tables" / "measured"
NEAR = 1.0  # octaves between the rows of a measured problem and of a launch that takes its tile

# The fields of a family's problems besides dtype and number of rows, and those of its tiles.
KEYS = {
    "linear": ("op", "allows", "activation", "scaled", "residual", "n", "k"),
    "attention": ("kernel", "heads", "head_dim", "owned", "length"),
    "patch_embed": ("kernel", "pixels", "dim", "channels", "patch_height", "patch_width"),
    "cuda": ("op", "activation", "scaled", "residual", "saves", "n", "k"),
}
TILES = {
    "linear": ("form", "block_m", "block_n", "block_k", "parts", "warps", "stages"),
    "attention": ("rows", "block", "piece", "head_piece", "warps", "stages"),
    "patch_embed": ("block_m", "block_n", "block_k", "warps", "stages"),
    "cuda": ("run",),
}
RUNS = {  # by op
    "forward": ("kernel", "library"),
    "input": ("kernel", "library"),
    "weight": ("kernel", "library"),
    "normed": ("kernel", "folded"),  # LayerNorm's kernel and then whatever "forward" says, or both in one product
}

_log = logging.getLogger("fastvit")


@dataclass(frozen=True)
class Problem:
    """The key of a tile: two launches with equal problems run equal work."""

    family: str
    dtype: str  # "half" or "float32"
    size: int  # grows with the batch: rows of a product, images of an attention
    key: tuple[str | int | None, ...]  # values of KEYS[family]

    @property
    def fields(self) -> Row:
        """Return the key by name."""
        return dict(zip(KEYS[self.family], self.key, strict=True))

    def __str__(self) -> str:
        named = [f"{name}={value}" for name, value in self.fields.items() if isinstance(value, int)]
        words = [value for value in self.key if isinstance(value, str)]
        return " ".join([self.family, *words, f"size={self.size}", *named, self.dtype])


class TableError(ValueError):
    """A measured table can't be used; the message says why."""


@cache
def _table(family: str) -> dict[str, dict[str, list[Row]]]:
    return json.loads((Path(__file__).parent / "tables" / f"{family}.json").read_text())["tiles"]


def kind(dtype: torch.dtype) -> str:
    """Return the tables' name of a dtype."""
    return "float32" if dtype == torch.float32 else "half"


def rows(family: str, arch: int, dtype: torch.dtype) -> list[Row]:
    """Return the derived rows of ``family`` for ``arch`` (or the nearest older one) and for "half" or "float32"."""
    table = _table(family)
    known = sorted(int(name.removeprefix("sm")) for name in table)
    nearest = max((a for a in known if a <= arch), default=known[0])
    return table[f"sm{nearest}"][kind(dtype)]


def slug(gpu: str) -> str:
    """Return the file name, without suffix, of a GPU's tables: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def cache_folder() -> Path:
    """Return the folder of the user's tables: tiles/ in FASTVIT_CACHE, by default fastvit/ in XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("FASTVIT_CACHE") or os.path.join(base, "fastvit")) / "tiles"


def triton_release() -> str:
    """Return major and minor version of the installed Triton: tiles that fit under one may spill under another."""
    return ".".join(triton.__version__.split(".")[:2])


def read(path: Path, gpu: str) -> dict[Problem, Row] | None:
    """Return the rows of a measured table, checked; None where there is no such file.

    Raises:
        TableError: it is unreadable, of another format, GPU or Triton, or has an invalid row.
    """
    try:
        table = json.loads(path.read_text())
        if table["format"] != FORMAT:
            raise TableError(f"it has format {table['format']}, this version reads {FORMAT}")
        if slug(table["gpu"]) != slug(gpu):
            raise TableError(f"it was measured on {table['gpu']!r}, not on {gpu!r}")
        measured_with = ".".join(table["versions"]["triton"].split(".")[:2])
        if measured_with != triton_release():
            raise TableError(f"it was measured with Triton {measured_with}, and this is {triton_release()}")
        found = {}
        for family, dtypes in table["rows"].items():
            for dtype, family_rows in dtypes.items():
                for row in family_rows:
                    problem = Problem(family, dtype, row["size"], tuple(row["key"][name] for name in KEYS[family]))
                    if problem.size < 1 or dtype not in ("half", "float32"):
                        raise TableError(f"size {problem.size}, dtype {dtype}")
                    tile = {name: row["tile"][name] for name in TILES[family] if name != "form"}
                    if family == "cuda":
                        right = tile["run"] in RUNS[row["key"]["op"]]
                    else:
                        right = all(isinstance(number, int) and number >= 0 for number in tile.values())
                    if not right:
                        raise TableError(f"the tile {row['tile']} is none")
                    found[problem] = row
    except FileNotFoundError:
        return None
    except TableError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TableError(f"{type(error).__name__}: {error}") from error
    return found


@cache
def _load(path: Path, gpu: str) -> dict[tuple[str, str, tuple[Any, ...]], list[tuple[int, Row]]] | str | None:
    """Return a table by family, dtype and key; None where it is absent, the (logged) reason where it is refused."""
    try:
        found = read(path, gpu)
    except TableError as error:
        message = f"{path} is not used: {error}. Derived tiles are; `fastvit tune` measures them anew"
        _log.warning(message)
        return message
    if found is None:
        return None
    index: dict[tuple[str, str, tuple[Any, ...]], list[tuple[int, Row]]] = {}
    for problem, row in found.items():
        index.setdefault((problem.family, problem.dtype, problem.key), []).append((problem.size, row["tile"]))
    return index


def _paths(gpu: str) -> tuple[Path, Path]:
    """Return the paths of a GPU's tables, present or not, the user's own first."""
    return cache_folder() / f"{slug(gpu)}.json", SHIPPED / f"{slug(gpu)}.json"


@lru_cache(maxsize=8192)
def _measured(gpu: str, problem: Problem) -> Row | None:
    for path in _paths(gpu):
        table = _load(path, gpu)
        if isinstance(table, dict):
            near = [
                (abs(math.log2(problem.size / size)), tile)
                for size, tile in table.get((problem.family, problem.dtype, problem.key), [])
            ]
            distance, tile = min(near, key=lambda one: one[0], default=(math.inf, None))
            if distance <= NEAR:
                return tile
    return None


def reload() -> None:
    """Forget the measured tables that were read: the next launch reads them again."""
    _load.cache_clear()
    _measured.cache_clear()


def sources(gpu: str) -> list[str]:
    """Return the sources of tiles on a GPU of this name, in order, and why any table is refused."""
    lines = []
    for path in _paths(gpu):
        table = _load(path, gpu)
        if isinstance(table, dict):
            cuda = sum(len(found) for (family, _, _), found in table.items() if family == "cuda")
            lines.append(f"measured, {sum(map(len, table.values())) - cuda} problems: {path}")
            if cuda:
                lines.append(f"backend cuda, kernel or cuBLASLt, measured, {cuda} problems: {path}")
        elif table is not None:
            lines.append(table)
    return [*lines, "derived from the compiler's reports, where nothing was measured; backend cuda: its own kernels"]


_recorded: dict[Problem, Row] | None = None


@contextmanager
def record_problems() -> Iterator[dict[Problem, Row]]:
    """Collect every problem that launchers look up inside, and the tile of each."""
    global _recorded
    before, _recorded = _recorded, {}
    try:
        yield _recorded
    finally:
        _recorded = before


def choose(
    family: str, tensor: Tensor, dtype: torch.dtype, size: int, derived: Callable[[], Row], **key: str | int | None
) -> Row:
    """Return the tile of a problem: one measured near it on this GPU, else ``derived()``.

    Args:
        family: "linear", "attention", "patch_embed" or "cuda".
        tensor: any on the device.
        dtype: of the product.
        size: grows with the batch. A measured row serves sizes within a factor of two.
        derived: returns a derived row.
        key: the values of ``KEYS[family]``, in its order. A measured row serves no other.
    """
    problem = Problem(family, kind(dtype), size, tuple(key.values()))
    gpu = device_name(tensor)
    tile = (_measured(gpu, problem) if gpu is not None and size > 0 else None) or derived()
    if _recorded is not None:
        _recorded.setdefault(problem, tile)
    return tile
