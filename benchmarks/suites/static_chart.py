"""static.png: what each fusion saves, what is kept for backward beside timm, and the floors of the data sheets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS, OTHER, SAVED, INK, FAINT = "#2a6fdb", "#9aa5b1", "#dbe6f8", "#1f2933", "#616e7c"


def draw(found: dict[str, Any], model: str, batch: int, path: Path) -> None:
    """Draw the contents of static.json for ``model`` at ``batch`` into ``path``, a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, ((block, kept), (whole, floors)) = plt.subplots(
        2, 2, figsize=(14, 8.4), width_ratios=(1.5, 1), height_ratios=(5, 7)
    )
    _waterfall(block, found["waterfall"]["plain"], found["timm_eager"]["plain"])
    _waterfall(whole, found["waterfall"]["model"], found["timm_eager"]["model"])
    _kept(kept, found["saved_bytes_per_image"]["block"])
    _floors(floors, [row for row in found["floors"] if row["model"] == model and row["batch"] == batch])
    titles = {
        block: "One block's forward: bytes moved and launches",
        whole: "The whole model's forward",
        kept: "One block: kept for backward, per image",
        floors: "Upper limit by data sheet, not measured",
    }
    for ax, title in titles.items():
        ax.set_title(title, loc="left", fontsize=11, weight="bold", color=INK)
        ax.invert_yaxis()
        ax.tick_params(length=0, colors=INK, labelsize=9.5)
        ax.tick_params(axis="x", colors=FAINT, labelsize=9)
        ax.xaxis.label.set(fontsize=9, color=FAINT)
        ax.grid(axis="x", color="#e4e7eb", zorder=0)
        for side in ax.spines.values():
            side.set_visible(False)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    figure.suptitle(f"{model}, batch {batch}, bfloat16", x=0.012, ha="left", fontsize=13, weight="bold", color=INK)
    figure.text(
        0.012,
        0.014,
        f"Counted, not timed: every op reads its inputs once and writes its outputs once. {versions}.",
        fontsize=8.5,
        color=FAINT,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 0.98), w_pad=2, h_pad=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _waterfall(ax: Any, steps: list[dict[str, Any]], timm: dict[str, int]) -> None:
    """A bar for each step, and in a light colour what its fusion took away; timm's eager model below."""
    top = before = steps[0]["bytes"] / 1e9
    for y, step in enumerate(steps):
        now = step["bytes"] / 1e9
        ax.barh(y, now, height=0.66, color=OURS, zorder=2)
        ax.barh(y, before - now, left=now, height=0.66, color=SAVED, zorder=2)
        change = f"  ({now - before:+.2f})" if y else ""
        ax.text(before, y, f"  {now:.2f} GB, {step['launches']} launches{change}", va="center", fontsize=9.5, color=INK)
        before = now
    ax.barh(len(steps), timm["bytes"] / 1e9, height=0.66, color=OTHER, zorder=2)
    label = f"  {timm['bytes'] / 1e9:.2f} GB, {timm['launches']} launches"
    ax.text(timm["bytes"] / 1e9, len(steps), label, va="center", fontsize=9.5, color=INK)
    names = [steps[0]["fused"], *(f"+ {step['fused']}" for step in steps[1:]), "timm, eager"]
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(0, top * 1.55)
    ax.set_xticks([tick for tick in ax.get_xticks() if tick <= top])
    ax.set_xlabel("GB")


def _bars(ax: Any, bars: list[tuple[str, float, str, str]], unit: str) -> None:
    """Bars of (label, length, text, colour)."""
    top = max(length for _, length, _, _ in bars)
    for y, (_, length, text, color) in enumerate(bars):
        ax.barh(y, length, height=0.66, color=color, zorder=2)
        ax.text(length, y, f"  {text}", va="center", fontsize=9.5, color=INK)
    ax.set_yticks(range(len(bars)), [label for label, *_ in bars])
    ax.set_xlim(0, top * 1.35)
    ax.set_xticks([tick for tick in ax.get_xticks() if tick <= top])
    ax.set_xlabel(unit)


def _kept(ax: Any, rows: dict[str, dict[str, Any]]) -> None:
    """timm's and our bytes, without and with LayerScale."""
    bars = []
    for name, row in rows.items():
        suffix = "" if name == "plain" else f", {name}"
        bars.append((f"timm{suffix}", row["timm"] / 1e6, f"{row['timm'] / 1e6:.2f} MB", OTHER))
        text = f"{row['fastvit'] / 1e6:.2f} MB, {row['ratio']:.3f}x"
        bars.append((f"fastvit{suffix}", row["fastvit"] / 1e6, text, OURS))
    _bars(ax, bars, "MB")


def _floors(ax: Any, rows: list[dict[str, Any]]) -> None:
    """Images/s that our launches would reach at the data sheet's peaks."""
    bars = [(row["gpu"], row["images_per_s"], f"{row['images_per_s']:,.0f}", OTHER) for row in rows]
    _bars(ax, bars, "images/s")
