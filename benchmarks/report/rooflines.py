"""Roofline plots: kernels under a device's measured ceilings, and a block's launches under data sheets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import style
from benchmarks.report.results import Device, grouped, is_ours
from benchmarks.report.style import MARKERS, C

OPS = {"attention": "ours", "linear": "resnet", "mlp": "purple", "layer_norm": "green", "patch_embed": "red"}
EXTRAS = {"": "o", "norm": "s", "residual": "^", "gelu": "D"}


def measured(device: Device, heading: str, small: Callable[[str], str]) -> Figure | None:
    """Draw TFLOP/s against FLOPs per byte of every op and contender, a panel for each dtype and direction."""
    rows = [row for row in device.done("kernels") if row["flops"]]
    if not rows:
        return None
    keys = grouped(rows, "dtype", "direction")
    note = (
        "Full: fastvit. Hollow: the others. Lines: the ceilings, measured in the same run. LayerNorm counts no FLOPs."
    )
    figure, axes = style.panels(heading, small(note), [4.2] * len(keys), 2)
    for ax, (key, group) in zip(axes, keys, strict=True):
        peak, bandwidth = (max(row[name] for row in group) for name in ("peak_tflops_per_s", "copy_gb_per_s"))
        intensity = [row["flops"] / row["bytes"] for row in group]
        x = np.geomspace(min(intensity) / 2, max(*intensity, 1e3 * peak / bandwidth) * 2, 200)
        ax.plot(x, np.minimum(peak, bandwidth * x / 1e3), color=C["ink"], linewidth=1.3)
        for row, place in zip(group, intensity, strict=True):
            color, marker = _look(row["op"])
            face = color if is_ours(row) else "none"
            ax.scatter(place, row["tflops_per_s"], 34, marker=marker, edgecolors=color, facecolors=face, zorder=3)
        for op in dict.fromkeys(row["op"] for row in group):
            color, marker = _look(op)
            ax.scatter([], [], 34, color=color, marker=marker, label=op)
        ax.legend(loc="best")
        _log(ax)
        ax.set_title(f"{key[0]}, {key[1]}: at most {peak:.3g} TFLOP/s and {bandwidth:,.0f} GB/s")
    return figure


def _look(op: str) -> tuple[str, str]:
    """Return (colour, marker): the op decides the colour, and its fusion the marker."""
    base, _, extra = op.partition("+")
    return C[OPS.get(base, "sky")], EXTRAS.get(extra, "P")


def by_data_sheet(static: Mapping[str, Any]) -> Figure | None:
    """Draw the GPUs' data-sheet rooflines with a block's launches at their FLOPs per byte; None without launches."""
    launches = [one for one in static.get("work", ()) if one["times"] > 1 and one["flops"]]
    if not launches:
        return None
    small = (
        "Derived from data sheets and from the launches' shapes, not measured: each input is read once, each output "
        "written once. LayerNorm, which counts no FLOPs, is not shown."
    )
    figure, (ax,) = style.panels("Where a block's launches stand under each GPU's roofline (derived)", small, [5.2], 1)
    intensity = np.array([one["flops"] / one["bytes"] for one in launches])
    x = np.geomspace(intensity.min() / 3, intensity.max() * 1.6, 400)
    colors = ("ours", "red", "resnet", "green", "purple", "sky", "faint", "ink")
    sheets = sorted(static["data_sheets"], key=lambda sheet: -sheet["flops_per_s"])
    for sheet, color in zip(sheets, cycle(colors), strict=False):
        flops, bandwidth = sheet["flops_per_s"] / 1e12, sheet["bytes_per_s"] / 1e12
        label = f"{sheet['gpu']}, {flops:,.0f} TFLOP/s, {1e3 * bandwidth:,.0f} GB/s"
        ax.plot(x, np.minimum(flops, bandwidth * x), color=C[color], linewidth=1.3, label=label)
        for place, marker in zip(intensity, MARKERS, strict=False):
            ax.scatter(place, min(flops, bandwidth * place), 34, color=C[color], marker=marker, zorder=3)
    for one, marker in zip(launches, MARKERS, strict=False):
        label = f"{str(one['kernel']).partition('_')[0]}, {one['flops'] / 1e9:,.0f} GFLOP"
        ax.scatter([], [], 34, color=C["ink"], marker=marker, label=label)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _log(ax)
    return figure


def _log(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        style.log_ticks(axis, ",g")
    ax.set_xlabel("FLOPs per byte")
    ax.set_ylabel("TFLOP/s")
