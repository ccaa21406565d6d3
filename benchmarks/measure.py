"""Time and memory, measured alike for every contender."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

SLICE = 0.1  # seconds: one timing repeats the call until it lasts about this long


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Mean duration of ``repeats`` calls: CUDA events on a GPU, the wall clock on a CPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begun) / repeats


def plan(
    runs: Mapping[str, Callable[[], object]], device: torch.device, budget: float, rounds: tuple[int, int]
) -> tuple[dict[str, int], int]:
    """How often to call each contender per timing, and how many rounds fit into ``budget`` seconds.

    Args:
        runs: what will be timed, already warm.
        device: where it runs.
        budget: seconds for all rounds together, from which their number follows,
        rounds: but at least and at most this many.
    """
    once = {name: max(seconds(run, device), 1e-6) for name, run in runs.items()}
    repeats = {name: max(1, round(SLICE / t)) for name, t in once.items()}
    one_round = sum(t * repeats[name] for name, t in once.items())
    return repeats, min(max(int(budget / one_round), rounds[0]), rounds[1]) if runs else 0


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: torch.device, repeats: Mapping[str, int], rounds: int
) -> Iterator[tuple[str, float]]:
    """Time all contenders in turn, round by round, so that drift of clocks and load hits all alike.

    Yields (name, seconds per call); each round starts with another contender.
    """
    names = list(runs)
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            yield name, seconds(runs[name], device, repeats[name])


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th percentile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], statistics.median(samples), fifths[3]


def peak_memory(model: nn.Module, run: Callable[[], object], device: torch.device) -> int:
    """Bytes that inference with ``model`` holds at its peak, its weights included.

    Counted are the parameters and buffers, and the highest sum of everything else that PyTorch's
    allocator of the device handed out during the *first* two calls of ``run``: activations, workspace
    and copies of weights that a backend packs on its first call and keeps. The input batch, the Python
    process and code on the device are not counted, nor what the allocator caches but nobody uses.
    """
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()  # so that each contender that needs one counts its own
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        run()
        torch.cuda.synchronize(device)
        return weights + torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative when memory is freed
        peak = max(peak, held)
    return weights + peak
