"""Result files, read back: one :class:`Device` for each folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measurements, networks
from benchmarks.measurements import Row
from benchmarks.suites import SUITES

USUAL_SIZE = 224  # pixels


@dataclass(frozen=True)
class Device:
    """The results of one device.

    Args:
        folder: the name of its folder, which is its name for files and links.
        files: the contents of its result files, by suite.
    """

    folder: str
    files: dict[str, dict[str, Any]]

    @property
    def about(self) -> Row:
        """Return name, type and settings that bear on its speed, as the newest run found them."""
        runs = [run for content in self.files.values() for run in content["runs"]]
        about: Row = max(runs, key=lambda run: run["started"])["device"]
        return about

    @property
    def name(self) -> str:
        """Return what tells it from other devices."""
        return measurements.identity(self.about)

    @property
    def is_gpu(self) -> bool:
        """Return whether it is a GPU."""
        return bool(self.about["type"] == "cuda")

    def rows(self, suite: str, **fields: Any) -> list[Row]:
        """Return the suite's rows that have these values."""
        found = self.files[suite]["measurements"] if suite in self.files else []
        return [row for row in found if all(row.get(name) == value for name, value in fields.items())]

    def done(self, suite: str, **fields: Any) -> list[Row]:
        """Return those of :meth:`rows` that have a result."""
        return self.rows(suite, status="ok", **fields)

    def runs(self, suite: str) -> list[tuple[Row, int]]:
        """Return the suite's runs that have rows, and how many."""
        if suite not in self.files:
            return []
        numbers = [row["run"] for row in self.rows(suite)]
        return [(run, numbers.count(i)) for i, run in enumerate(self.files[suite]["runs"]) if i in numbers]

    def settings(self) -> list[str]:
        """Describe what bears on its speed: threads, driver, power limit, clocks."""
        about: Row = {
            key: value
            for key, value in self.about.items()
            if key not in ("name", "type", "instructions") and value is not None
        }
        if "memory_bytes" in about:
            about["memory"] = f"{about.pop('memory_bytes') / 2**30:.0f} GiB"
        return [f"{key.replace('_', ' ')} {value}" for key, value in about.items()]

    def origin(self, suite: str) -> str:
        """Return versions and commits of the suite's rows in one line."""
        runs = [run for run, _ in self.runs(suite)]
        parts = []
        for name in dict.fromkeys(name for run in runs for name in run["versions"]):
            found = dict.fromkeys(run["versions"].get(name) for run in runs)
            parts.append(f"{name} {' and '.join(version for version in found if version)}")
        commits = dict.fromkeys(short_commit(run) for run in runs)
        shown = ("torch ", "triton ", "timm ", "torchvision ", "transformers ")
        return ", ".join([*(part for part in parts if part.startswith(shown)), f"commit {' and '.join(commits)}"])


def read(folder: Path) -> list[Device]:
    """Return the devices whose results lie in ``folder/DEVICE/SUITE.json``, or in ``folder/SUITE.json``: GPUs first.

    Raises:
        ValueError: there is no such folder, or a file is no result file.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    devices = []
    for place in [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]:
        paths = {name: place / f"{name}.json" for name in (suite.name for suite in SUITES)}
        files = {name: measurements.load(path) for name, path in paths.items() if path.exists()}
        files = {name: content for name, content in files.items() if content["measurements"]}
        if files:
            devices.append(Device(place.resolve().name, files))
    return sorted(devices, key=lambda device: not device.is_gpu)


def short_commit(run: Row) -> str:
    """Return the short form of the commit that a run measured."""
    commit, dirty, _ = (run["commit"] or "unknown").partition("-dirty")
    return commit[:12] + dirty


def is_ours(row: Row) -> bool:
    """Return whether fastvit is the contender, in whatever way."""
    return str(row["contender"]).partition("-")[0] == "fastvit"


def is_floor(row: Row) -> bool:
    """Return whether the row is the floor and no library."""
    return bool(row["contender"] == "floor")


def usual_size(rows: Sequence[Row]) -> int:
    """Return the one image size to show: 224, or the nearest measured one."""
    size: int = min((row["size"] for row in rows), key=lambda size: (abs(size - USUAL_SIZE), size))
    return size


def distinct(rows: Sequence[Row], *fields: str) -> list[tuple[Any, ...]]:
    """Return the values of ``fields`` that occur together, in the rows' order."""
    return list(dict.fromkeys(tuple(row[field] for field in fields) for row in rows))


def grouped(rows: Sequence[Row], *fields: str) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Return (values of ``fields``, rows with these values) in the rows' order."""
    keys = distinct(rows, *fields)
    return [(key, [row for row in rows if tuple(row[field] for field in fields) == key]) for key in keys]


def title(row: Row) -> str:
    """Return the row's model as papers write it."""
    return networks.title(row["model"])
