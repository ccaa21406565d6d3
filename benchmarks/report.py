"""What a comparison leaves behind: a table on the terminal, JSON and a chart."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvit import env

ROOT = Path(__file__).resolve().parent.parent
OURS = "fastvit"


def commit() -> str | None:
    """The commit that was measured, with ``-dirty`` where files differ from it; None outside a clone."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def document(command: str, model: str, device: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of throughput.json."""
    return {
        "device": env.device(device),
        "versions": env.versions(),
        "commit": commit(),
        "command": command,
        "model": model,
        "rows": rows,
    }


def columns(row: dict[str, Any]) -> list[str]:
    """One row's cells: name, backend, dtype, batch, images/s, spread, ratio, memory, difference."""

    def cell(key: str, form: str, scale: float = 1.0) -> str:
        return "-" if row[key] is None else format(row[key] * scale, form)

    return [
        row["name"],
        row["backend"],
        row["dtype"],
        str(row["batch"]),
        cell("images_per_s", ".2f" if (row["images_per_s"] or 0) < 100 else ",.0f"),
        "-" if row["spread"] is None else f"± {50 * row['spread']:.0f}%",
        cell("ratio_to_timm", ".2f"),
        cell("peak_memory_bytes", ",.0f", 2**-20),
        cell("max_abs_logit_diff", ".1e"),
    ]


HEADER = ["model", "backend", "dtype", "batch", "images/s", "spread", "x timm", "peak MiB", "logit diff"]
TEXT_COLUMNS = 3  # these are set to the left, numbers to the right


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal; a failed row is followed by its reason."""
    body = [columns(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(HEADER, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        set_out = [
            cell.ljust(width) if i < TEXT_COLUMNS else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(set_out).rstrip()

    lines = [line(HEADER), line(["-" * width for width in widths])]
    for previous, row, cells in zip([None, *rows], rows, body, strict=False):
        if previous is not None and previous["dtype"] != row["dtype"]:
            lines.append("")
        lines.append(line(cells))
        if row["error"] is not None:
            lines.append(f"  failed: {row['error']}")
    return "\n".join(lines)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows for README.md."""
    rule = [":--" if i < TEXT_COLUMNS else "--:" for i in range(len(HEADER))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [HEADER, rule, *map(columns, rows)])


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of images/s, one panel per dtype, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    ours, peers, other, ink, faint = "#2a6fdb", "#9aa5b1", "#d9b26f", "#1f2933", "#616e7c"
    rows = result["rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    height = 1.7 + 0.42 * max(sum(row["dtype"] == dtype for row in rows) for dtype in dtypes)
    figure, axes = plt.subplots(1, len(dtypes), figsize=(6.4 * len(dtypes), height), squeeze=False)
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        panel = [row for row in rows if row["dtype"] == dtype]
        # ViTs first, the fastest on top; the other network last.
        panel.sort(key=lambda row: (row["name"].startswith("ResNet"), -(row["images_per_s"] or 0)))
        top = max([row["images_per_s_p20_p80"][1] for row in panel if row["images_per_s"]] + [1e-9])
        for y, row in enumerate(panel):
            speed = row["images_per_s"]
            weight = "bold" if row["name"] == OURS else "normal"
            if speed is None:
                ax.text(0.01 * top, y, f"failed: {row['error']}"[:60], va="center", fontsize=8, color="#b42318")
                continue
            color = ours if row["name"] == OURS else other if row["name"].startswith("ResNet") else peers
            slow, fast = row["images_per_s_p20_p80"]
            ax.barh(y, speed, height=0.68, color=color, zorder=2)
            ax.plot([slow, fast], [y, y], color=ink, linewidth=1.2, zorder=3, solid_capstyle="butt")
            ratio = "" if row["ratio_to_timm"] is None else f"   {row['ratio_to_timm']:.2f}x"
            number = f"{speed:.2f}" if speed < 100 else f"{speed:,.0f}"
            ax.text(
                max(speed, fast) + 0.015 * top, y, number + ratio, va="center", fontsize=9.5, color=ink, weight=weight
            )
        ax.tick_params(length=0, colors=ink)
        ax.tick_params(axis="x", labelsize=9, colors=faint)
        ax.set_yticks(range(len(panel)), [f"{row['name']}  ({row['backend']})" for row in panel], fontsize=10)
        for label, row in zip(ax.get_yticklabels(), panel, strict=True):
            label.set_color(ours if row["name"] == OURS else ink)
            label.set_weight("bold" if row["name"] == OURS else "normal")
        ax.invert_yaxis()
        ax.set_xlim(0, top * 1.32)
        ax.set_title(dtype, loc="left", fontsize=11, color=ink, weight="bold")
        ax.set_xlabel("images/s, and how many times timm's", fontsize=9, color=faint)
        ax.grid(axis="x", color="#e4e7eb", zorder=0)
        for side in ax.spines.values():
            side.set_visible(False)
    device, versions = result["device"], result["versions"]
    threads = f", threads: {device['threads']}" if "threads" in device else ""
    batches = ", ".join(str(batch) for batch in dict.fromkeys(row["batch"] for row in rows))
    figure.suptitle(
        f"Inference throughput, {result['model']}, batch {batches}: {device['name']}{threads}",
        x=0.012,
        ha="left",
        fontsize=13,
        weight="bold",
        color=ink,
    )
    figure.text(
        0.012,
        0.012,
        f"torch {versions['torch']}, timm {versions['timm']}, torchvision {versions['torchvision']}, "
        f"transformers {versions['transformers']}; commit {(result['commit'] or 'unknown')[:12]}. "
        "Thin lines: 20th to 80th percentile.",
        fontsize=8,
        color=faint,
    )
    figure.tight_layout(rect=(0, 0.035, 1, 0.97), w_pad=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write throughput.json and throughput.png into ``folder`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "throughput.json", folder / "throughput.png"]
    paths[0].write_text(json.dumps(result, indent=2) + "\n")
    draw(result, paths[1])
    return paths
