"""Roofline plots: what kernels reach under a device's ceilings, measured; where a block's launches stand, derived."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measurements import Row
from benchmarks.report import style
from benchmarks.report.results import Device, distinct, is_ours
from benchmarks.report.style import C, Plot

OPS = {"attention": "ours", "linear": "resnet", "mlp": "purple", "layer_norm": "green", "patch_embed": "red"}
EXTRAS = {"": "o", "norm": "s", "residual": "^", "gelu": "D"}


def measured(device: Device, heading: str, small: Callable[[str], str]) -> Figure | None:
    """TFLOP/s against FLOPs per byte for every op and contender, a panel for every dtype and direction."""
    rows = [row for row in device.done("kernels") if row["flops"]]
    if not rows:
        return None
    keys = distinct(rows, "dtype", "direction")
    note = (
        "Full: fastvit. Hollow: the others. Lines: the ceilings, measured in the same run. LayerNorm counts no FLOPs."
    )
    figure, axes = style.panels(heading, small(note), [4.2] * len(keys), 2)
    for ax, key in zip(axes, keys, strict=True):
        group = [row for row in rows if (row["dtype"], row["direction"]) == key]
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
    """Colour and marker: an op has a colour, and what it is fused with a marker."""
    base, _, extra = op.partition("+")
    return C[OPS.get(base, "sky")], EXTRAS.get(extra, "P")


def by_data_sheet(static: Mapping[str, Any], folder: Path) -> Plot | None:
    """The GPUs' data-sheet rooflines with the launches of a block at their FLOPs per byte, into ``folder``."""
    launches = [one for one in static.get("work", ()) if one["times"] > 1 and one["flops"]]
    if not launches:
        return None
    with style.context():
        return style.save(_sheets(static["data_sheets"], launches), folder / "roofline.png")


def _sheets(sheets: Sequence[Row], launches: Sequence[Row]) -> Figure:
    small = (
        "Derived from data sheets and from the launches' shapes, not measured: each input is read once, each output "
        "written once. LayerNorm, which counts no FLOPs, is not shown."
    )
    figure, (ax,) = style.panels("Where a block's launches stand under each GPU's roofline (derived)", small, [5.2], 1)
    intensity = [one["flops"] / one["bytes"] for one in launches]
    low, high = min(intensity) / 3, max(intensity) * 1.6
    x = np.geomspace(low, high, 400)
    for sheet in sheets:
        roof = np.minimum(sheet["flops_per_s"], sheet["bytes_per_s"] * x) / 1e12
        ax.plot(x, roof, color=C["faint"], linewidth=1.0)
        points = [min(sheet["flops_per_s"], sheet["bytes_per_s"] * place) / 1e12 for place in intensity]
        ax.scatter(intensity, points, s=22, color=C["ours"], zorder=3)
    _log(ax)
    bottom, top = ax.get_ylim()
    bottom /= 8  # room for the launches' names
    ax.set_ylim(bottom, top)
    ax.set_xlim(low, high)
    ends = [style.log_place(sheet["flops_per_s"] / 1e12, bottom, top) for sheet in sheets]
    for sheet, place in zip(sheets, style.spread_out(ends, 0.043), strict=True):
        text = f" {sheet['gpu']}, {sheet['flops_per_s'] / 1e12:,.0f} TFLOP/s, {sheet['bytes_per_s'] / 1e9:,.0f} GB/s"
        ax.text(1.0, place, text, va="center", fontsize=9, transform=ax.transAxes)
    tops = [style.log_place(place, low, high) for place in intensity]
    for one, place, label in zip(launches, intensity, style.spread_out(tops, 0.024), strict=True):
        ax.axvline(place, color=C["ours"], linewidth=0.7, linestyle=":")
        name = str(one["kernel"]).partition("_")[0]
        text = f"{name}, {one['flops'] / 1e9:,.0f} GFLOP"
        ax.text(label - 0.003, 0.02, text, rotation=90, fontsize=9, color=C["ours"], ha="right", transform=ax.transAxes)
    return figure


def _log(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        style.log_ticks(axis, ",g")
    ax.set_xlabel("FLOPs per byte")
    ax.set_ylabel("TFLOP/s")
