"""What static.json says, as plots and tables: nothing in it was timed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import networks
from benchmarks.report import rooflines, style
from benchmarks.report.style import Plot
from benchmarks.suites import static_chart
from benchmarks.suites.static_counts import BATCH, MODEL

Found = Mapping[str, Any]


class Table(NamedTuple):
    """Text in lines, numbers included."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]


def read(path: Path | None) -> Found | None:
    """The content of a static.json; None where there is none.

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


def plots(static: Found, folder: Path) -> list[Plot]:
    """What each fusion saves, beside timm's eager block; and the block's launches under the data sheets' rooflines."""
    folder.mkdir(parents=True, exist_ok=True)
    title = "Bytes and launches as fusions are added, bytes kept for backward, and floors by data sheet"
    draw = partial(static_chart.draw, dict(static), MODEL, BATCH)
    found = [style.drawn(draw, folder / "fusions.png", title)]
    roofline = rooflines.by_data_sheet(static, folder)
    return found if roofline is None else [*found, roofline]


def versions(static: Found) -> str:
    """By which it was derived and compiled."""
    return ", ".join(f"{name} {version}" for name, version in static["versions"].items())


def block(static: Found) -> Table:
    """The figures that matter, of one block."""
    bytes_, timm = static["bytes_per_block"]["forward"], static["timm_eager"]
    lines = [_compared("launches per block", static["launches_per_block"], timm["plain"]["launches"], "d")]
    what = f"GB moved by a block's forward, batch {BATCH}"
    lines.append(_compared(what, bytes_["plain"] / 1e9, timm["plain"]["bytes"] / 1e9, ".2f"))
    for name, kept in static["saved_bytes_per_image"]["block"].items():
        what = "MB kept by a block for backward, per image" + ("" if name == "plain" else f", with {name}")
        lines.append(_compared(what, kept["fastvit"] / 1e6, kept["timm"] / 1e6, ".2f"))
    return Table(f"{networks.title(MODEL)}, bfloat16", ("", "fastvit", "timm, eager", "ratio"), lines)


def _compared(what: str, ours: float, timms: float, form: str) -> Sequence[str]:
    return what, format(ours, form), format(timms, form), f"{ours / timms:.2f}x"


def compiled(static: Found) -> Table:
    """The compiler's report, architecture by architecture."""
    lines = []
    for target in dict.fromkeys(row["target"] for row in static["kernels"]):
        rows = [row for row in static["kernels"] if row["target"] == target]
        spilling = sum(bool(row["hot"] and row["spill_bytes"]) for row in rows)
        most = [max(row[key] for row in rows) for key in ("registers", "shared_bytes")]
        lines.append((target, str(len(rows)), str(spilling), str(most[0]), f"{most[1] / 1024:.0f}"))
    header = ("target", "configurations", "hot ones that spill", "most registers", "most shared KiB")
    return Table("Kernels, by architecture", header, lines)


def tables(static: Found) -> Iterator[Table]:
    """All of them, in the page's order."""
    yield block(static)
    yield _floors(static)
    yield compiled(static)
    yield _kept(static)
    yield _table6(static)
    kernels = static["kernels"]
    fields = ("name", "target", "registers", "spill_bytes", "shared_bytes", "hot", "constants", "workload")
    yield Table("Every kernel", fields, [[str(row.get(name, "-")) for name in fields] for row in kernels])


def _floors(static: Found) -> Table:
    """Images/s at each GPU's data-sheet peaks, and FLOPs."""
    gpus = list(dict.fromkeys(row["gpu"] for row in static["floors"]))
    at = {(row["model"], row["gpu"]): row["images_per_s"] for row in static["floors"] if row["batch"] == BATCH}
    lines = []
    for model, counts in static["flops_per_image"].items():
        speeds = [f"{at[model, gpu]:,.0f}" for gpu in gpus]
        lines.append([networks.title(model), *speeds, f"{counts['forward'] / 1e9:.1f}"])
    title = f"Images/s if every launch ran at the data sheet's peaks, batch {BATCH}, bfloat16; and GFLOPs per image"
    return Table(title, ["", *gpus, "GFLOPs"], lines)


def _kept(static: Found) -> Table:
    """Bytes kept for backward by whole models."""
    kept = static["saved_bytes_per_image"]["model"]
    lines = [
        _compared(networks.title(model), row["fastvit"] / 1e6, row["timm"] / 1e6, ".1f") for model, row in kept.items()
    ]
    return Table("MB kept for backward per image, whole models", ("", "fastvit", "timm, eager", "ratio"), lines)


def _table6(static: Found) -> Table:
    lines = [
        (
            row["model"],
            str(row["epochs"]),
            f"{row['exaflops']:,.0f}",
            f"{row['paper_exaflops']:,}",
            f"{100 * row['deviation']:+.1f}%",
        )
        for row in static["table6"]
    ]
    title = "Table 6 of the ViT paper: exaFLOPs of pre-training, counted here and as printed there (its unit differs)"
    return Table(title, ("model", "epochs", "counted", "paper", "deviation, unit fitted"), lines)
