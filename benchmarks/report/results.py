"""What was measured, read back: one :class:`Device` for each folder of result files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measurements, networks
from benchmarks.measurements import Row

SUITES = ("throughput", "latency", "memory", "kernels", "waterfall", "accuracy")  # in the order in which they are shown
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
        """Name, type and what bears on its speed, as the newest run found it."""
        runs = [run for content in self.files.values() for run in content["runs"]]
        about: Row = max(runs, key=lambda run: run["started"])["device"]
        return about

    @property
    def name(self) -> str:
        """What tells it from other devices."""
        return measurements.identity(self.about)

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return bool(self.about["type"] == "cuda")

    def rows(self, suite: str, **fields: Any) -> list[Row]:
        """The suite's rows that have these values."""
        found = self.files[suite]["measurements"] if suite in self.files else []
        return [row for row in found if all(row.get(name) == value for name, value in fields.items())]

    def done(self, suite: str, **fields: Any) -> list[Row]:
        """Those of :meth:`rows` that have a result."""
        return self.rows(suite, status="ok", **fields)

    def runs(self, suite: str) -> list[tuple[Row, int]]:
        """The suite's runs and how many rows each has, without those that have none (any more)."""
        if suite not in self.files:
            return []
        numbers = [row["run"] for row in self.rows(suite)]
        return [(run, numbers.count(i)) for i, run in enumerate(self.files[suite]["runs"]) if i in numbers]

    def settings(self) -> list[str]:
        """What bears on its speed, in words: threads, driver, power limit, clocks."""
        about: Row = {
            key: value
            for key, value in self.about.items()
            if key not in ("name", "type", "instructions") and value is not None
        }
        if "memory_bytes" in about:
            about["memory"] = f"{about.pop('memory_bytes') / 2**30:.0f} GiB"
        return [f"{key.replace('_', ' ')} {value}" for key, value in about.items()]

    def origin(self, suite: str) -> str:
        """Versions and commits of the suite's rows, in one line of small print."""
        runs = [run for run, _ in self.runs(suite)]
        parts = []
        for name in dict.fromkeys(name for run in runs for name in run["versions"]):
            found = dict.fromkeys(run["versions"].get(name) for run in runs)
            parts.append(f"{name} {' and '.join(version for version in found if version)}")
        commits = dict.fromkeys(short_commit(run) for run in runs)
        wanted = ("torch ", "triton ", "timm ", "torchvision ", "transformers ")
        return ", ".join([*(part for part in parts if part.startswith(wanted)), f"commit {' and '.join(commits)}"])


def read(folder: Path) -> list[Device]:
    """The devices whose results lie in ``folder/DEVICE/SUITE.json``, or in ``folder/SUITE.json``: GPUs first.

    Raises:
        ValueError: there is no such folder, or a file is no result file.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    devices = []
    for place in [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]:
        paths = {name: place / f"{name}.json" for name in SUITES}
        files = {name: measurements.load(path) for name, path in paths.items() if path.exists()}
        files = {name: content for name, content in files.items() if content["measurements"]}
        if files:
            devices.append(Device(place.resolve().name, files))
    return sorted(devices, key=lambda device: not device.is_gpu)


def short_commit(run: Row) -> str:
    """The commit that a run measured, as people write it."""
    commit, dirty, _ = (run["commit"] or "unknown").partition("-dirty")
    return commit[:12] + dirty


def is_ours(row: Row) -> bool:
    """Whether fastvit is the contender, in whatever way."""
    return str(row["contender"]).partition("-")[0] == "fastvit"


def is_floor(row: Row) -> bool:
    """Whether it is what the shapes cost at least, and no contender."""
    return bool(row["contender"] == "floor")


def usual_size(rows: Sequence[Row]) -> int:
    """The image size to show where one must do: 224, or the nearest that was measured."""
    size: int = min((row["size"] for row in rows), key=lambda size: (abs(size - USUAL_SIZE), size))
    return size


def distinct(rows: Sequence[Row], *fields: str) -> list[tuple[Any, ...]]:
    """The values of ``fields`` that occur together, in the rows' order."""
    return list(dict.fromkeys(tuple(row[field] for field in fields) for row in rows))


def title(row: Row) -> str:
    """The row's model as papers write it."""
    return networks.title(row["model"])
