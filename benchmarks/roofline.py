"""The roofline floor: the time below which no run of a model's launches can fall, given a GPU's two ceilings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

import fastvit
from fastvit.tuning import compile_report


@dataclass(frozen=True)
class Ceilings:
    """The two limits of a GPU: by its data sheet, or measured by a benchmark."""

    name: str
    flops_per_s: float  # 16-bit matrix products summed in float32, without sparsity
    bytes_per_s: float  # of device memory
    source: str
    capability: int | None = None  # 90 for Hopper


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


class Work(NamedTuple):
    """What one launch has to do."""

    kernel: str
    flops: int
    bytes: int  # every input read once, every output written once


class Floor(NamedTuple):
    """The least time of one forward pass over a batch."""

    seconds: float
    images_per_s: float
    memory_share: float  # of the seconds: in launches whose bytes take longer than their FLOPs


@cache
def work(model: str, batch: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Work, ...]:
    """The launches of one forward pass (in eval mode, without gradients) of a model by name, on images of its size.

    They are recorded from the model itself, for sm_90; on other architectures they have other tiles, but the same
    FLOPs and bytes. What the model leaves to ATen (a mean over tokens, say) is not counted: the floor stays one.
    """
    vit = fastvit.create_model(model, device="meta", dtype=dtype).eval()
    images = torch.empty(batch, vit.in_chans, *vit.patch_embed.img_size, device="meta", dtype=dtype)
    with compile_report.trace(90) as trace, torch.no_grad():
        vit(images)
    return tuple(
        Work(one.kernel.fn.__name__, compile_report.flops(one), compile_report.moved(one)) for one in trace.launches
    )


def floor(model: str, batch: int, ceilings: Ceilings, dtype: torch.dtype = torch.bfloat16) -> Floor:
    """The sum over launches of max(FLOPs / peak, bytes / bandwidth).

    Args:
        model: a Vision Transformer's name. batch: images.
        ceilings: one of :data:`GPUS`, or what was measured.
        dtype: bfloat16 or float16, which the peaks are for.

    Raises:
        ValueError: another dtype, or a batch below 1.

    Source: Williams et al., "Roofline", 2009, for each launch by itself, as launches run one after the other.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the ceilings are for torch.bfloat16 and torch.float16, got {dtype}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    times = [(one.flops / ceilings.flops_per_s, one.bytes / ceilings.bytes_per_s) for one in work(model, batch, dtype)]
    seconds = sum(max(both) for both in times)
    in_memory = sum(memory for compute, memory in times if memory > compute)
    return Floor(seconds, batch / seconds, in_memory / seconds)
