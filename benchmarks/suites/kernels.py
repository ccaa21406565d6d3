"""``python -m benchmarks kernels``: every op by every library that has it, with cold caches."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import measure, op_impls
from benchmarks.measurements import Measurement, Row, grid
from benchmarks.op_impls import BASELINE, CASES, Arguments, Function, leaves, tensors
from benchmarks.race import race
from benchmarks.roofline import measured_ceilings
from benchmarks.subjects import largest_error, starter
from benchmarks.suite import GPU, QUICK, Bar, Options, Suite, setting_columns
from fastvit import reference
from fastvit.integrations.graphs import capture
from fastvit.tuning import compile_report

DIRECTIONS = {"inference": "forward", "training": "backward"}  # by mode
CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # of Linux: "32768K"


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory: a GPU's L2, a CPU's L3 (32 MiB where it is unknown)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 1024 * int(CPU_CACHE.read_text().strip().removesuffix("K")) if CPU_CACHE.exists() else 32 * 2**20


class Kernel:
    """A :class:`benchmarks.race.Racer`: one implementation on one op's arguments, forward or backward.

    Args:
        measurement: has op, model, size, batch, direction and dtype.
        device: "cpu" or "cuda".
    """

    def __init__(self, measurement: Measurement, device: str) -> None:
        self.measurement, self.device = measurement, torch.device(device)
        self.dtype: torch.dtype = getattr(torch, measurement["dtype"])
        self.backward: bool = measurement["direction"] == "backward"
        self.case = CASES[measurement["op"]]
        torch.manual_seed(0)
        self.arguments = self.case.arguments(
            self._random, op_impls.sizes(measurement["model"], measurement["size"], measurement["batch"])
        )
        self.function = self.case.impls[measurement.contender](self.case.op, self.arguments)
        self.found = self._results(self.function, self.arguments)  # compiles, while the other contenders do
        self.sets: list[tuple[Arguments, list[Tensor]]] = []
        self.run: Function = lambda: None
        self.repeats = self.calls = 1  # timed together: runs, and calls in each

    def _random(self, *shape: int, scale: float = 1.0) -> nn.Parameter:
        data = torch.randn(shape, device=self.device) * scale
        return nn.Parameter(data.to(self.dtype), requires_grad=self.backward)

    def _upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return random gradients of the outputs, the same ones in every dtype."""
        torch.manual_seed(1)
        return [torch.randn(o.shape, device=self.device).to(self.dtype).to(o.dtype) for o in outputs]

    def _results(self, function: Function, arguments: Arguments) -> list[Tensor]:
        """Compute the results to check: the outputs, or the gradients of all arguments that need one."""
        with torch.set_grad_enabled(self.backward):
            outputs = tensors(function(**arguments))
            if self.backward:
                return list(torch.autograd.grad(outputs, leaves(arguments), self._upstream(outputs)))
        return outputs

    def _exact(self) -> list[Tensor]:
        """Compute the results in float64 by the reference."""
        arguments = copy.deepcopy(self.arguments)
        for tensor in tensors(arguments):
            if tensor.is_floating_point():
                tensor.data = tensor.data.double()
        with sdpa_kernel(SDPBackend.MATH):
            return self._results(getattr(reference, self.case.op), arguments)

    def expected(self) -> list[float]:
        """Return the largest absolute error of each result."""
        return [(a - b).abs().max().item() for a, b in zip(self.found, self._exact(), strict=True)]

    def _check(self, expected: list[float]) -> float:
        """Return the largest error of a result relative to the baseline's."""
        worst = 0.0
        for number, (tensor, exact, eager) in enumerate(zip(self.found, self._exact(), expected, strict=True)):
            what = f"gradient {number}" if self.backward else f"output {number}"
            error = largest_error(what, tensor, exact, eager)
            worst = max(worst, error / eager if eager else 0.0)
        return worst

    def prepare(self, expected: list[float], baseline: Row | None) -> Row:
        """Check the results, and get ready to call on so many sets of arguments that no cache holds them.

        Raises:
            MeasurementFailed: a result's error is more than twice the baseline's.
        """
        worst = self._check(expected)
        self.found = []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what float64 took is the other processes' now
        self.sets = self._sets()
        call = self._backwards() if self.backward else self._forwards()

        def lap() -> None:
            for _ in self.sets:
                call()

        lap()
        self.run, self.calls, timed = call, 1, "wall clock"
        if self.device.type == "cuda" and self.backward:
            timed = "events"
        elif self.device.type == "cuda":
            self.run, self.calls, timed = capture(lap), len(self.sets), "cuda graph"
        once = measure.seconds(self.run, self.device, measure.WARM_UP)
        self.repeats = max(1, round(measure.SLICE / once))
        return {"timed": timed, "sets": len(self.sets), "error_ratio": worst}

    def _sets(self) -> list[tuple[Arguments, list[Tensor]]]:
        """Return sets of arguments and, backward, of the outputs' gradients: together twice the cache's size."""
        outputs = tensors(self.function(**self.arguments)) if self.backward else []
        first = self.arguments, self._upstream(outputs)
        number = math.ceil(2 * cache_bytes(self.device) / compile_report.distinct_bytes(first))
        return [first, *(copy.deepcopy(first) for _ in range(max(number, 2) - 1))]

    def _forwards(self) -> Function:
        """Return a function that calls on the next set."""
        turns = itertools.cycle(self.sets)

        def call() -> None:
            arguments, _ = next(turns)
            with torch.no_grad():
                self.function(**arguments)

        return call

    def _backwards(self) -> Function:
        """Return a function that runs the next set's backward pass; the forward passes run here, once."""
        graphs = [(tensors(self.function(**given)), leaves(given), upstream) for given, upstream in self.sets]
        turns = itertools.cycle(graphs)

        def call() -> None:
            torch.autograd.grad(*next(turns), retain_graph=True)

        return call

    def sample(self) -> list[float]:
        """Time about :data:`measure.SLICE` seconds; return the mean of its calls."""
        self.run()  # the clocks and caches that another process left
        return [measure.seconds(self.run, self.device, self.repeats) / self.calls]


CONTENDERS = tuple(dict.fromkeys(name for case in CASES.values() for name in case.impls))


def _measurements(options: Options) -> list[Measurement]:
    for contender in options.contenders:
        if contender not in CONTENDERS:
            raise ValueError(f"no contender {contender!r}; accepted: {', '.join(CONTENDERS)}")
    for model, size, batch in itertools.product(options.models, options.sizes, options.batches):
        op_impls.sizes(model, size, batch)  # refuses a model or size before anything is measured
    settings = grid(
        op=list(CASES),
        model=options.models,
        size=options.sizes,
        batch=options.batches,
        direction=[DIRECTIONS[mode] for mode in options.modes],
        dtype=options.dtypes,
    )
    impls = {setting: CASES[dict(setting)["op"]].impls for setting in settings}
    return [Measurement(name, setting) for setting in settings for name in options.contenders if name in impls[setting]]


def _measure(group: Sequence[Measurement], options: Options, bar: Bar) -> Iterator[tuple[Measurement, Row]]:
    what = group[0]
    case, dtype = CASES[what["op"]], getattr(torch, what["dtype"])
    sizes = op_impls.sizes(what["model"], what["size"], what["batch"])
    work = op_impls.work(case, sizes, dtype, backward=what["direction"] == "backward")
    best = measured_ceilings(options.device, what["dtype"])
    floor = best.seconds(work)
    for measurement, row in race(
        group, Measurement(BASELINE, what.setting), starter(Kernel, options), options.budget, bar
    ):
        if row["status"] == "ok":
            seconds = row["median_s"]
            row |= {
                "shape": "x".join(map(str, tensors(op_impls.shapes(case, sizes, dtype))[0].shape)),
                "flops": work.flops,
                "bytes": work.bytes,
                "tflops_per_s": work.flops / seconds / 1e12,
                "gb_per_s": work.bytes / seconds / 1e9,
                "floor_s": floor,
                "floor_percent": 100 * floor / seconds,
                "peak_tflops_per_s": best.flops_per_s / 1e12,
                "copy_gb_per_s": best.bytes_per_s / 1e9,
            }
        yield measurement, row


ALL = tuple(name for name in CONTENDERS if not name.startswith("fastvit-"))
SUITE = Suite(
    name="kernels",
    help="every op by every library that has it, and percent of the floor",
    description="The time of one op as a Vision Transformer calls it, on arguments that no cache holds; forward "
    "(--modes inference) and backward without forward (--modes training). torch is PyTorch's ops one after the other, "
    "as timm calls them. Results are checked against float64 before they are timed. The floor is the longer of two "
    "times: FLOPs at the speed of a large matrix product, least bytes at that of a large copy, both of the same run.",
    defaults={
        "cpu": Options(
            batches=(2,),
            contenders=tuple(name for name in ALL if name != "torch-compile"),  # minutes of its compiler
            modes=tuple(DIRECTIONS),
            budget=1.0,
        ),
        "cuda": replace(GPU, batches=(256,), contenders=(*ALL, "fastvit-cuda"), modes=tuple(DIRECTIONS), budget=1.0),
        "quick": replace(
            QUICK,
            dtypes=("float32",),
            contenders=(BASELINE, "fastvit", "sdpa-flash", "unfold"),
            modes=tuple(DIRECTIONS),
            budget=0.1,
        ),
    },
    measurements=_measurements,
    measure=_measure,
    extras=("modes", "budget"),
    columns=(
        *setting_columns("op", "model", "shape", "direction", "dtype", "contender"),
        ("median ms", "median_s"),
        ("spread", "spread"),
        ("x baseline", "ratio"),
        ("TFLOP/s", "tflops_per_s"),
        ("GB/s", "gb_per_s"),
        ("of the floor", "floor_percent"),
    ),
)
