"""``python -m benchmarks kernels``: every op beside its rivals, forward and backward, with cold caches."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import measure, networks, rivals
from benchmarks.cells import Cell, Row
from benchmarks.race import race
from benchmarks.rivals import BASELINE, CASES, Arguments, Function, leaves, tensors
from benchmarks.roofline import Ceilings
from benchmarks.subjects import largest_error, starter
from benchmarks.suites import Bar, Options, Suite
from benchmarks.workers import Worker
from fastvit import env, reference
from fastvit.integrations.graphs import capture
from fastvit.tuning import compile_report

DIRECTIONS = {"inference": "forward", "training": "backward"}  # by mode
CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # of Linux: "32768K"


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory: the L2 of a GPU, the L3 of a CPU (32 MiB where the system does not tell)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 1024 * int(CPU_CACHE.read_text().strip().removesuffix("K")) if CPU_CACHE.exists() else 32 * 2**20


class Kernel:
    """A :class:`benchmarks.race.Racer`: one function on one op's arguments, forward or backward.

    Args:
        cell: has op, model, size, batch, direction and dtype.
        device: "cpu" or "cuda".
    """

    def __init__(self, cell: Cell, device: str) -> None:
        self.cell, self.device = cell, torch.device(device)
        self.dtype: torch.dtype = getattr(torch, cell["dtype"])
        self.backward: bool = cell["direction"] == "backward"
        self.case = CASES[cell["op"]]
        torch.manual_seed(0)
        self.arguments = self.case.arguments(self._random, rivals.sizes(cell["model"], cell["size"], cell["batch"]))
        self.function = self.case.rivals[cell.contender](self.case.op, self.arguments)
        self.found = self._results(self.function, self.arguments)  # compiles, while the other contenders do
        self.sets: list[tuple[Arguments, list[Tensor]]] = []
        self.run: Function = lambda: None
        self.repeats = self.calls = 1  # timed together: runs, and calls in each

    def _random(self, *shape: int, scale: float = 1.0) -> nn.Parameter:
        data = torch.randn(shape, device=self.device) * scale
        return nn.Parameter(data.to(self.dtype), requires_grad=self.backward)

    def _upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Random gradients of the outputs, the same ones in every dtype."""
        torch.manual_seed(1)
        return [torch.randn(o.shape, device=self.device).to(self.dtype).to(o.dtype) for o in outputs]

    def _results(self, function: Function, arguments: Arguments) -> list[Tensor]:
        """What is checked: the outputs, or the gradients of all arguments that need one."""
        with torch.set_grad_enabled(self.backward):
            outputs = tensors(function(**arguments))
            if self.backward:
                return list(torch.autograd.grad(outputs, leaves(arguments), self._upstream(outputs)))
        return outputs

    def _exact(self) -> list[Tensor]:
        """The results in float64, by the reference."""
        arguments = copy.deepcopy(self.arguments)
        for tensor in tensors(arguments):
            if tensor.is_floating_point():
                tensor.data = tensor.data.double()
        with sdpa_kernel(SDPBackend.MATH):
            return self._results(getattr(reference, self.case.op), arguments)

    def expected(self) -> list[float]:
        """The largest absolute error of each result."""
        return [(a - b).abs().max().item() for a, b in zip(self.found, self._exact(), strict=True)]

    def _check(self, expected: list[float]) -> float:
        """The largest error of a result relative to the baseline's."""
        worst = 0.0
        for number, (tensor, exact, eager) in enumerate(zip(self.found, self._exact(), expected, strict=True)):
            what = f"gradient {number}" if self.backward else f"output {number}"
            error = largest_error(what, tensor, exact, eager)
            worst = max(worst, error / eager if eager else 0.0)
        return worst

    def prepare(self, expected: list[float], baseline: Row | None) -> Row:
        """Check, and get the calls ready, one on each of so many arguments that no cache holds them.

        Raises:
            CellFailed: a result's error is more than twice the baseline's.
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
        """Arguments, and backward the outputs' gradients: so many that twice as much as the cache holds is read."""
        outputs = tensors(self.function(**self.arguments)) if self.backward else []
        first = self.arguments, self._upstream(outputs)
        number = math.ceil(2 * cache_bytes(self.device) / compile_report.distinct_bytes(first))
        return [first, *(copy.deepcopy(first) for _ in range(max(number, 2) - 1))]

    def _forwards(self) -> Function:
        """A call on the next set."""
        turns = itertools.cycle(self.sets)

        def call() -> None:
            arguments, _ = next(turns)
            with torch.no_grad():
                self.function(**arguments)

        return call

    def _backwards(self) -> Function:
        """The backward pass alone of the next set: the forward ones are done here, and kept."""
        graphs = [(tensors(self.function(**given)), leaves(given), upstream) for given, upstream in self.sets]
        turns = itertools.cycle(graphs)

        def call() -> None:
            torch.autograd.grad(*next(turns), retain_graph=True)

        return call

    def sample(self) -> list[float]:
        """One timing of about :data:`measure.SLICE` seconds: the mean of its calls."""
        self.run()  # the clocks and caches that another process left
        return [measure.seconds(self.run, self.device, self.repeats) / self.calls]


class Machine:
    """What a device does at best: a large square product in a dtype, and a large copy, both PyTorch's."""

    TIMINGS = 10

    def __init__(self, device: str, dtype: str) -> None:
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)

    def _quickest(self, run: Function) -> float:
        run()
        return min(measure.seconds(run, self.device) for _ in range(self.TIMINGS))

    def ceilings(self) -> Ceilings:
        """FLOPs and bytes (read and written) per second, each the best of several timings."""
        gpu = self.device.type == "cuda"
        side, length = (8192, 2**30) if gpu else (4096, 2**27)
        a, b, out = (torch.randn(side, side, device=self.device).to(self.dtype) for _ in range(3))
        layouts = (b, b.mT)  # CPUs multiply by one of them much faster
        product = min(self._quickest(partial(torch.mm, a, layout, out=out)) for layout in layouts)
        source = torch.randint(0, 255, (length,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copying = self._quickest(lambda: target.copy_(source))
        name = env.device(self.device.type)["name"]
        method = f"measured: torch.mm of {side} x {side}, copy of {length // 2**20} MiB"
        return Ceilings(name, 2 * side**3 / product, 2 * length / copying, method)


@cache
def ceilings(device: str, dtype: str) -> Ceilings:
    """:class:`Machine`'s, measured once in a run, in a process of its own."""
    with Worker(Machine, device, dtype) as worker:
        found: Ceilings = worker.call("ceilings")
    return found


PEERS = tuple(dict.fromkeys(name for case in CASES.values() for name in case.rivals))


def _cells(options: Options) -> list[Cell]:
    for peer in options.peers:
        if peer not in PEERS:
            raise ValueError(f"no contender {peer!r}; accepted: {', '.join(PEERS)}")
    found = []
    for model in options.models:
        for size in options.sizes:
            for batch in options.batches:
                rivals.sizes(model, size, batch)  # refuses a model or size before anything is measured
                for op, case in CASES.items():
                    for mode in options.modes:
                        for dtype in options.dtypes:
                            what = (
                                ("op", op),
                                ("model", model),
                                ("size", size),
                                ("batch", batch),
                                ("direction", DIRECTIONS[mode]),
                                ("dtype", dtype),
                            )
                            found += [Cell(peer, what) for peer in options.peers if peer in case.rivals]
    return found


def _measure(group: Sequence[Cell], options: Options, bar: Bar) -> Iterator[tuple[Cell, Row]]:
    what = group[0]
    case, dtype = CASES[what["op"]], getattr(torch, what["dtype"])
    sizes = rivals.sizes(what["model"], what["size"], what["batch"])
    work = rivals.work(case, sizes, dtype, backward=what["direction"] == "backward")
    best = ceilings(options.device, what["dtype"])
    floor = max(work.flops / best.flops_per_s, work.bytes / best.bytes_per_s)
    for cell, row in race(group, Cell(BASELINE, what.what), starter(Kernel, options), options.budget, bar):
        if row["status"] == "ok":
            seconds = row["median_s"]
            row |= {
                "shape": "x".join(map(str, tensors(rivals.shapes(case, sizes, dtype))[0].shape)),
                "flops": work.flops,
                "bytes": work.bytes,
                "tflops_per_s": work.flops / seconds / 1e12,
                "gb_per_s": work.bytes / seconds / 1e9,
                "floor_s": floor,
                "floor_percent": 100 * floor / seconds,
                "peak_tflops_per_s": best.flops_per_s / 1e12,
                "copy_gb_per_s": best.bytes_per_s / 1e9,
            }
        yield cell, row


EVERYONE = tuple(name for name in PEERS if not name.startswith("fastvit-"))
SUITE = Suite(
    name="kernels",
    help="every op against its rivals, and percent of the floor",
    description="The time of one op as a Vision Transformer calls it, on arguments that no cache holds; forward "
    "(--modes inference) and backward without forward (--modes training). torch is PyTorch's ops one after the other, "
    "as timm calls them. Results are checked against float64 before they are timed. The floor is the longer of two "
    "times: FLOPs at the speed of a large matrix product, least bytes at that of a large copy, both of the same run.",
    defaults={
        "cpu": Options(
            batches=(2,),
            peers=tuple(name for name in EVERYONE if name != "torch-compile"),  # minutes of its compiler
            modes=tuple(DIRECTIONS),
            budget=1.0,
        ),
        "cuda": Options(
            device="cuda",
            dtypes=("bfloat16",),
            models=("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"),
            batches=(256,),
            peers=(*EVERYONE, "fastvit-cuda"),
            modes=tuple(DIRECTIONS),
            budget=1.0,
        ),
        "quick": Options(
            dtypes=("float32",),
            models=("vit_tiny_patch16_224",),
            sizes=(64,),
            batches=(2,),
            peers=(BASELINE, "fastvit", "sdpa-flash", "unfold"),
            modes=tuple(DIRECTIONS),
            budget=0.1,
        ),
    },
    cells=_cells,
    measure=_measure,
    extras=("modes", "budget"),
    columns=(
        ("op", "op"),
        ("model", lambda row: networks.title(row["model"])),
        ("shape", "shape"),
        ("direction", "direction"),
        ("dtype", "dtype"),
        ("contender", "contender"),
        ("median ms", "median_s"),
        ("spread", "spread"),
        ("x baseline", "ratio"),
        ("TFLOP/s", "tflops_per_s"),
        ("GB/s", "gb_per_s"),
        ("of the floor", "floor_percent"),
    ),
)
