"""A race: contenders take turns, each in its own process, so that drift of clocks and load hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from benchmarks import measure
from benchmarks.measurements import Measurement, MeasurementFailed, Row, Unavailable
from benchmarks.suite import Bar
from benchmarks.workers import Worker

ROUNDS = (3, 60)


class Racer(Protocol):
    """A subject that can be timed beside others."""

    def expected(self) -> Any:
        """Compute what every contender must compute; called on the baseline."""

    def prepare(self, expected: Any, baseline: Row | None) -> Row:
        """Check the results, get ready to be timed, and return the fields known by then.

        Args:
            expected: the baseline's :meth:`expected`.
            baseline: the row of the baseline's own ``prepare``; None for the baseline itself.
        """

    def sample(self) -> list[float]:
        """Time calls for about :data:`measure.SLICE` seconds in all; return seconds per call."""


def no_result(error: MeasurementFailed | Unavailable) -> Row:
    """Return the row of a measurement without a result, with the reason."""
    status = "unavailable" if isinstance(error, Unavailable) else "failed"
    return {"status": status, "reason": str(error)}


def alone(worker: Worker, method: str) -> Row:
    """Call a method that returns a row in a process of its own, without a race; end the process."""
    try:
        with worker:
            row: Row = worker.call(method)
            return row
    except (MeasurementFailed, Unavailable) as error:
        return no_result(error)


def race(
    measurements: Sequence[Measurement],
    baseline: Measurement,
    start: Callable[[Measurement], Worker],
    budget: float,
    bar: Bar,
) -> Iterator[tuple[Measurement, Row]]:
    """Time ``measurements``, which differ by their contender only, side by side.

    Args:
        measurements: of the contenders.
        baseline: the contender that the others are checked against and compared with; it runs even if it is not among
            ``measurements``.
        start: makes the process of a measurement's :class:`Racer`.
        budget: seconds of timing for all of them.
        bar: moves by two steps for each measurement.

    Yields:
        (measurement, row). A row has ``status`` "ok" and the fields of :func:`measure.summary` and of
        :meth:`Racer.prepare`, and ``ratio``: how many times as fast as the baseline (by ``batch``, where there is one).
        Or it has "unavailable" or "failed" and a ``reason``.
    """
    entries = list(dict.fromkeys([baseline, *measurements]))
    with ExitStack() as stack:
        workers = {entry: stack.enter_context(start(entry)) for entry in entries}
        rows: dict[Measurement, Row] = {}
        expected: Any = None
        for entry, worker in workers.items():  # all at the same time; what follows is for a quiet machine
            bar.say(f"starting {entry}")
            worker.ready()
        for entry, worker in workers.items():
            bar.say(f"checking {entry}")
            try:
                if entry == baseline:
                    expected = worker.call("expected")
                elif rows[baseline]["status"] != "ok":
                    raise MeasurementFailed(f"{baseline.contender}, by which it is checked, failed")
                rows[entry] = {"status": "ok", "reason": None}
                rows[entry] |= worker.call("prepare", expected, rows[baseline] if entry != baseline else None)
            except (MeasurementFailed, Unavailable) as error:
                rows[entry] = no_result(error)
                worker.close()
            bar.update(entry in measurements)
        _time({entry: workers[entry] for entry in entries if rows[entry]["status"] == "ok"}, rows, budget, bar)
        for entry in measurements:
            row = rows[entry]
            if row["status"] == "ok" and rows[baseline]["status"] == "ok":
                row["ratio"] = _speed(row) / _speed(rows[baseline])
            bar.update()
            yield entry, row


def _speed(row: Row) -> float:
    speed: float = (row.get("batch") or 1) / row["median_s"]
    return speed


def _time(workers: dict[Measurement, Worker], rows: dict[Measurement, Row], budget: float, bar: Bar) -> None:
    """Take rounds of samples, each led by another contender, and add their summary to the rows."""
    samples: dict[Measurement, list[float]] = {entry: [] for entry in workers}
    rounds, turn = ROUNDS[1], 0
    while turn < rounds:
        begun = time.perf_counter()
        order = list(workers)
        shift = turn % max(len(order), 1)
        for entry in order[shift:] + order[:shift]:
            bar.say(f"timing {entry}, round {turn + 1} of {rounds}")
            try:
                new = workers[entry].call("sample")
            except MeasurementFailed as error:
                rows[entry] = no_result(error)
                del workers[entry], samples[entry]
                continue
            samples[entry] += new
        if turn == 0:  # the first round says how many fit
            spent = time.perf_counter() - begun
            rounds = min(max(int(budget / spent), ROUNDS[0]), ROUNDS[1])
        turn += 1
    for entry, found in samples.items():
        rows[entry] |= measure.summary(found)
