"""What is measured, one cell at a time, and where it is kept: a JSON file that grows cell by cell."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastvit import env

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"  # what is committed, a folder for every device
MEASURED = ("fastvit", "kernels", "csrc", "benchmarks")  # the code whose change makes a result another's
Row = dict[str, Any]


class Unavailable(RuntimeError):
    """A contender can't take part here, for a reason that is no defect; the message is the reason."""


class CellFailed(RuntimeError):
    """A cell has no result; the message says why."""


@dataclass(frozen=True)
class Cell:
    """One measurement: who does what.

    Args:
        contender: who.
        what: (name, value) pairs, the same for every cell that it is compared with: model, size, dtype, ...
    """

    contender: str
    what: tuple[tuple[str, Any], ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.what)[name]

    def __str__(self) -> str:
        return " ".join([*(str(value) for _, value in self.what), self.contender])

    def row(self) -> Row:
        """The fields by which a row of the file is this cell's."""
        return {**dict(self.what), "contender": self.contender}


def commit() -> str | None:
    """The commit that is measured, with ``-dirty`` where its code differs from it; None outside a clone."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", *MEASURED, ":!benchmarks/results")
    except FileNotFoundError:
        return None
    return head + "-dirty" * bool(changed) if head else None


def identity(device: Row) -> str:
    """What results of one device are told from another's by: its name, and a CPU's instructions, which names hide."""
    return " ".join(filter(None, (device["name"], device.get("instructions"))))


def slug(device: str) -> str:
    """A device's name as a folder's: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def code() -> str:
    """A digest of the code that is measured: what draws and describes results is left out of it."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((ROOT / folder).rglob("*")):
            inside = path.relative_to(ROOT)
            if path.suffix in (".py", ".json", ".cu", ".cuh", ".h", ".cpp") and not {"results", "report"} & {
                *inside.parts
            }:
                digest.update(f"{inside}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """``FOLDER/NAME.json``: the cells measured so far, on one device.

    The file is replaced as a whole after every cell, so it is never half written. A cell counts as finished when
    it was measured by this very code and these versions; another's is measured again and replaced.

    Raises:
        ValueError: the file is of another device, or no such file at all.
    """

    def __init__(self, folder: Path, name: str, device: str, command: str) -> None:
        self.path = folder / f"{name}.json"
        found = env.device(device)
        self.run: Row = {
            "command": command,
            "commit": commit(),
            "code": code(),
            "versions": env.versions(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": found,
            "tiles": env.tiles(),
        }
        self.content: dict[str, Any] = {"suite": name, "device": identity(found), "runs": [], "cells": []}
        if self.path.exists():
            self.content = load(self.path)
            if self.content["device"] != identity(found):
                raise ValueError(
                    f"{self.path} holds results of {self.content['device']}, and this is {identity(found)}; "
                    "give another folder with --out"
                )
        self.number = len(self.content["runs"])
        self.device = device

    def finished(self, cell: Cell, retry: bool = False) -> bool:
        """Whether the cell's row is there, measured by this code; with ``retry`` a row without a result is not."""
        row = self.row(cell)
        if row is None or (retry and row["status"] != "ok"):
            return False
        return all(self.content["runs"][row["run"]][key] == self.run[key] for key in ("code", "versions"))

    def row(self, cell: Cell) -> Row | None:
        """The cell's row, if it has one."""
        wanted = cell.row()
        rows: list[Row] = self.content["cells"]
        return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)

    def add(self, cell: Cell, row: Row) -> None:
        """Keep ``row`` as the cell's, on disk."""
        cells, runs = self.content["cells"], self.content["runs"]
        if len(runs) == self.number:
            runs.append(self.run)
        if self.device == "cuda":
            self.run["device_after"] = env.device(self.device)  # clocks and power while it is warm
        old = self.row(cell)
        new = {**cell.row(), **row, "run": self.number}
        if old is None:
            cells.append(new)
        else:
            cells[cells.index(old)] = new
        temporary = self.path.with_suffix(".json.part")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(temporary, self.path)

    def export(self) -> Path:
        """Write the cells beside the JSON as CSV, one line each, and return its path."""
        path = self.path.with_suffix(".csv")
        with path.open("w", newline="") as file:
            columns = list(dict.fromkeys(key for row in self.content["cells"] for key in row))
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.content["cells"])
        return path


def load(path: Path) -> dict[str, Any]:
    """A result file's content.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no result file: {error}") from error
    if not isinstance(content, Mapping) or not {"suite", "device", "runs", "cells"} <= content.keys():
        raise ValueError(f"{path} is no result file: it has no suite, device, runs and cells")
    return dict(content)
