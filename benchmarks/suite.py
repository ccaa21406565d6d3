"""A suite: its measurements, its table, and the run that stores results and resumes."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from benchmarks import networks
from benchmarks.measurements import Measurement, Row, Store
from fastvit.ops import onednn

# A CPU without bfloat16 instructions multiplies it in software: minutes for what takes seconds.
CPU_DTYPES = ("float32", "bfloat16") if onednn.BFLOAT16_INSTRUCTIONS else ("float32",)


@dataclass(frozen=True)
class Options:
    """Options of a suite's command line. Each suite has defaults for a CPU and for a GPU."""

    device: str = "cpu"
    dtypes: Sequence[str] = CPU_DTYPES
    models: Sequence[str] = ("vit_base_patch16_224",)
    sizes: Sequence[int] = (224,)
    batches: Sequence[int] = (4,)
    contenders: Sequence[str] = ("timm", "fastvit")
    modes: Sequence[str] = ("inference",)
    budget: float = 30.0  # seconds of timing for each group that is compared
    limit: float | None = None  # GiB of memory


# Starting points of the suites' defaults: on a GPU, and for a run of seconds.
GPU = Options("cuda", ("bfloat16",), ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"))
QUICK = Options(models=("vit_tiny_patch16_224",), sizes=(64,), batches=(2,), budget=1.0, limit=0.1)
BOTH_MODES = ("inference", "training")

Column = tuple[str, str | Callable[[Row], str]]  # (title, field or a function that writes the text of a row)


def setting_columns(*fields: str) -> tuple[Column, ...]:
    """Return columns for fields of the setting."""
    known: dict[str, Column] = {
        "model": ("model", lambda row: networks.title(row["model"])),
        "size": ("px", "size"),
    }
    return tuple(known.get(field, (field, field)) for field in fields)


class Bar(tqdm):
    """A progress bar that names the current step; in a log, which wants few lines, only when it next moves."""

    def __init__(self, total: int) -> None:
        self.live = sys.stderr.isatty()
        pace = 0.1 if self.live else 15
        super().__init__(total=total, unit="step", dynamic_ncols=True, mininterval=pace, disable=not total)

    def say(self, text: str) -> None:
        """Show the current step."""
        self.set_description(text, refresh=self.live)


@dataclass(frozen=True)
class Suite:
    """A benchmark: a command, its measurements, and the table of its results.

    Args:
        name: of the command and of its files.
        help: in a few words.
        description: for ``--help``.
        defaults: options by "cpu", "cuda" and "quick".
        measurements: makes the list from the options; measurements that are compared stand together.
        measure: (measurements that differ by their contender only, options, progress bar) -> (measurement, row) as
            they end; it moves the bar by two steps for each.
        columns: of the table.
        extras: options that it takes beside device, dtypes, models, sizes, batches and contenders.
    """

    name: str
    help: str
    description: str
    defaults: dict[str, Options]
    measurements: Callable[[Options], list[Measurement]]
    measure: Callable[[Sequence[Measurement], Options, Bar], Iterator[tuple[Measurement, Row]]]
    columns: Sequence[Column]
    extras: Sequence[str] = ()


def run(suite: Suite, options: Options, folder: Path, command: str, retry: bool = False) -> list[Row]:
    """Take every measurement that is not finished, store each, and return the rows of all measurements.

    Raises:
        ValueError: the folder holds another device's results, or another run writes into it; or the suite can't take an
            option, or the options leave nothing to do.
    """
    measurements = suite.measurements(options)
    if not measurements:
        contenders, models = ", ".join(options.contenders), ", ".join(options.models)
        raise ValueError(f"nothing to measure: none of the contenders {contenders} has any of {models}")
    with locked(folder):
        store = Store(folder, suite.name, options.device, command)
        todo = [one for one in measurements if not store.finished(one, retry)]
        if len(todo) < len(measurements):
            print(f"{len(measurements) - len(todo)} of {len(measurements)} measurements are finished in {store.path}")
        with Bar(2 * len(todo)) as bar:
            for _, group in groupby(todo, key=lambda one: one.setting):
                for measurement, row in suite.measure(list(group), options, bar):
                    store.add(measurement, row)
                    if row["status"] == "failed":
                        bar.write(f"{measurement} failed: {row['reason']}")
        if todo:
            store.export()
    rows = [store.row(one) for one in measurements]
    return [row for row in rows if row is not None]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder``, and off the machine while this one measures."""
    folder.mkdir(parents=True, exist_ok=True)  # before minutes of measuring, not after
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"another benchmark is running into {folder}") from error
    finally:
        os.close(descriptor)
