"""``python -m benchmarks throughput``: images per second at the best batch, as in the paper's Figure 11."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import measure, networks
from benchmarks.measurements import Measurement, MeasurementFailed, Row
from benchmarks.race import race
from benchmarks.subjects import Expected, ModelSubject, Run, baseline, model_measurements, starter
from benchmarks.suite import BOTH_MODES, GPU, QUICK, Bar, Options, Suite, setting_columns
from fastvit.ops import backends

GIVE_UP = 0.97  # a batch slower than this times the best one ends the search: larger ones are no better


class Throughput(ModelSubject):
    """A :class:`benchmarks.race.Racer`: steps on the best of several batches."""

    def __init__(self, measurement: Measurement, device: str, batches: Sequence[int]) -> None:
        super().__init__(measurement, device)
        self.batches = sorted(batches)
        self.run: Run = lambda: None
        self.repeats = 1

    def prepare(self, expected: Expected | None, baseline: Row | None) -> Row:
        """Check, find the best batch, and count memory there.

        A model that is compiled for every batch anew takes the baseline's best one.
        """
        compiled = self.contender.way.compile is not None
        batches = [baseline["batch"]] if compiled and baseline else self.batches
        held = self.first_calls(batches[0] if compiled else 1)
        row = self.check(expected, batches[0])
        batch = self._best(batches)
        self.run = self.call(batch)
        self.run()
        peak = self.peak_bytes(held, self.run)
        once = measure.seconds(self.run, self.device)
        self.repeats = max(1, round(measure.SLICE / once))
        self._release()
        more = {"batch": batch, "pixels": self.network.size, "peak_bytes": peak, "fallbacks": backends.fallbacks()}
        return row | more

    def _release(self) -> None:
        """Give unused memory back to the GPU, which other contenders share."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _best(self, batches: Sequence[int]) -> int:
        """Return the quickest of ``batches`` that fit, from small to large; the smallest is halved until it fits."""
        if len(batches) == 1 and self.device.type == "cpu":
            return batches[0]  # nothing to choose
        best = batches[0]
        speed = self._speed(best)
        while speed is None:
            best //= 2
            if not best:
                raise MeasurementFailed(f"out of memory at batch 1 ({self.network.size} pixels)")
            speed = self._speed(best)
        for batch in [larger for larger in batches if larger > best]:
            new = self._speed(batch)
            if new is None or new < GIVE_UP * speed:
                break
            if new > speed:
                best, speed = batch, new
        return best

    def _speed(self, batch: int) -> float | None:
        """Return images/s of a few steps; None where they don't fit."""
        try:
            run = self.call(batch)
            run()
            speed = batch / measure.seconds(run, self.device, 3)
        except torch.OutOfMemoryError:
            speed = None
        self._release()
        return speed

    def sample(self) -> list[float]:
        """Time as many steps as last :data:`measure.SLICE` seconds."""
        self.run()  # takes memory again, and finds clocks and caches as another process left them
        found = measure.seconds(self.run, self.device, self.repeats)
        self._release()
        return [found]


def _measure(group: Sequence[Measurement], options: Options, bar: Bar) -> Iterator[tuple[Measurement, Row]]:
    start = starter(Throughput, options, options.batches)
    for measurement, row in race(group, baseline(group[0]), start, options.budget, bar):
        if row["status"] == "ok":
            row["images_per_s"] = row["batch"] / row["median_s"]
        yield measurement, row


ALL = [
    "timm",
    "timm-compile",
    "timm-compile-max",
    "timm-autocast",
    "timm-xformers",
    "fastvit",
    "fastvit-compile",
    "fastvit-autocast",
    "fastvit-reference",
    "torchvision",
    "torchvision-compile",
    "huggingface",
    "floor",
]
SUITE = Suite(
    name="throughput",
    help="images/s at the best batch, inference and training",
    description="Images per second of one network as several libraries run it, with the same weights, at the best of "
    "the batches given; inference, or a training step (forward, cross entropy, backward, AdamW). Contenders take "
    "turns, each in a process of its own, and are checked against float64 before they are timed.",
    defaults={
        "cpu": Options(
            models=("vit_base_patch16_224", "resnet50"),
            contenders=("timm", "timm-compile", "fastvit", "fastvit-compile", "torchvision", "huggingface"),
        ),
        "cuda": replace(
            GPU,
            models=networks.FIGURE_11 + networks.RESNETS,
            sizes=(64, 128, 224, 384, 512),
            batches=(32, 64, 128, 256, 512, 1024),
            contenders=ALL,
            modes=BOTH_MODES,
            budget=10.0,
        ),
        "quick": replace(
            QUICK,
            dtypes=("float32",),
            contenders=("timm", "fastvit", "fastvit-reference", "torchvision", "huggingface", "floor"),
            modes=BOTH_MODES,
        ),
    },
    measurements=model_measurements,
    measure=_measure,
    extras=("modes", "budget"),
    columns=(
        *setting_columns("model", "size", "mode", "dtype", "contender", "batch"),
        ("images/s", "images_per_s"),
        ("spread", "spread"),
        ("x baseline", "ratio"),
        ("peak MiB", "peak_bytes"),
        ("logit error", "max_abs_logit_error"),
    ),
)
