"""``fastvit tune``: measure tiles on this GPU and write them to a table that goes before the derived ones.

With ``--backend cuda`` it measures each product of a linear layer by the kernel and by cuBLASLt.

Other processes compile the candidates of each problem ahead and reject those that spill or do not fit. The rest run on
random data, are checked against the same launcher in float32, and are timed beside the derived tile: replays of a CUDA
graph whose calls rotate through more memory than the L2 cache holds. Each finished problem is written to the table and
is not measured again, so a run may be interrupted at any time.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from fastvit import env
from fastvit.cuda import extension
from fastvit.triton import launch, tiles
from fastvit.triton.tiles import Problem, Row
from fastvit.tuning.candidates import (
    LauncherCall,
    candidate_configs,
    find_problems,
    is_reproducible,
    launcher_call,
    rejection,
)

GAIN = 0.02  # a tile must be faster than the derived one by this, and by more than the spread of the timings
FINALISTS = 4  # candidates that are timed beside the derived tile for SECONDS
SECONDS = 0.5
ORDER = 2.0**-14  # of the largest value: what two orders of summation in float32 may differ by


# --- accuracy and time --------------------------------------------------------------------------------------


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fill new memory with NaN, as in the tests, so that elements that a kernel leaves unwritten show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would have its workspace set in the environment
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _outputs(call: LauncherCall, tile: Row | None) -> list[Tensor]:
    for name in call.written:
        call.arguments[name].fill_(torch.nan)
    with _poisoned():
        return [t.detach().clone() for t in call.run(tile)]


class AccuracyCheck:
    """Accepts a candidate whose error is at most twice the derived tile's, both against float32.

    The reference of 16-bit results is the same launcher on the same values in float32, whose kernels the tests hold
    against float64. Of float32 results it is the derived tile itself, up to another order of summation.

    cuBLASLt may have twice the error of that: where a kernel rounds once, it rounds in between too, as eager PyTorch
    does (a gradient before it is multiplied by GELU's slope, say).
    """

    def __init__(self, call: LauncherCall, derived: Row) -> None:
        self.call = call
        shipped = _outputs(call, derived)
        wide = call.in_float32()
        self.exact = shipped if all(t.dtype == torch.float32 for t in shipped) else _outputs(wide, None)
        self.allowed = []
        for ours, exact in zip(shipped, self.exact, strict=True):
            error, largest = (ours.float() - exact).abs().max().item(), exact.abs().max().item()
            if not math.isfinite(error):
                raise ArithmeticError(f"the derived tile {derived} gives values that are not finite")
            self.allowed.append(2 * error + ORDER * largest)

    def failure(self, tile: Row) -> str | None:
        """Return why ``tile`` is wrong, or None."""
        roundings = 2 if tile.get("run") == "library" else 1
        for ours, exact, once in zip(_outputs(self.call, tile), self.exact, self.allowed, strict=True):
            allowed = once * roundings
            error = (ours.float() - exact).abs().max().item()
            if not error <= allowed:
                return f"wrong by {error:.2e}, allowed {allowed:.2e}"
        return None


def _copies(call: LauncherCall, device: torch.device) -> int:
    """Return how many sets of operands to rotate through, so that the L2 cache holds none when its turn comes."""
    if device.type == "cpu":
        return 1
    held = sum(t.numel() * t.element_size() for t in call.arguments.values() if isinstance(t, Tensor))
    return min(max(math.ceil(3 * torch.cuda.get_device_properties(device).L2_cache_size / held), 1), 64)


def _clock(calls: Sequence[LauncherCall], tile: Row, device: torch.device) -> Callable[[], float]:
    """Return a function that runs all calls with ``tile``, in a CUDA graph, and returns the seconds of one."""

    def run_all() -> None:
        for call in calls:
            call.run(tile)

    run_all()
    if device.type == "cpu":  # in the interpreter, where times mean nothing

        def by_the_wall() -> float:
            begun = time.perf_counter()
            run_all()
            return (time.perf_counter() - begun) / len(calls)

        return by_the_wall

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def by_events() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return by_events


def interleaved(clocks: Sequence[Callable[[], float]], seconds: float) -> list[list[float]]:
    """Sample each clock, round by round so that drift hits all alike, for about ``seconds``: 3 to 200 rounds."""
    once = sum(clock() for clock in clocks)
    rounds = min(max(int(seconds / max(once, 1e-6)), 3), 200)
    samples: list[list[float]] = [[] for _ in clocks]
    for i in range(rounds):
        for j in range(len(clocks)):
            which = (i + j) % len(clocks)
            samples[which].append(clocks[which]())
    return samples


def spread(samples: Sequence[float]) -> float:
    """Return (80th - 20th percentile) / median."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return (fifths[3] - fifths[0]) / statistics.median(samples)


def is_faster(samples: Sequence[float], derived: Sequence[float]) -> bool:
    """Return whether a tile is faster than the derived one by more than GAIN and by more than the timings scatter."""
    noise = max(GAIN, spread(samples), spread(derived))
    return statistics.median(samples) * (1 + noise) < statistics.median(derived)


def measure(
    problem: Problem, dtype: torch.dtype, derived: Row, found: Iterable[tuple[Row, str | None]], device: torch.device
) -> Row:
    """Measure a problem and return its row of the table.

    ``derived`` is the tile to beat; ``found`` are candidates, each with the reason why it is rejected, or None.
    """
    derived = {name: derived[name] for name in tiles.TILES[problem.family]}
    call = launcher_call(problem, dtype, device)
    calls = [call, *(launcher_call(problem, dtype, device) for _ in range(_copies(call, device) - 1))]
    check = AccuracyCheck(call, derived)
    screened: list[tuple[float, Row]] = []
    refused: Counter[str] = Counter()
    for tile, reason in found:
        if reason is None:
            try:
                if (reason := check.failure(tile)) is None:
                    clock = _clock(calls, tile, device)
                    screened.append((min(clock() for _ in range(3)), tile))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton's errors are of many types
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason is not None:
            refused[reason.split(" ")[0].rstrip(":")] += 1
    screened.sort(key=lambda one: one[0])
    finalists = [derived, *(tile for _, tile in screened[:FINALISTS])]
    samples = interleaved([_clock(calls, tile, device) for tile in finalists], SECONDS)
    medians = [statistics.median(s) for s in samples]
    best = min(range(len(finalists)), key=lambda i: medians[i])
    if not is_faster(samples[best], samples[0]):
        best = 0
    return {
        "size": problem.size,
        "key": problem.fields,
        "dtype": str(dtype).removeprefix("torch."),
        "tile": finalists[best],
        "us": round(medians[best] * 1e6, 3),
        "spread": round(spread(samples[best]), 4),
        "derived": derived,
        "derived_us": round(medians[0] * 1e6, 3),
        "timed": len(screened),
        "refused": refused,
    }


# --- the run --------------------------------------------------------------------------------------------------


def _commit() -> str | None:
    """Return the commit of this checkout, or None in an installation."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


@dataclass
class Table:
    """A measured table on disk, written anew after every row."""

    path: Path
    gpu: str
    arch: int
    command: str = ""
    rows: dict[Problem, Row] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, gpu: str, arch: int, command: str = "") -> Table:
        """Open the table at ``path``; a table that can't be used is set aside (``.refused``)."""
        try:
            rows = tiles.read(path, gpu)
        except tiles.TableError as error:
            aside = path.with_suffix(".refused")
            os.replace(path, aside)
            print(f"{path} can't be continued: {error}. It is now {aside}", file=sys.stderr)
            rows = None
        return cls(path, gpu, arch, command, rows or {})

    @cached_property
    def head(self) -> dict[str, Any]:
        """Return the table's head: the GPU, versions, commit and command."""
        return {
            "format": tiles.FORMAT,
            "gpu": self.gpu,
            "arch": self.arch,
            "device": env.device(),
            "versions": env.versions() | {"triton": triton.__version__},
            "commit": _commit(),
            "command": self.command,
        }

    def add(self, problem: Problem, row: Row) -> None:
        """Write the table with one more row; a reader sees the old table or the new one."""
        self.rows[problem] = row
        families: dict[str, dict[str, list[Row]]] = {}
        for known in sorted(self.rows, key=lambda p: (str(p.key), p.size)):
            families.setdefault(known.family, {}).setdefault(known.dtype, []).append(self.rows[known])
        lists = [  # a row is a line
            f"  {json.dumps(family)}: {{\n"
            + ",\n".join(f"   {json.dumps(dtype)}: [\n    {_lines(rows)}\n   ]" for dtype, rows in dtypes.items())
            + "\n  }"
            for family, dtypes in families.items()
        ]
        text = json.dumps(self.head, indent=1)[:-2] + ',\n "rows": {\n' + ",\n".join(lists) + "\n }\n}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(text)
        os.replace(unfinished, self.path)
        tiles.reload()


def _lines(rows: list[Row]) -> str:
    return ",\n    ".join(map(json.dumps, rows))


Problems = dict[Problem, tuple[torch.dtype, Row]]  # with their dtype and derived tile


def tune(
    problems: Problems, table: Table, device: torch.device, *, most: int | None = None, budget: float = math.inf
) -> int:
    """Measure the problems that ``table`` does not have yet, and return how many are left.

    Args:
        device: a CUDA device, or the CPU in Triton's interpreter.
        most: at most so many candidates a problem.
        budget: seconds after which no further problem is begun.
    """
    end = time.monotonic() + budget
    programs = launch.multiprocessors(torch.empty(0, device=device))
    open_ones = {p: value for p, value in problems.items() if p not in table.rows}
    tried = {}
    for problem, (_, derived) in open_ones.items():
        found = candidate_configs(problem, table.arch, programs)
        tried[problem] = [tile for tile in found if any(tile[name] != derived[name] for name in tile)][:most]
    # Several processes, since the compiler holds Python's lock; spawned, since CUDA does not survive a fork.
    workers = max((os.cpu_count() or 2) - 1, 1)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))  # which starts none before its first task
    try:
        compiling: dict[Problem, list[Future[str | None]]] = {}
        for problem, (dtype, _) in {} if launch.INTERPRETING else open_ones.items():
            if problem.family != "cuda":
                compiling[problem] = [
                    pool.submit(rejection, problem, dtype, tile, table.arch) for tile in tried[problem]
                ]
        left = len(open_ones)
        with tqdm(total=sum(map(len, tried.values())), unit="tile", dynamic_ncols=True) as bar:

            def compiled(problem: Problem) -> Iterator[tuple[Row, str | None]]:
                for i, tile in enumerate(tried[problem]):
                    yield tile, compiling[problem][i].result() if problem in compiling else None
                    bar.update()

            for problem, (dtype, derived) in open_ones.items():
                if time.monotonic() > end:
                    break
                bar.set_description(str(problem))
                try:
                    table.add(problem, measure(problem, dtype, derived, compiled(problem), device))
                    left -= 1
                except (torch.OutOfMemoryError, ArithmeticError) as error:
                    bar.write(f"{problem} is not measured: {error}")
    finally:
        pool.shutdown(cancel_futures=True)
    return left


def render(problems: Iterable[Problem], table: Table) -> str:
    """Format the gain of tuning, problem by problem."""
    lines = [f"{'derived us':>10} {'best us':>9} {'gain':>6}  problem: tile where it is not the derived one"]
    for problem in problems:
        row = table.rows.get(problem)
        if row is not None:
            gain = row["derived_us"] / row["us"] - 1
            tile = "" if row["tile"] == row["derived"] else ": " + " ".join(f"{k}={v}" for k, v in row["tile"].items())
            lines.append(f"{row['derived_us']:>10.1f} {row['us']:>9.1f} {gain:>6.1%}  {problem}{tile}")
    return "\n".join(lines)


def problems_of(
    models: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[torch.dtype],
    steps: Sequence[bool],
    arch: int,
    backend: str = "triton",
) -> Problems:
    """Return the problems of models by name; ``steps`` has True for a training step, False for inference."""
    from fastvit.models import ViT, create_model

    found: Problems = {}
    for name in models:
        if not isinstance(create_model(name, device="meta"), ViT):
            raise ValueError(f"{name!r} is no Vision Transformer: its kernels are PyTorch's, which have no tiles here")
    for name, dtype in product(models, dtypes):
        model = create_model(name, depth=2, device="meta", dtype=dtype)  # blocks are alike, but the last may differ
        for batch, training in product(batches, steps):
            images = torch.empty(batch, 3, *model.patch_embed.img_size, device="meta", dtype=dtype)
            for problem, derived in find_problems(model, images, arch, training=training, backend=backend).items():
                if problem not in found and is_reproducible(problem, dtype, arch):
                    found[problem] = dtype, derived
                elif problem not in found:
                    kept = f"{problem} keeps its derived tile: no call reproduces the layout of its operands"
                    print(kept, file=sys.stderr)
    return found


def table_path(out: str | None, gpu: str) -> Path:
    """Return the table's file: ``out``, or in the folder ``out`` (default: the user's cache) one by the GPU's name."""
    if out is not None and out.endswith(".json"):
        return Path(out)
    return (tiles.cache_folder() if out is None else Path(out)) / f"{tiles.slug(gpu)}.json"


def _cuda_unavailable(arguments: Any) -> str | None:
    """Return why backend cuda can't be measured (or listed) with these arguments, or None."""
    if "float32" in arguments.dtype:
        return "its products are float16 and bfloat16; --dtype float32 has none"
    if arguments.dry_run:
        return None
    return extension.MISSING or ("its kernels do not run in Triton's interpreter" if launch.INTERPRETING else None)


def main(arguments: Any) -> int:
    """Run ``fastvit tune`` with parsed arguments and return the exit status."""
    if arguments.arch is not None and not (arguments.dry_run and arguments.arch in launch.ARCHITECTURES):
        known = ", ".join(map(str, launch.ARCHITECTURES))
        raise ValueError(f"--arch {arguments.arch}: accepted with --dry-run only: {known}")
    if not (arguments.dry_run and arguments.arch) and not (torch.cuda.is_available() or launch.INTERPRETING):
        raise ValueError(
            "it needs a CUDA device, and PyTorch sees none. `fastvit tune --dry-run --arch 90` lists what would be "
            "measured; with TRITON_INTERPRET=1 it runs on the CPU, without meaningful times."
        )
    if arguments.backend == "cuda" and (missing := _cuda_unavailable(arguments)):
        raise ValueError(f"--backend cuda can't run: {missing}")
    device = torch.device("cpu" if launch.INTERPRETING or not torch.cuda.is_available() else "cuda")
    here = torch.empty(0, device=device)
    arch = arguments.arch or launch.architecture(here)
    dtypes = [getattr(torch, name) for name in arguments.dtype]
    steps = [arguments.training] if arguments.training is not None else [False, True]
    problems = problems_of(arguments.models, arguments.batch, dtypes, steps, arch, arguments.backend)
    if arguments.dry_run:
        programs = launch.multiprocessors(here if here.is_cuda else here.to("meta"))
        counts = {problem: len(candidate_configs(problem, arch, programs)[: arguments.most]) for problem in problems}
        for problem, count in counts.items():
            print(f"{count:>4}  {problem}")
        print(f"{sum(counts.values()):>4}  candidates for {len(counts)} problems on sm_{arch}")
        return 0
    gpu = launch.device_name(here)
    assert gpu is not None
    table = Table.open(table_path(arguments.out, gpu), gpu, arch, shlex.join(["fastvit", *sys.argv[1:]]))
    try:
        left = tune(problems, table, device, most=arguments.most, budget=arguments.budget)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {table.path} has {len(table.rows)} problems, and the same command goes on"
        ) from None
    print(render(problems, table))
    print(f"{table.path}: {len(table.rows)} problems" + (f"; {left} left: run the same again" if left else ""))
    return 1 if left else 0
