"""Time and memory of a call, measured alike for every contender."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

SLICE = 0.1  # seconds: one timing repeats the call until it lasts about this long
WARM_UP = 3


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Return the mean duration of ``repeats`` calls: CUDA events on a GPU, the wall clock on a CPU."""
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


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Return a row's fields of its timings, in seconds: median, 20th and 80th percentile, 99th where there are 100.

    ``spread`` is (p80 - p20) / median: how far to trust the median.
    """
    ordered = sorted(samples)
    low, high = ordered[0], ordered[-1]
    if len(ordered) > 1:
        fifths = statistics.quantiles(ordered, n=5, method="inclusive")
        low, high = fifths[0], fifths[3]
    median = statistics.median(ordered)
    p99 = statistics.quantiles(ordered, n=100, method="inclusive")[98] if len(ordered) >= 100 else None
    return {
        "median_s": median,
        "p20_s": low,
        "p80_s": high,
        "p99_s": p99,
        "spread": (high - low) / median,
        "timings": len(ordered),
    }


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def memory(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Return (peak, kept): the bytes that ``run`` adds at its highest and leaves after it.

    They are those that PyTorch's allocator of the device hands out, without the Python process, code on the device and
    unused memory in the allocator's cache.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()  # so that each contender that needs one counts its own
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative when memory is freed
        peak = max(peak, held)
    return peak, held
