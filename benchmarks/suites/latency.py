"""``python -m benchmarks latency``: the time of one small batch, eager and as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks import measure
from benchmarks.measurements import Measurement, Row
from benchmarks.race import race
from benchmarks.subjects import Expected, ModelSubject, Run, baseline, measurements_by_batch, starter
from benchmarks.suite import GPU, QUICK, Bar, Options, Suite, setting_columns

SAMPLE = 0.25  # seconds of calls in a row, each timed by itself
CALLS = (1, 50)


class Latency(ModelSubject):
    """A :class:`benchmarks.race.Racer` whose every call is timed by itself."""

    def __init__(self, measurement: Measurement, device: str) -> None:
        super().__init__(measurement, device)
        self.run: Run = lambda: None
        self.calls = 1

    def prepare(self, expected: Expected | None, baseline: Row | None) -> Row:
        """Check and warm up."""
        row = self.check(expected, self.measurement["batch"])
        self.run = self.call(self.measurement["batch"])
        for _ in range(measure.WARM_UP):
            self.run()
        once = measure.seconds(self.run, self.device)
        self.calls = min(max(round(SAMPLE / once), CALLS[0]), CALLS[1])
        return row

    def sample(self) -> list[float]:
        """Time several calls, the host waiting for each."""
        self.run()  # the clocks and caches that another process left
        return [measure.seconds(self.run, self.device) for _ in range(self.calls)]


def _measure(group: Sequence[Measurement], options: Options, bar: Bar) -> Iterator[tuple[Measurement, Row]]:
    return race(group, baseline(group[0]), starter(Latency, options), options.budget, bar)


SUITE = Suite(
    name="latency",
    help="milliseconds for small batches, eager and as a CUDA graph",
    description="The time of one forward pass at small batches: the median, and the 99th percentile where there are "
    "100 timings. Every call is timed by itself, the host waiting for it. -graph replays a CUDA graph.",
    defaults={
        "cpu": Options(
            models=("vit_tiny_patch16_224", "vit_base_patch16_224"),
            batches=(1, 8),
            contenders=("timm", "timm-compile", "fastvit", "fastvit-compile", "torchvision", "huggingface"),
        ),
        "cuda": replace(
            GPU,
            models=("vit_base_patch16_224", "vit_large_patch16_224", "resnet50"),
            batches=(1, 8, 32),
            contenders=[
                "timm",
                "timm-graph",
                "timm-compile",
                "timm-compile-max",
                "fastvit",
                "fastvit-graph",
                "torchvision",
                "torchvision-graph",
                "torchvision-compile",
                "huggingface",
            ],
            budget=15.0,
        ),
        "quick": replace(QUICK, batches=(1,)),
    },
    measurements=measurements_by_batch,
    measure=_measure,
    extras=("budget",),
    columns=(
        *setting_columns("model", "size", "dtype", "batch", "contender"),
        ("median ms", "median_s"),
        ("p99 ms", "p99_s"),
        ("spread", "spread"),
        ("timings", "timings"),
        ("x baseline", "ratio"),
    ),
)
