"""The refusals of the Triton kernels, in a module that can be imported without Triton."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from fastvit.triton import MISSING

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128


@torch.compiler.assume_constant_result
def _refuse_device(device: torch.device) -> str | None:
    """Return the reason against a GPU. Dynamo calls this and does not trace it."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"the GPU is older than compute capability 8.0: it has {major}.{minor}" if major < 8 else None


def refuse(op: str, x: Tensor, *, weights: Iterable[Tensor] = (), needs_grad: bool = False) -> str | None:
    """Return why the Triton kernels can't run ``op`` on ``x``, or None."""
    if MISSING:
        return MISSING
    if torch.version.hip:
        return "this is a ROCm build of PyTorch; the kernels are for NVIDIA GPUs"
    if x.device.type not in ("cuda", "meta", "cpu" if INTERPRETING else "cuda"):
        seen = "" if torch.cuda.is_available() else ", and PyTorch sees no GPU"
        return f"the tensors are on {x.device}{seen}; triton takes CUDA tensors (CPU tensors with TRITON_INTERPRET=1)"
    if x.is_cuda and (refusal := _refuse_device(x.device)):
        return refusal
    if x.dtype not in DTYPES and not (op == "patch_embed" and x.dtype == torch.uint8):
        return f"dtype {x.dtype} is not supported; accepted: float32, float16, bfloat16"
    if op.startswith("attention") and x.shape[-1] > MAX_HEAD_DIM:
        return f"head dim {x.shape[-1]} is not supported; accepted: 1 to {MAX_HEAD_DIM}"
    return None
