"""The roofline: a device's two ceilings, by data sheet or measured, and the least time of work under them.

Each launch takes at least max(FLOPs / peak, bytes / bandwidth), and launches run one after the other (Williams et al.,
"Roofline", 2009).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch

import fastvit
from benchmarks import measure
from benchmarks.workers import Worker
from fastvit import env
from fastvit.tuning import compile_report


class Work(NamedTuple):
    """FLOPs and bytes of one launch."""

    kernel: str
    flops: int
    bytes: int  # every input read once, every output written once


@dataclass(frozen=True)
class Ceilings:
    """The two limits of a device."""

    name: str
    flops_per_s: float  # 16-bit matrix products summed in float32, without sparsity
    bytes_per_s: float  # of device memory
    source: str
    capability: int | None = None  # 90 for Hopper

    def seconds(self, work: Work) -> float:
        """Return the least time of one launch: of its FLOPs or of its bytes, whichever takes longer."""
        return max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s)


# By the name under which the driver reports the GPU. Data-sheet peaks; no kernel reaches them.
GPUS = {
    "NVIDIA A100-SXM4-80GB": Ceilings(
        "A100 80 GB SXM", 312e12, 2039e9, "NVIDIA A100 Tensor Core GPU data sheet, 2021", 80
    ),
    "NVIDIA GeForce RTX 3090": Ceilings(
        "RTX 3090", 71e12, 936e9, "NVIDIA Ampere GA102 GPU Architecture whitepaper", 86
    ),
    "NVIDIA GeForce RTX 4090": Ceilings("RTX 4090", 165.2e12, 1008e9, "NVIDIA Ada GPU Architecture whitepaper", 89),
    "NVIDIA L4": Ceilings("L4", 121e12, 300e9, "NVIDIA L4 Tensor Core GPU data sheet (242 with sparsity)", 89),
    "NVIDIA H100 80GB HBM3": Ceilings(
        "H100 SXM", 989.4e12, 3350e9, "NVIDIA H100 Tensor Core GPU Architecture whitepaper", 90
    ),
    "NVIDIA H200": Ceilings("H200 SXM", 989.4e12, 4800e9, "NVIDIA H200 data sheet (1,979 with sparsity)", 90),
    "NVIDIA B200": Ceilings("B200", 2250e12, 8000e9, "NVIDIA Blackwell Architecture Technical Brief (HGX B200)", 100),
    "NVIDIA GeForce RTX 5090": Ceilings(
        "RTX 5090", 209.5e12, 1792e9, "NVIDIA RTX Blackwell GPU Architecture whitepaper", 120
    ),
}


class Floor(NamedTuple):
    """The least time of one forward pass over a batch."""

    seconds: float
    images_per_s: float
    memory_share: float  # of the seconds: in launches whose bytes take longer than their FLOPs


@cache
def work(model: str, batch: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Work, ...]:
    """Return the launches of one forward pass (in eval mode, without gradients) of a model by name, on its image size.

    They are recorded from the model itself, for sm_90; on other architectures they have other tiles, but the same
    FLOPs and bytes. ATen ops of the model (a mean over tokens, say) are not counted: the floor stays a floor.
    """
    vit = fastvit.create_model(model, device="meta", dtype=dtype).eval()
    images = torch.empty(batch, vit.in_chans, *vit.patch_embed.img_size, device="meta", dtype=dtype)
    with compile_report.trace(90) as trace, torch.no_grad():
        vit(images)
    return tuple(
        Work(one.kernel.fn.__name__, compile_report.flops(one), compile_report.moved(one)) for one in trace.launches
    )


def floor(model: str, batch: int, ceilings: Ceilings, dtype: torch.dtype = torch.bfloat16) -> Floor:
    """Return the least time of a model's forward pass: the sum of its launches'.

    Args:
        model: a Vision Transformer's name. batch: images.
        ceilings: one of :data:`GPUS`, or measured ones.
        dtype: bfloat16 or float16, which the peaks are for.

    Raises:
        ValueError: another dtype, or a batch below 1.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the ceilings are for torch.bfloat16 and torch.float16, got {dtype}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    launches = work(model, batch, dtype)
    times = [ceilings.seconds(one) for one in launches]
    seconds = sum(times)
    in_memory = sum(time for time, one in zip(times, launches, strict=True) if time > one.flops / ceilings.flops_per_s)
    return Floor(seconds, batch / seconds, in_memory / seconds)


class Machine:
    """Measures a device's ceilings by a large square product in a dtype and a large copy, both PyTorch's."""

    TIMINGS = 10

    def __init__(self, device: str, dtype: str) -> None:
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)

    def _quickest(self, run: Callable[[], object]) -> float:
        run()
        return min(measure.seconds(run, self.device) for _ in range(self.TIMINGS))

    def ceilings(self) -> Ceilings:
        """Return FLOPs and bytes (read and written) per second, each the best of several timings."""
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
def measured_ceilings(device: str, dtype: str) -> Ceilings:
    """Measure a device's ceilings, once in a run, in a process of its own."""
    with Worker(Machine, device, dtype) as worker:
        found: Ceilings = worker.call("ceilings")
    return found
