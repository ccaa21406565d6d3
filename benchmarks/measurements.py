"""A measurement, and the JSON file of a device and suite that stores them one by one."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastvit import env

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"  # committed, a folder for each device
MEASURED = ("fastvit", "kernels", "csrc", "benchmarks")  # the code whose change makes a result another's
Row = dict[str, Any]


class Unavailable(RuntimeError):
    """A contender can't run here, for a reason that is no defect; the message is the reason."""


class MeasurementFailed(RuntimeError):
    """A measurement gave no result; the message says why."""


@dataclass(frozen=True)
class Measurement:
    """A contender in a setting.

    Args:
        contender: its name.
        setting: (name, value) pairs of model, size, dtype, ...: the same for all measurements that are compared.
    """

    contender: str
    setting: tuple[tuple[str, Any], ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.setting)[name]

    def __str__(self) -> str:
        return " ".join([*(str(value) for _, value in self.setting), self.contender])

    def row(self) -> Row:
        """Return the fields that identify the measurement's row in the file."""
        return {**dict(self.setting), "contender": self.contender}


def grid(**values: Sequence[Any]) -> list[tuple[tuple[str, Any], ...]]:
    """Return the settings of every combination of values; the last name varies fastest."""
    return [tuple(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def commit() -> str | None:
    """Return the checked-out commit, with ``-dirty`` where the code differs from it; None outside a clone."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", *MEASURED, ":!benchmarks/results")
    except FileNotFoundError:
        return None
    return head + "-dirty" * bool(changed) if head else None


def identity(device: Row) -> str:
    """Return what identifies a device in results: its name, and a CPU's instructions, which names hide."""
    return " ".join(filter(None, (device["name"], device.get("instructions"))))


def slug(device: str) -> str:
    """Return a device's name as a folder name: "NVIDIA H200" gives nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def code() -> str:
    """Return a digest of the code that the benchmarks measure, without the code that draws results."""
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
    """``FOLDER/NAME.json``: the finished measurements of a suite on one device.

    The file is replaced as a whole after every measurement, so it is never half written. A measurement is finished if
    this code and these versions took it; another's is taken again and replaced.

    Raises:
        ValueError: the file holds another device's results, or is no result file.
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
        self.content: dict[str, Any] = {"suite": name, "device": identity(found), "runs": [], "measurements": []}
        if self.path.exists():
            self.content = load(self.path)
            if self.content["device"] != identity(found):
                raise ValueError(
                    f"{self.path} holds results of {self.content['device']}, and this is {identity(found)}; "
                    "give another folder with --out"
                )
        self.number = len(self.content["runs"])
        self.device = device

    def finished(self, measurement: Measurement, retry: bool = False) -> bool:
        """Return whether this code took the measurement; with ``retry``, a row without a result does not count."""
        row = self.row(measurement)
        if row is None or (retry and row["status"] != "ok"):
            return False
        return all(self.content["runs"][row["run"]][key] == self.run[key] for key in ("code", "versions"))

    def row(self, measurement: Measurement) -> Row | None:
        """Return the measurement's row, or None."""
        fields = measurement.row()
        rows: list[Row] = self.content["measurements"]
        return next((row for row in rows if all(row.get(key) == value for key, value in fields.items())), None)

    def add(self, measurement: Measurement, row: Row) -> None:
        """Write ``row`` as the measurement's to the file."""
        measurements, runs = self.content["measurements"], self.content["runs"]
        if len(runs) == self.number:
            runs.append(self.run)
        if self.device == "cuda":
            self.run["device_after"] = env.device(self.device)  # clocks and power while it is warm
        new, old = {**measurement.row(), **row, "run": self.number}, self.row(measurement)
        place = len(measurements) if old is None else measurements.index(old)
        measurements[place : place + 1] = [new]
        temporary = self.path.with_suffix(".json.part")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(temporary, self.path)

    def export(self) -> Path:
        """Write the measurements beside the JSON as CSV, one line each, and return its path."""
        path = self.path.with_suffix(".csv")
        with path.open("w", newline="") as file:
            columns = list(dict.fromkeys(key for row in self.content["measurements"] for key in row))
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.content["measurements"])
        return path


def load(path: Path) -> dict[str, Any]:
    """Return a result file's content.

    Raises:
        ValueError: it is no result file.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no result file: {error}") from error
    if not isinstance(content, Mapping) or not {"suite", "device", "runs", "measurements"} <= content.keys():
        raise ValueError(f"{path} is no result file: it has no suite, device, runs and measurements")
    return dict(content)
