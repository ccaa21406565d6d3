"""``python -m benchmarks memory``: bytes at a fixed batch, and the largest batch that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import measure, networks
from benchmarks.measurements import Measurement, Row
from benchmarks.race import alone
from benchmarks.subjects import ModelSubject, measurements_by_batch, starter
from benchmarks.suite import BOTH_MODES, CPU_DTYPES, GPU, QUICK, Bar, Options, Suite, setting_columns

LARGEST = 1 << 15  # PyTorch has kernels with the batch in the grid's y, which ends below 1 << 16
PRECISION = 32  # the bisection ends when it knows the largest batch to one part in this many


class Memory(ModelSubject):
    """Peak bytes of a step, and the largest batch whose step fits."""

    def __init__(self, measurement: Measurement, device: str, limit: float | None) -> None:
        super().__init__(measurement, device)
        self.limit = None if limit is None else int(limit * 2**30)
        if self.device.type == "cuda" and self.limit is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(self.limit / total, 1.0))
        self.held = 0
        self.ended: str | None = None  # why a batch was too large, where it was not memory

    def measure(self) -> Row:
        """Measure bytes at the measurement's batch, and bisect the largest batch."""
        batch = self.measurement["batch"]
        self.held = self.first_calls(batch)
        row: Row = {
            "status": "ok",
            "reason": None,
            "pixels": self.network.size,
            "weights_bytes": measure.held_bytes(self.model),
            "peak_bytes": self.peak_bytes(self.held, self.call(batch)),
            "activation_bytes": self._activations() if self.training else None,
            "limit_bytes": self._limit(),
            "largest_batch": None,
            "too_large_batch": None,
            "too_large_reason": None,
        }
        if self.contender.way.compile is None:  # else for every batch anew, which would take an hour
            row["largest_batch"], row["too_large_batch"] = self._bisect()
            row["too_large_reason"] = self.ended
        return row

    def _activations(self) -> int:
        """Return the bytes that the forward pass of a step leaves for the backward pass, the logits included."""
        inputs, kept = self._images(self.measurement["batch"]), []

        def forward() -> None:
            with self.contender.context(self.dtype, self.device):
                kept.append(self.model(inputs))

        return measure.memory(forward, self.device)[1]

    def _limit(self) -> int:
        """Return the bytes that may be used: the option's, or all of the device's."""
        if self.limit is not None:
            return self.limit
        return torch.cuda.get_device_properties(self.device).total_memory

    def _fits(self, batch: int) -> bool:
        """Return whether a step on ``batch`` images stays under the limit: on a GPU tried, on a CPU counted."""
        try:
            run = self.call(batch)
            if self.device.type == "cuda":
                run()
                torch.cuda.synchronize(self.device)
                return True
            inputs = batch * 3 * self.network.size**2 * self.dtype.itemsize
            return inputs + (self.peak_bytes(self.held, run) or 0) <= self._limit()
        except torch.OutOfMemoryError:
            return False
        except RuntimeError as error:  # a library's own limit, or how it puts that memory is out
            self.ended = " ".join(str(error).split())[:200]
            return False
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _bisect(self) -> tuple[int, int | None]:
        """Return (a batch that fits, the smallest tried one that does not), by doubling and then halving the gap."""
        fits, fails, batch = 0, None, 1
        while fails is None and batch <= LARGEST:
            fits, fails = (batch, None) if self._fits(batch) else (fits, batch)
            batch *= 2
        if fails is None:
            return fits, None
        while fails - fits > max(1, fits // PRECISION) and self.ended is None:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self._fits(middle) else (fits, middle)
        return fits, fails


def _measure(group: Sequence[Measurement], options: Options, bar: Bar) -> Iterator[tuple[Measurement, Row]]:
    start = starter(Memory, options, options.limit)
    for measurement in group:
        bar.say(str(measurement))
        row = alone(start(measurement), "measure")
        bar.update(2)
        yield measurement, row


SUITE = Suite(
    name="memory",
    help="peak bytes at a fixed batch, and the largest batch that fits",
    description="Peak bytes of inference and of a training step at one batch, weights included; in training also what "
    "the forward pass keeps for the backward pass; and the largest batch that fits, by bisection. On a GPU steps are "
    "tried until memory runs out; on a CPU their allocations are counted against --limit.",
    defaults={
        "cpu": Options(
            dtypes=CPU_DTYPES[-1:],
            models=("vit_small_patch16_224", "resnet50"),
            contenders=("timm", "fastvit", "torchvision", "huggingface"),
            modes=BOTH_MODES,
            limit=0.25,
        ),
        "cuda": replace(
            GPU,
            models=(*networks.FIGURE_11, "resnet50"),
            batches=(64,),
            contenders=("timm", "timm-compile", "fastvit", "torchvision", "huggingface"),
            modes=BOTH_MODES,
        ),
        "quick": replace(QUICK, dtypes=("float32",), modes=BOTH_MODES),
    },
    measurements=measurements_by_batch,
    measure=_measure,
    extras=("modes", "limit"),
    columns=(
        *setting_columns("model", "size", "mode", "dtype", "contender", "batch"),
        ("peak MiB", "peak_bytes"),
        ("activations MiB", "activation_bytes"),
        ("largest batch", "largest_batch"),
        ("too large", "too_large_batch"),
    ),
)
