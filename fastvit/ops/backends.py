"""Who runs an op: the one place where an implementation is chosen, and where a refusal gets its reason.

``auto`` takes Triton on a GPU, or the CUDA kernels where Triton can't run; on a CPU it takes oneDNN's products in
eager inference (compiled too, for bfloat16 on a CPU without the instructions) and the reference otherwise. A named
backend either runs or raises :class:`BackendUnavailable` with the reason.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from fastvit.cuda import extension
from fastvit.ops import onednn

log = logging.getLogger("fastvit")

BACKENDS = ("auto", "reference", "onednn", "triton", "cuda")
KERNELS = ("triton", "cuda")  # those that run through torch.ops.fastvit
ONEDNN_OPS = ("patch_embed", "linear", "mlp")  # the others run PyTorch's own kernels under onednn, as on the reference
OPS = (
    "patch_embed", "layer_norm", "linear", "mlp", "rotate",
    "attention", "attention_qkvpacked", "attention_rows", "attention_distance",
)  # fmt: skip
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

_fallbacks: dict[str, None] = {}  # messages, in the order of their first appearance


def _checked(name: str, source: str = "") -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}unknown backend {name!r}; accepted: {', '.join(BACKENDS)}")
    return name


# Replaced as a whole and never written into: contexts put back the one that was before them.
_settings = dict.fromkeys(OPS, _checked(os.environ.get("FASTVIT_BACKEND") or "auto", "FASTVIT_BACKEND: "))


class backend:
    """Set who runs the ops: ``fastvit.backend("triton")``, for good or as a context manager.

    Args:
        name: "auto", "reference", "onednn", "triton" or "cuda".
        only: the ops it is set for, or one (names of :data:`OPS`); the others stay as they are. Default: every op.

    Raises:
        ValueError: the name is none of these, or no op has a name in ``only``. (Whether it can run is known, and said,
            at the first op.)
    """

    def __init__(self, name: str, *, only: Iterable[str] = OPS) -> None:
        ops = (only,) if isinstance(only, str) else tuple(only)
        for op in ops:
            if op not in OPS:
                raise ValueError(f"unknown op {op!r}; accepted: {', '.join(OPS)}")
        self._set(dict.fromkeys(ops, _checked(name)))

    def _set(self, chosen: dict[str, str]) -> None:
        global _settings
        self.chosen, self.before = chosen, _settings
        self.after = _settings = {**_settings, **chosen}

    def __enter__(self) -> backend:
        if _settings is not self.after:  # made earlier; since then another was set
            self._set(self.chosen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _settings
        _settings = self.before


def setting(op: str | None = None) -> str:
    """The backend that is set for an op: one of :data:`BACKENDS`.

    Without an op, that of all; where they differ, every op with its own ("linear onednn, mlp reference, ...").
    """
    if op is not None:
        return _settings[op]
    names = set(_settings.values())
    return names.pop() if len(names) == 1 else ", ".join(f"{op} {name}" for op, name in _settings.items())


def again() -> backend:
    """What is set now, as a context to be entered later: what is recomputed runs as it ran."""
    made = backend("auto", only=())
    made.chosen = _settings
    return made


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
    if torch.compiler.is_compiling() and (exporting() or x.dtype != torch.bfloat16 or onednn.BFLOAT16_INSTRUCTIONS):
        return "it is for eager mode; torch.compile fuses the reference itself"
    if not onednn.AVAILABLE:
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


@torch.compiler.assume_constant_result
def _refuse_device(backend: str, device: torch.device) -> str | None:
    """The reason against a GPU, which Dynamo asks for and does not trace."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU is older than compute capability 8.0: it has {major}.{minor}"
    if backend == "cuda" and not extension.built_for((major, minor)):
        return f"the CUDA extension has no code for compute capability {major}.{minor}"
    return None


def _refuse_triton(op: str, x: Tensor) -> str | None:
    if TRITON_MISSING:
        return TRITON_MISSING
    if torch.version.hip:
        return "this is a ROCm build of PyTorch; the kernels are for NVIDIA GPUs"
    if x.device.type not in ("cuda", "meta", "cpu" if INTERPRETING else "cuda"):
        seen = "" if torch.cuda.is_available() else ", and PyTorch sees no GPU"
        return f"the tensors are on {x.device}{seen}; triton takes CUDA tensors (CPU tensors with TRITON_INTERPRET=1)"
    if x.is_cuda:
        refusal = _refuse_device("triton", x.device)
        if refusal is not None:
            return refusal
    if x.dtype not in KERNEL_DTYPES and not (op == "patch_embed" and x.dtype == torch.uint8):
        return f"dtype {x.dtype} is not supported; accepted: float32, float16, bfloat16"
    if op.startswith("attention") and x.shape[-1] > MAX_HEAD_DIM:
        return f"head dim {x.shape[-1]} is not supported; accepted: 1 to {MAX_HEAD_DIM}"
    if transformed():
        return "a torch.func transform is active; only the reference runs under one"
    return None


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _refuse_cuda(op: str, x: Tensor, weights: Iterable[Tensor]) -> str | None:
    if extension.MISSING:
        return extension.MISSING
    if x.device.type not in ("cuda", "meta", "cpu" if extension.EMULATED else "cuda"):
        return f"the tensors are on {x.device}; cuda takes CUDA tensors"
    if x.is_cuda:
        refusal = _refuse_device("cuda", x.device)
        if refusal is not None:
            return refusal
    if x.dtype not in KERNEL_DTYPES:
        return f"dtype {x.dtype} is not supported; accepted: {_names(KERNEL_DTYPES)}"
    if op == "layer_norm":
        if x.shape[-1] > extension.MAX_WIDTH:
            return f"a width of {x.shape[-1]} is not supported; accepted: up to {extension.MAX_WIDTH}"
    else:
        autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # meta has none
        for operand in weights or (x,):
            dtype = operand.dtype
            if autocast and dtype != torch.float64:
                dtype = torch.get_autocast_dtype(x.device.type)
            if dtype not in KERNEL_DTYPES[1:]:
                return f"dtype {dtype} is not supported; accepted: {_names(KERNEL_DTYPES[1:])}"
    if op.startswith("attention") and (x.shape[-1] % 8 or not 32 <= x.shape[-1] <= MAX_HEAD_DIM):
        return f"head dim {x.shape[-1]} is not supported; accepted: multiples of 8 from 32 to {MAX_HEAD_DIM}"
    if op == "rotate" and x.shape[-1] % 8:
        return f"head dim {x.shape[-1]} is not supported; accepted: multiples of 8"
    for weight in weights:
        widths = weight.shape if weight.ndim == 2 else weight.shape[:1]  # of patches any
        if any(width % 8 for width in widths):
            return f"a weight of {tuple(weight.shape)} is not supported; accepted: widths that are multiples of 8"
    if transformed():
        return "a torch.func transform is active; only the reference runs under one"
    return None


def exporting() -> bool:
    """Whether torch.export is tracing. Dynamo makes torch.compiler.is_exporting() True under torch.compile as well."""
    return torch.compiler._is_exporting_flag


def transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp...) is active."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def choose(op: str, x: Tensor, *, needs_grad: bool, weights: tuple[Tensor, ...] = ()) -> str:
    """The backend that runs ``op`` on ``x``, with ``weights`` those of its matrix products: not "auto".

    Called once per op, in forward; backward and checkpoint recomputation follow what was chosen.

    Raises:
        BackendUnavailable: a backend was named and can't run this; the message says why.
    """
    asked = _settings[op]
    if asked == "reference":
        return "reference"
    if asked == "auto":
        if x.is_cuda:
            if exporting():
                return "reference"
            reason = _refuse_triton(op, x)
            if reason is None:
                return "triton"
            other = _refuse_cuda(op, x, weights)
            if other is None:
                return "cuda"
            note_fallback(f"ops.{op} runs on the reference: triton: {reason}; cuda: {other}")
            return "reference"
        return "onednn" if op in ONEDNN_OPS and _refuse_onednn(x, needs_grad) is None else "reference"
    if asked == "cuda":
        reason = _refuse_cuda(op, x, weights)
    else:
        reason = _refuse_triton(op, x) if asked == "triton" else _refuse_onednn(x, needs_grad)
    if reason is not None:
        raise BackendUnavailable(f"ops.{op}: backend {asked!r} can't run here: {reason}")
    return asked


def availability() -> dict[str, dict[str, str | None]]:
    """For every op and backend: None where it can run on this machine, else the reason why not."""
    probe = torch.empty(1, 1, device="cuda" if torch.cuda.is_available() else "cpu")
    refused = _refuse_onednn(torch.empty(1, 1), needs_grad=False)
    half = torch.empty(1, 32, device=probe.device, dtype=torch.float16)
    return {
        op: {
            "reference": None,
            "onednn": refused,
            "triton": _refuse_triton(op, probe),
            "cuda": _refuse_cuda(op, half, ()),
        }
        for op in OPS
    }
