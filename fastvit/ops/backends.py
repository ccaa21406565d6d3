"""Dispatch: the one place that decides which backend runs an op. Each backend states its own refusals:
``fastvit/ops/onednn.py``, ``fastvit/ops/triton.py`` and ``fastvit/cuda/extension.py`` have a function ``refuse``.

``auto`` takes Triton on a GPU, or the CUDA kernels where Triton can't run; on a CPU it takes oneDNN's products in
eager inference (compiled too, for bfloat16 on a CPU without the instructions) and the reference otherwise. A named
backend either runs or raises :class:`BackendUnavailable` with the reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from fastvit.cuda import extension
from fastvit.ops import onednn, triton
from fastvit.ops.tracing import exporting, transformed

log = logging.getLogger("fastvit")

BACKENDS = ("auto", "reference", "onednn", "triton", "cuda")
KERNELS = ("triton", "cuda")  # those that run through torch.ops.fastvit
ONEDNN_OPS = ("patch_embed", "linear", "mlp")  # the others run PyTorch's own kernels under onednn, as on the reference
OPS = (
    "patch_embed", "layer_norm", "linear", "mlp", "rotate",
    "attention", "attention_qkvpacked", "attention_rows", "attention_distance",
)  # fmt: skip
REFUSALS = {"onednn": onednn.refuse, "triton": triton.refuse, "cuda": extension.refuse}
KERNEL_DTYPES, INTERPRETING, TRITON_MISSING = triton.DTYPES, triton.INTERPRETING, triton.MISSING


class BackendUnavailable(RuntimeError):
    """The backend that is set can't run this op here; the message says why."""


_fallbacks: dict[str, None] = {}  # messages, in the order of their first appearance


def _checked(name: str, source: str = "") -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}unknown backend {name!r}; accepted: {', '.join(BACKENDS)}")
    return name


# Replaced as a whole and never written into: contexts put back the one that was before them.
_settings = dict.fromkeys(OPS, _checked(os.environ.get("FASTVIT_BACKEND") or "auto", "FASTVIT_BACKEND: "))


class backend:
    """Set the backend of ops: ``fastvit.backend("triton")``, for good or as a context manager.

    Args:
        name: "auto", "reference", "onednn", "triton" or "cuda".
        only: the ops, or one op (names of :data:`OPS`), that change; the others stay as they are. Default: every op.

    Raises:
        ValueError: the name is none of these, or no op has a name in ``only``. (A backend that can't run raises at
            the first op.)
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
    """Return the setting of an op: one of :data:`BACKENDS`.

    Without an op, the setting of all; where they differ, each op's ("linear onednn, mlp reference, ...").
    """
    if op is not None:
        return _settings[op]
    names = set(_settings.values())
    return names.pop() if len(names) == 1 else ", ".join(f"{op} {name}" for op, name in _settings.items())


def again() -> backend:
    """Return the present settings as a context to enter later, for recomputation."""
    made = backend("auto", only=())
    made.chosen = _settings
    return made


def fallbacks() -> list[str]:
    """Return the messages of :func:`note_fallback` so far in this process, each once."""
    return list(_fallbacks)


def note_fallback(message: str) -> None:
    """Log ``message`` the first time it comes up (never while compiling) and keep it for ``fastvit env``."""
    if torch.compiler.is_compiling() or message in _fallbacks:
        return
    _fallbacks[message] = None
    log.warning(message)


def choose(op: str, x: Tensor, *, needs_grad: bool, weights: tuple[Tensor, ...] = ()) -> str:
    """Return the backend that runs ``op`` on ``x``, with ``weights`` those of its matrix products: never "auto".

    Called once per op, in forward; backward and checkpoint recomputation use the same backend.

    Raises:
        BackendUnavailable: a backend is set that can't run this; the message says why.
    """
    name = _settings[op]
    if name == "reference" or (name == "auto" and x.is_cuda and exporting()):
        return "reference"
    candidates = (name,) if name != "auto" else KERNELS if x.is_cuda else ("onednn",) if op in ONEDNN_OPS else ()
    reasons = {}
    for candidate in candidates:
        reason = REFUSALS[candidate](op, x, weights=weights, needs_grad=needs_grad)
        if reason is None and transformed():
            reason = "a torch.func transform is active; only the reference runs under one"
        if reason is None:
            return candidate
        reasons[candidate] = reason
    if name != "auto":
        raise BackendUnavailable(f"ops.{op}: backend {name!r} can't run here: {reasons[name]}")
    if x.is_cuda:
        listed = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
        note_fallback(f"ops.{op} runs on the reference: {listed}")
    return "reference"


def availability() -> dict[str, dict[str, str | None]]:
    """Return for every op and backend None where it can run on this machine, else the reason why not."""
    probe = torch.empty(1, 1, device="cuda" if torch.cuda.is_available() else "cpu")
    half = torch.empty(1, 32, device=probe.device, dtype=torch.float16)
    probes = {"onednn": torch.empty(1, 1), "triton": probe, "cuda": half}
    return {op: {"reference": None, **{name: REFUSALS[name](op, x) for name, x in probes.items()}} for op in OPS}
