"""Contenders that take turns, each in its own process, round by round: drift of clocks and load hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from benchmarks import measure
from benchmarks.cells import Cell, CellFailed, Row, Unavailable
from benchmarks.suites import Bar
from benchmarks.workers import Worker

ROUNDS = (3, 60)


class Racer(Protocol):
    """A subject that can take part."""

    def expected(self) -> Any:
        """What every contender must compute; asked of the baseline."""

    def prepare(self, expected: Any, baseline: Row | None) -> Row:
        """Check the results, get ready to be timed, and return the fields known by then.

        Args:
            expected: the baseline's answer to :meth:`expected`.
            baseline: what the baseline's own ``prepare`` returned; None for itself.
        """

    def sample(self) -> list[float]:
        """Timings of about :data:`measure.SLICE` seconds in all, each in seconds per call."""


def blank(error: CellFailed | Unavailable) -> Row:
    """The row of a cell without a result: it says why."""
    status = "unavailable" if isinstance(error, Unavailable) else "failed"
    return {"status": status, "reason": str(error)}


def race(
    cells: Sequence[Cell], baseline: Cell, start: Callable[[Cell], Worker], budget: float, bar: Bar
) -> Iterator[tuple[Cell, Row]]:
    """Measure ``cells``, which differ by their contender only, side by side.

    Args:
        cells: whom to measure.
        baseline: whom the others are checked against and compared with; it takes part even if not among ``cells``.
        start: makes the process of a cell's :class:`Racer`.
        budget: seconds of timing for all of them.
        bar: gets two steps for every cell.

    Yields:
        (cell, row) for every cell. A row has ``status`` "ok" and :func:`measure.summary`'s fields, what
        :meth:`Racer.prepare` returned, and ``ratio``: how many times as fast as the baseline (by ``batch``, where there
        is one). Or it has "unavailable" or "failed" and a ``reason``.
    """
    everyone = list(dict.fromkeys([baseline, *cells]))
    with ExitStack() as stack:
        workers = {cell: stack.enter_context(start(cell)) for cell in everyone}
        rows: dict[Cell, Row] = {}
        expected: Any = None
        for cell, worker in workers.items():  # all at the same time; what follows is for a quiet machine
            bar.say(f"starting {cell}")
            worker.ready()
        for cell in everyone:
            bar.say(f"checking {cell}")
            try:
                if cell == baseline:
                    expected = workers[cell].call("expected")
                elif rows[baseline]["status"] != "ok":
                    raise CellFailed(f"{baseline.contender}, by which it is checked, failed")
                rows[cell] = {"status": "ok", "reason": None}
                rows[cell] |= workers[cell].call("prepare", expected, rows[baseline] if cell != baseline else None)
            except (CellFailed, Unavailable) as error:
                rows[cell] = blank(error)
                workers[cell].close()
            bar.update(cell in cells)
        _time({cell: workers[cell] for cell in everyone if rows[cell]["status"] == "ok"}, rows, budget, bar)
        standard = rows[baseline]
        for cell in cells:
            row = rows[cell]
            if row["status"] == "ok" and standard["status"] == "ok":
                row["ratio"] = _speed(row) / _speed(standard)
            bar.update()
            yield cell, row


def _speed(row: Row) -> float:
    speed: float = (row.get("batch") or 1) / row["median_s"]
    return speed


def _time(workers: dict[Cell, Worker], rows: dict[Cell, Row], budget: float, bar: Bar) -> None:
    """Rounds of samples, each started by another contender, into the rows."""
    samples: dict[Cell, list[float]] = {cell: [] for cell in workers}
    rounds, turn = ROUNDS[1], 0
    while turn < rounds:
        begun = time.perf_counter()
        order = list(workers)
        shift = turn % max(len(order), 1)
        for cell in order[shift:] + order[:shift]:
            bar.say(f"timing {cell}, round {turn + 1} of {rounds}")
            try:
                new = workers[cell].call("sample")
            except CellFailed as error:
                rows[cell] = blank(error)
                del workers[cell], samples[cell]
                continue
            samples[cell] += new
        if turn == 0:  # the first round says how many fit
            spent = time.perf_counter() - begun
            rounds = min(max(int(budget / spent), ROUNDS[0]), ROUNDS[1])
        turn += 1
    for cell, found in samples.items():
        rows[cell] |= measure.summary(found)
