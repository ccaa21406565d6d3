"""The report of ``fastvit env``: the device, the versions, and which backend can run each op here."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import torch

import fastvit
import fastvit.cuda.extension as cuda
from fastvit.ops import backends

LIBRARIES = ("torch", "triton", "numpy", "safetensors")
CONTENDERS = ("timm", "torchvision", "transformers", "xformers")


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return the versions of Python, fastvit, its libraries and its contenders; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "fastvit": fastvit.__version__}
    found |= {name: version(name) for name in LIBRARIES + CONTENDERS}
    found["torch"] = torch.__version__  # with the build, +cu130 say
    found["cuda"] = torch.version.cuda
    return found


def cpu_name() -> str:
    """Return the processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device(kind: str | None = None) -> dict[str, Any]:
    """Describe the device of a kind ("cpu" or "cuda"; default: CUDA where there is one) and what bears on its speed."""
    if (kind or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return {"type": "cpu", "name": cpu_name(), "threads": torch.get_num_threads(), "instructions": capability}
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "type": "cuda",
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        **_nvidia_smi(str(gpu.uuid)),
    }


# Fields of nvidia-smi that describe a GPU's state; nothing here changes it.
_STATE = {
    "driver": "driver_version",
    "power_limit": "power.limit",
    "power_draw": "power.draw",
    "sm_clock": "clocks.sm",
    "sm_clock_max": "clocks.max.sm",
    "memory_clock": "clocks.mem",
    "temperature": "temperature.gpu",
}


def _nvidia_smi(uuid: str) -> dict[str, str | None]:
    """Return :data:`_STATE` of a GPU as nvidia-smi prints it; None where that tool is missing, refuses or hangs."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_STATE.values())}", "--format=csv,noheader", f"--id=GPU-{uuid}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return dict.fromkeys(_STATE)
    found = [value.strip() for value in run.stdout.split(",")]
    return dict(zip(_STATE, found, strict=True)) if run.returncode == 0 else dict.fromkeys(_STATE)


def extension() -> dict[str, str]:
    """Describe the CUDA extension: ``file``, ``architectures`` and ``cuda``, or why it's ``missing``, how ``built``."""
    if cuda.MISSING is not None:
        found, record = {"missing": cuda.MISSING}, Path(fastvit.__file__).with_name("_build.txt")  # setup.py's
        return {**found, "built": record.read_text().strip()} if record.exists() else found
    if cuda.EMULATED:
        return {"missing": "its sources run on the CPU, for tests"}
    module = importlib.import_module("fastvit._C")
    return {"file": str(module.__file__), "architectures": module.ARCHITECTURES, "cuda": module.CUDA}


def tiles() -> list[str]:
    """List the tables that the kernels' tiles come from on this GPU, in order; empty where no kernel runs."""
    if backends.TRITON_MISSING or not (torch.cuda.is_available() or backends.INTERPRETING):
        return []
    from fastvit.triton import launch
    from fastvit.triton.tiles import sources

    gpu = launch.device_name(torch.empty(0, device="cpu" if backends.INTERPRETING else "cuda"))
    return [] if gpu is None else sources(gpu)


def report() -> dict[str, Any]:
    """Return everything that ``fastvit env`` prints, ready for JSON.

    Returns:
        ``device``, ``versions`` (None: not installed), ``installed_from``, ``extension`` (the CUDA kernels' binary, or
        why it is ``missing``), ``backend`` (the setting), ``tiles`` (where the kernels' tiles come from on this GPU, in
        order, and tables that are refused; none without a GPU), ``ops`` (for every op and backend None where it can
        run, else the reason) and ``fallbacks``.
    """
    return {
        "device": device(),
        "versions": versions(),
        "installed_from": str(Path(fastvit.__file__).parent),
        "extension": extension(),
        "backend": backends.setting(),
        "tiles": tiles(),
        "ops": backends.availability(),
        "fallbacks": backends.fallbacks(),
    }


def render(found: dict[str, Any]) -> str:
    """Format :func:`report` as text."""
    about = {key: value for key, value in found["device"].items() if value is not None and key not in ("type", "name")}
    lines = [
        f"device      {found['device']['type']}: {found['device']['name']}",
        *[f"            {key.replace('_', ' ')} {value}" for key, value in about.items()],
        "versions    " + ", ".join(f"{name} {v}" for name, v in found["versions"].items() if v is not None),
    ]
    absent = [name for name, v in found["versions"].items() if v is None]
    if absent:
        lines.append(f"            not installed: {', '.join(absent)}")
    built = found["extension"]
    kernels = built.get("missing") or f"{built['file']}: for {built['architectures']}, by CUDA {built['cuda']}"
    lines += [
        f"fastvit     {found['installed_from']}",
        f"extension   {kernels}",
        *([textwrap.indent(f"installed by a {built['built']}", " " * 12)] if "built" in built else []),
        f"backend     {found['backend']} (FASTVIT_BACKEND or fastvit.backend() sets it)",
        *[f"tiles       {source}" for source in found["tiles"]],
        "",
        "op                    available",
    ]
    refusals: dict[tuple[str, str], list[str]] = {}
    for op, reasons in found["ops"].items():
        own = {"onednn": "onednn" if op in backends.ONEDNN_OPS else "onednn (PyTorch's own kernels)"}
        lines.append(f"{op:<21} {', '.join(own.get(name, name) for name, why in reasons.items() if why is None)}")
        for name, reason in reasons.items():
            if reason is not None:
                refusals.setdefault((name, reason), []).append(op)
    if refusals:
        lines += ["", "not available"]
    for (name, reason), ops in refusals.items():
        which = "every op" if len(ops) == len(found["ops"]) else ", ".join(ops)
        lines.append(f"{name:<11} {which}: {reason}")
    lines += [f"fallback    {message}" for message in found["fallbacks"]]
    return "\n".join(lines)
