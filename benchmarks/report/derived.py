"""static.json as plots and tables: nothing in it was timed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import networks
from benchmarks.report import rooflines, style
from benchmarks.report.style import Bar, Plot
from benchmarks.report.tables import Table, of_texts
from benchmarks.suites.static_counts import BATCH, MODEL

Found = Mapping[str, Any]


def read(path: Path | None) -> Found | None:
    """Return the content of a static.json; None where there is none.

    Raises:
        ValueError: the file is something else.
    """
    if path is None or not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no static.json: {error}") from error
    if not isinstance(found, dict) or "launches_per_block" not in found:
        raise ValueError(f"{path} is no static.json: it has no launches_per_block")
    return found


# --- plots ------------------------------------------------------------------------------------------------------


def plots(static: Found, folder: Path) -> list[Plot]:
    """Draw what each fusion saves, beside timm's eager block; and launches under the data sheets' rooflines."""
    with style.context():
        figures = {"fusions": fusions(static), "roofline": rooflines.by_data_sheet(static)}
        return [style.save(figure, folder / f"{name}.png") for name, figure in figures.items() if figure is not None]


def fusions(static: Found) -> Figure:
    """Draw bytes and launches as fusions are added, bytes kept for backward beside timm's, and data-sheet floors."""
    kept = [
        Bar(
            name if scale == "plain" else f"{name}, {scale}", row[name] / 1e6, f"{row[name] / 1e6:.2f} MB{ratio}", color
        )
        for scale, row in static["saved_bytes_per_image"]["block"].items()
        for name, color, ratio in (("timm", "other", ""), ("fastvit", "ours", f", {row['ratio']:.3f}x"))
    ]
    speeds = [
        Bar(row["gpu"], row["images_per_s"], f"{row['images_per_s']:,.0f}", "other")
        for row in static["floors"]
        if row["model"] == MODEL and row["batch"] == BATCH
    ]
    return style.bar_panels(
        f"{MODEL}, batch {BATCH}, bfloat16",
        f"Counted, not timed: every op reads its inputs once and writes its outputs once. {versions(static)}.",
        [
            ("The model's forward: bytes, launches", _waterfall(static, "model"), "GB"),
            ("Upper limit by data sheet, not measured", speeds, "images/s"),
            ("One block's forward: bytes, launches", _waterfall(static, "plain"), "GB"),
            ("One block: kept for backward, per image", kept, "MB"),
        ],
    )


def _waterfall(static: Found, kind: str) -> list[Bar]:
    """Make a bar for each step, its saving in a light colour, and one for timm's eager model."""
    bars: list[Bar] = []
    steps, before = static["waterfall"][kind], 0.0
    for step in steps:
        now = step["bytes"] / 1e9
        change = f" ({now - before:+.2f})" if bars else ""
        label = f"+ {step['fused']}" if bars else step["fused"]
        text = f"{now:.2f} GB, {step['launches']} launches{change}"
        bars.append(Bar(label, max(before, now), text, "ours", lower=now))
        before = now
    timm = static["timm_eager"][kind]
    text = f"{timm['bytes'] / 1e9:.2f} GB, {timm['launches']} launches"
    return [*bars, Bar("timm, eager", timm["bytes"] / 1e9, text, "other")]


# --- tables -----------------------------------------------------------------------------------------------------


def versions(static: Found) -> str:
    """Return the versions that counted and compiled."""
    return ", ".join(f"{name} {version}" for name, version in static["versions"].items())


def block(static: Found) -> Table:
    """Return one block's figures beside timm's."""
    moved, timm = static["bytes_per_block"]["forward"], static["timm_eager"]
    lines = [_compared("launches per block", static["launches_per_block"], timm["plain"]["launches"], "d")]
    label = f"GB moved by a block's forward, batch {BATCH}"
    lines.append(_compared(label, moved["plain"] / 1e9, timm["plain"]["bytes"] / 1e9, ".2f"))
    for name, kept in static["saved_bytes_per_image"]["block"].items():
        label = "MB kept by a block for backward, per image" + ("" if name == "plain" else f", with {name}")
        lines.append(_compared(label, kept["fastvit"] / 1e6, kept["timm"] / 1e6, ".2f"))
    return of_texts(f"{networks.title(MODEL)}, bfloat16", ("", "fastvit", "timm, eager", "ratio"), lines)


def _compared(label: str, ours: float, timms: float, form: str) -> Sequence[str]:
    return label, format(ours, form), format(timms, form), f"{ours / timms:.2f}x"


def compiled(static: Found) -> Table:
    """Return the compiler's report, architecture by architecture."""
    lines = []
    for target in dict.fromkeys(row["target"] for row in static["kernels"]):
        rows = [row for row in static["kernels"] if row["target"] == target]
        spilling = sum(bool(row["hot"] and row["spill_bytes"]) for row in rows)
        most = [max(row[key] for row in rows) for key in ("registers", "shared_bytes")]
        lines.append((target, str(len(rows)), str(spilling), str(most[0]), f"{most[1] / 1024:.0f}"))
    header = ("target", "configurations", "hot ones that spill", "most registers", "most shared KiB")
    return of_texts("Kernels, by architecture", header, lines)


def summary(static: Found) -> Iterator[Table]:
    """Return the tables for a terminal."""
    yield block(static)
    gpus = list(dict.fromkeys(row["gpu"] for row in static["floors"]))
    at = {(row["model"], row["gpu"]): row["images_per_s"] for row in static["floors"] if row["batch"] == BATCH}
    lines = [
        [networks.title(model), *(f"{at[model, gpu]:,.0f}" for gpu in gpus), f"{counts['forward'] / 1e9:.1f}"]
        for model, counts in static["flops_per_image"].items()
    ]
    title = f"Images/s if every launch ran at the data sheet's peaks, batch {BATCH}, bfloat16; and GFLOPs per image"
    yield of_texts(title, ["", *gpus, "GFLOPs"], lines)
    yield compiled(static)
    lines = [
        [
            row["model"],
            str(row["epochs"]),
            f"{row['exaflops']:,.0f}",
            f"{row['paper_exaflops']:,}",
            f"{100 * row['deviation']:+.1f}%",
        ]
        for row in static["table6"]
    ]
    title = "Table 6 of the ViT paper: exaFLOPs of pre-training, counted here and as printed there (its unit differs)"
    yield of_texts(title, ("model", "epochs", "counted", "paper", "deviation, unit fitted"), lines)


def tables(static: Found) -> Iterator[Table]:
    """Return all tables in the page's order."""
    yield from summary(static)
    kept = static["saved_bytes_per_image"]["model"].items()
    lines = [_compared(networks.title(name), row["fastvit"] / 1e6, row["timm"] / 1e6, ".1f") for name, row in kept]
    yield of_texts("MB kept for backward per image, whole models", ("", "fastvit", "timm, eager", "ratio"), lines)
    fields = ("name", "target", "registers", "spill_bytes", "shared_bytes", "hot", "constants", "workload")
    yield of_texts("Every kernel", fields, [[str(row.get(name, "-")) for name in fields] for row in static["kernels"]])
