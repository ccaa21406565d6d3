"""What a suite is: which cells, how they are measured; and how any suite is run, kept and resumed."""

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

from benchmarks.cells import Cell, Row, Store
from fastvit.ops import onednn

# A CPU without bfloat16 instructions multiplies it in software: minutes for what takes seconds.
CPU_DTYPES = ("float32", "bfloat16") if onednn.BFLOAT16_INSTRUCTIONS else ("float32",)


@dataclass(frozen=True)
class Options:
    """What to measure. Each suite has its defaults for a CPU and for a GPU."""

    device: str = "cpu"
    dtypes: Sequence[str] = CPU_DTYPES
    models: Sequence[str] = ("vit_base_patch16_224",)
    sizes: Sequence[int] = (224,)
    batches: Sequence[int] = (4,)
    peers: Sequence[str] = ("timm", "fastvit")
    modes: Sequence[str] = ("inference",)
    budget: float = 30.0  # seconds of timing for each group of cells that are compared
    limit: float | None = None  # GiB that memory may grow to


class Bar(tqdm):
    """A progress bar that says what it is at; in a log, which wants few lines, only when it next moves."""

    def __init__(self, total: int) -> None:
        self.live = sys.stderr.isatty()
        pace = 0.1 if self.live else 15
        super().__init__(total=total, unit="step", dynamic_ncols=True, mininterval=pace, disable=not total)

    def say(self, text: str) -> None:
        """Show what is being done."""
        self.set_description(text, refresh=self.live)


Measure = Callable[[Sequence[Cell], Options, Bar], Iterator[tuple[Cell, Row]]]


@dataclass(frozen=True)
class Suite:
    """A benchmark of cells.

    Args:
        name: of the command and of its files.
        help: in a few words.
        description: for ``--help``.
        defaults: options by "cpu", "cuda" and "quick".
        cells: what the options ask for; cells that are compared stand together.
        measure: (cells that differ by their contender only, options, progress bar) -> (cell, row) as they are done; two
            steps of the bar for every cell.
        columns: of the table: (title, field or how to make the text from a row).
        extras: options that it takes beside device, dtypes, models, sizes, batches and peers.
    """

    name: str
    help: str
    description: str
    defaults: dict[str, Options]
    cells: Callable[[Options], list[Cell]]
    measure: Measure
    columns: Sequence[tuple[str, str | Callable[[Row], str]]]
    extras: Sequence[str] = ()


def run(suite: Suite, options: Options, folder: Path, command: str, retry: bool = False) -> list[Row]:
    """Measure every cell that is not finished, keep each, and return the rows of all that were asked for.

    Raises:
        ValueError: the folder holds another device's results, or is being written to by another run; or an option that
            the suite can't take, or options that leave nothing to do.
    """
    cells = suite.cells(options)
    if not cells:
        peers, models = ", ".join(options.peers), ", ".join(options.models)
        raise ValueError(f"nothing to measure: none of the contenders {peers} has any of {models}")
    with locked(folder):
        return _run(suite, options, cells, Store(folder, suite.name, options.device, command), retry)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder``, and off the machine while this one measures."""
    folder.mkdir(parents=True, exist_ok=True)  # before minutes of measuring, not after
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"another benchmark is running into {folder}") from error
    finally:
        os.close(place)


def _run(suite: Suite, options: Options, cells: Sequence[Cell], store: Store, retry: bool) -> list[Row]:
    todo = [cell for cell in cells if not store.finished(cell, retry)]
    if len(todo) < len(cells):
        print(f"{len(cells) - len(todo)} of {len(cells)} cells are finished in {store.path}")
    with Bar(2 * len(todo)) as bar:
        for _, group in groupby(todo, key=lambda cell: cell.what):
            for cell, row in suite.measure(list(group), options, bar):
                store.add(cell, row)
                if row["status"] == "failed":
                    bar.write(f"{cell} failed: {row['reason']}")
    if todo:
        store.export()
    rows = [store.row(cell) for cell in cells]
    return [row for row in rows if row is not None]
