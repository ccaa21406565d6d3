"""Who runs an op: the one place where an implementation is chosen, and where a refusal gets its reason.

``auto`` takes Triton on a GPU; on a CPU it takes oneDNN's fused linears in eager inference and the
reference otherwise. A named backend either runs or raises :class:`BackendUnavailable` with the reason.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import TracebackType

import torch
from torch import Tensor

log = logging.getLogger("fastvit")

BACKENDS = ("auto", "reference", "onednn", "triton")
ONEDNN_OPS = ("linear", "mlp")  # the others run PyTorch's own kernels under onednn, as on the reference
OPS = ("patch_embed", "layer_norm", "linear", "mlp", "attention", "attention_qkvpacked")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class BackendUnavailable(RuntimeError):
    """The backend that was asked for can't run this op here; the message says why."""


def _import_triton() -> str | None:
    """Why Triton's kernels can't be imported, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error}); it has wheels for Linux only"
    return None


TRITON_MISSING = _import_triton()

_setting = "auto"
_fallbacks: dict[str, None] = {}  # messages, in the order of their first appearance


def _checked(name: str, source: str = "") -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}unknown backend {name!r}; accepted: {', '.join(BACKENDS)}")
    return name


class backend:
    """Set the backend of every op: ``fastvit.backend("triton")``, for good or as a context manager.

    Args:
        name: "auto", "reference", "onednn" or "triton".

    Raises:
        ValueError: the name is none of these. (Whether it can run is known, and said, at the first op.)
    """

    def __init__(self, name: str) -> None:
        global _setting
        self.name, self.before = _checked(name), _setting
        _setting = name

    def __enter__(self) -> backend:
        global _setting
        _setting = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _setting
        _setting = self.before


def setting() -> str:
    """The backend that is set: one of :data:`BACKENDS`."""
    return _setting


def fallbacks() -> list[str]:
    """What ran otherwise than asked or expected so far in this process, each said once."""
    return list(_fallbacks)


def note_fallback(message: str) -> None:
    """Log ``message`` the first time it comes up (never while compiling) and keep it for ``fastvit env``."""
    if torch.compiler.is_compiling() or message in _fallbacks:
        return
    _fallbacks[message] = None
    log.warning(message)


def _refuse_onednn(x: Tensor, needs_grad: bool) -> str | None:
    if torch.compiler.is_compiling():
        return "it is for eager mode; torch.compile fuses the reference itself"
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN"
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}; onednn takes CPU tensors"
    if needs_grad:
        return "a gradient is needed; onednn is for inference (torch.no_grad)"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on; onednn takes weights as they are"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {x.dtype} is not supported; accepted: float32, bfloat16"
    if transformed():
        return "a torch.func transform is active; only the reference runs under one"
    return None


def _refuse_triton(op: str, x: Tensor) -> str | None:
    if TRITON_MISSING:
        return TRITON_MISSING
    if torch.version.hip:
        return "this is a ROCm build of PyTorch; the kernels are for NVIDIA GPUs"
    if x.device.type not in ("cuda", "meta", "cpu" if INTERPRETING else "cuda"):
        seen = "" if torch.cuda.is_available() else ", and PyTorch sees no GPU"
        return f"the tensors are on {x.device}{seen}; triton takes CUDA tensors (CPU tensors with TRITON_INTERPRET=1)"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if x.dtype not in KERNEL_DTYPES and not (op == "patch_embed" and x.dtype == torch.uint8):
        return f"dtype {x.dtype} is not supported; accepted: float32, float16, bfloat16"
    if op.startswith("attention") and x.shape[-1] > MAX_HEAD_DIM:
        return f"head dim {x.shape[-1]} is not supported; accepted: 1 to {MAX_HEAD_DIM}"
    if transformed():
        return "a torch.func transform is active; only the reference runs under one"
    return None


def transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp...) is active."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def choose(op: str, x: Tensor, *, needs_grad: bool) -> str:
    """The backend that runs ``op`` on ``x``: "reference", "onednn" or "triton".

    Called once per op, in forward; backward and checkpoint recomputation follow what was chosen.

    Raises:
        BackendUnavailable: a backend was named and can't run this; the message says why.
    """
    if _setting == "reference":
        return "reference"
    if _setting == "auto":
        if x.is_cuda:
            if torch.compiler.is_exporting():
                return "reference"
            reason = _refuse_triton(op, x)
            if reason is None:
                return "triton"
            note_fallback(f"ops.{op} runs on the reference: {reason}")
            return "reference"
        return "onednn" if op in ONEDNN_OPS and _refuse_onednn(x, needs_grad) is None else "reference"
    reason = _refuse_triton(op, x) if _setting == "triton" else _refuse_onednn(x, needs_grad)
    if reason is not None:
        raise BackendUnavailable(f"ops.{op}: backend {_setting!r} can't run here: {reason}")
    return _setting


def availability() -> dict[str, dict[str, str | None]]:
    """For every op and backend: None where it can run on this machine, else the reason why not."""
    probe = torch.empty(1, 1, device="cuda" if torch.cuda.is_available() else "cpu")
    onednn = _refuse_onednn(torch.empty(1, 1), needs_grad=False)
    return {op: {"reference": None, "onednn": onednn, "triton": _refuse_triton(op, probe)} for op in OPS}


_setting = _checked(os.environ.get("FASTVIT_BACKEND") or "auto", "FASTVIT_BACKEND: ")
