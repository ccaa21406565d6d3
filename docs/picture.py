"""Draw the picture of the README, docs/overview.png, from benchmarks/results and from nothing else.

Run: python docs/picture.py
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "overview.png"
DEVICE = "amd-epyc-avx512"
CONTENDERS = ("timm", "timm-compile", "fastvit", "fastvit-compile")
COLORS = {"timm": "0.75", "timm-compile": "0.6", "fastvit": "#2f6fb3", "fastvit-compile": "#1d4674"}


def numbers() -> dict[str, dict[str, float]]:
    """Return what the picture shows: panel -> bar -> value."""
    static = json.loads((RESULTS / "static.json").read_text())
    rows = json.loads((RESULTS / DEVICE / "throughput.json").read_text())["measurements"]
    timm, kept = static["timm_eager"]["plain"], static["saved_bytes_per_image"]["block"]["plain"]
    found = {
        "launches of a block": {"timm": timm["launches"], "fastvit": static["launches_per_block"]},
        "GB that a block's forward moves\n(batch 256)": {
            "timm": timm["bytes"] / 1e9,
            "fastvit": static["bytes_per_block"]["forward"]["plain"] / 1e9,
        },
        "MB that a block keeps for backward\n(per image)": {
            "timm": kept["timm"] / 1e6,
            "fastvit": kept["fastvit"] / 1e6,
        },
    }
    for dtype in ("float32", "bfloat16"):
        measured = {
            row["contender"]: row["images_per_s"]
            for row in rows
            if (row["model"], row["size"], row["mode"], row["dtype"], row["status"])
            == ("vit_base_patch16_224", 224, "inference", dtype, "ok")
        }
        found[f"images/s on 2 cores of an\nAMD EPYC, {dtype}"] = {name: measured[name] for name in CONTENDERS}
    return {panel: {name: float(f"{value:.3g}") for name, value in bars.items()} for panel, bars in found.items()}


def draw() -> Figure:
    """Draw one panel of bars for each figure of :func:`numbers`."""
    figure = Figure((10, 2.6), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 5))
    for ax, (title, bars) in zip(axes, numbers().items(), strict=True):
        drawn = ax.bar([name.replace("-", "\n") for name in bars], list(bars.values()), width=0.7,
                       color=[COLORS[name] for name in bars])  # fmt: skip
        ax.bar_label(drawn, fmt="{:.3g}", fontsize=8, padding=1)
        ax.set_title(title, fontsize=8)
        ax.tick_params("x", labelsize=7, length=0)
        ax.set_yticks([])
        ax.margins(y=0.12)
        ax.spines[["top", "left", "right"]].set_visible(False)
    figure.suptitle("ViT-B/16 at 224 pixels. Counted in bfloat16 (left three), measured on a CPU (right two). "
                    "GPUs: not measured yet.", fontsize=9)  # fmt: skip
    return figure


if __name__ == "__main__":
    draw().savefig(PICTURE, dpi=130, metadata={"Description": json.dumps(numbers())})
    print(f"saved {PICTURE}")
