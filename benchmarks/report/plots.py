"""A figure for every suite of a device. Each function gives None where there is nothing to draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from math import inf
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from benchmarks import networks
from benchmarks.measurements import Row
from benchmarks.report import rooflines, style, tables
from benchmarks.report.results import Device, distinct, grouped, is_floor, is_ours, title, usual_size
from benchmarks.report.style import MARKERS, Bar, C, Plot


def draw(device: Device, folder: Path) -> dict[str, list[Plot]]:
    """Draw every figure of the device into ``folder``; return the plots by suite."""
    found: dict[str, list[Plot]] = {}
    with style.context():
        for suite, name, function in FIGURES:
            figure = function(device)
            if figure is not None:
                found.setdefault(suite, []).append(style.save(figure, folder / f"{name}.png"))
    return found


def _where(device: Device) -> str:
    return device.name if device.is_gpu else f"{device.name}, threads: {device.about['threads']}"


def _small(device: Device, suite: str, more: str) -> str:
    return "\n".join([more, ", ".join(device.settings()), device.origin(suite)])


def _color(row: Row) -> str:
    if is_ours(row):
        return "ours"
    if is_floor(row):
        return "floor"
    return "other" if networks.family(row["model"]) == "vit" else "resnet"


def _batches(rows: Sequence[Row]) -> str:
    """Return the measured batches for a panel's title."""
    found = sorted({row["batch"] for row in rows if row["status"] == "ok"})
    return f", batch {' or '.join(map(str, found))}" if found else ""


def _fastest_first(rows: Sequence[Row], field: str, sign: int) -> list[Row]:
    """Sort by ``field`` (``sign`` -1: most first), the floor and rows without a result last."""
    return sorted(rows, key=lambda row: (is_floor(row), inf if row.get(field) is None else sign * row[field]))


def _size(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the one image size that is shown."""
    size = usual_size(rows)
    return [row for row in rows if row["size"] == size]


# --- Figure 11 of the ViT paper ---------------------------------------------------------------------------------


def figure_11(device: Device) -> Figure | None:
    """Draw images/s and the largest batch that fits against image size, where several sizes were measured."""
    parts = [("throughput", "images_per_s", "images/s"), ("memory", "largest_batch", "largest batch that fits, images")]
    shown = []
    for suite, field, label in parts:
        rows = [row for row in device.done(suite, mode="inference") if not is_floor(row) and row.get(field)]
        sizes = Counter(dtype for dtype, _ in distinct(rows, "dtype", "size"))
        dtype = max(sizes, key=lambda dtype: (sizes[dtype], dtype == "bfloat16"), default=None)  # of most sizes
        rows = [row for row in rows if row["dtype"] == dtype]
        if len({row["size"] for row in rows}) > 1:
            shown.append((suite, rows, field, f"{label}, {dtype}"))
    if not shown:
        return None
    small = _small(
        device,
        shown[0][0],
        "Solid: fastvit's best, and any contender's best of a ResNet. Dashed: the other libraries' best of that ViT.",
    )
    figure, axes = style.panels(
        f"The ViT paper's Figure 11, replayed for inference: {_where(device)}", small, [5.4] * len(shown), 2
    )
    for ax, (_, rows, field, label) in zip(axes, shown, strict=True):
        _by_size(ax, rows, field)
        ax.set_title(label)
    return figure


def _lines(rows: Sequence[Row], field: str) -> Iterator[tuple[str, str, str, list[tuple[int, float]]]]:
    """Yield (label, family, line style, points) of every line."""
    for (model,), mine in grouped(rows, "model"):
        family = "vit" if networks.family(model) == "vit" else "resnet"
        if family == "resnet":
            sides = [("-", mine)]
        else:
            sides = [("-", [row for row in mine if is_ours(row)]), ("--", [row for row in mine if not is_ours(row)])]
        for dash, group in sides:
            best = [
                (size, max(row[field] for row in group if row["size"] == size))
                for size in sorted({row["size"] for row in group})
            ]
            if best:
                yield title(mine[0]), family, dash, best


def _by_size(ax: Axes, rows: Sequence[Row], field: str) -> None:
    """Draw lines over image size, both axes logarithmic."""
    markers = dict(zip(dict.fromkeys(title(row) for row in rows), cycle(MARKERS), strict=False))
    for label, family, dash, points in _lines(rows, field):
        color = C["resnet" if family == "resnet" else "ours" if dash == "-" else "faint"]
        width, name = (1.6, label) if dash == "-" else (1.0, f"{label}, others")
        look: dict[str, Any] = {"color": color, "marker": markers[label], "linewidth": width, "label": name}
        ax.plot(*zip(*points, strict=True), dash, markersize=5, **look)
    ax.set_xscale("log")
    ax.set_yscale("log")
    sizes = sorted({row["size"] for row in rows})
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.xaxis.set_minor_locator(NullLocator())
    style.log_ticks(ax.yaxis, ",g")
    ax.set_xlabel("image size, pixels")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


# --- bars ---------------------------------------------------------------------------------------------------------


def _by_contender(
    device: Device,
    suite: str,
    rows: Sequence[Row],
    panel: tuple[str, ...],
    order: tuple[str, int],
    label: str,
    bar: Callable[[Row], Bar],
    heading: str,
    small: str,
) -> Figure | None:
    """Draw a bar of each contender at the usual image size, in a panel for each value of the fields ``panel``."""
    if not any(row["status"] == "ok" for row in rows):
        return None
    rows, groups = _size(rows), []
    models = list(dict.fromkeys(row["model"] for row in rows))
    for key, group in sorted(grouped(rows, *panel), key=lambda one: models.index(one[0][0])):
        bars = [
            bar(row) if row["status"] == "ok" else Bar(str(row["contender"]), None, str(row["status"]))
            for row in _fastest_first(group, *order)
        ]
        batch = f", batch {key[-1]}" if panel[-1] == "batch" else _batches(group)
        words = [value for value in key[1:] if isinstance(value, str)]
        groups.append((", ".join([title(group[0]), *words]) + batch, bars, label))
    heading = f"{heading} at {rows[0]['size']} pixels: {_where(device)}"
    return style.bar_panels(heading, _small(device, suite, small), groups)


def throughput(device: Device, mode: str) -> Figure | None:
    """Draw images/s of all contenders."""

    def bar(row: Row) -> Bar:
        speed = row["batch"] / row["median_s"]
        ratio = f"   {row['ratio']:.2f}x" if "ratio" in row and not is_floor(row) else ""
        span = row["batch"] / row["p80_s"], row["batch"] / row["p20_s"]
        number = tables.FORMS["images_per_s"](speed)
        return Bar(row["contender"], speed, number + ratio, _color(row), span, bold=is_ours(row))

    rows, heading = device.rows("throughput", mode=mode), f"{mode.capitalize()} throughput"
    small = (
        "Thin lines: 20th to 80th percentile. Blue: fastvit; times: timm's (of a ResNet, torchvision's) eager speed."
    )
    order = "images_per_s", -1
    return _by_contender(device, "throughput", rows, ("model", "dtype"), order, "images/s", bar, heading, small)


def latency(device: Device) -> Figure | None:
    """Draw milliseconds of all contenders."""

    def bar(row: Row) -> Bar:
        median, high = 1e3 * row["median_s"], 1e3 * (row["p99_s"] or row["p80_s"])
        p99 = "" if row["p99_s"] is None else f" (p99 {tables.text(row, 'p99_s')})"
        text = f"{tables.text(row, 'median_s')} ms{p99}"
        return Bar(row["contender"], median, text, _color(row), (median, max(high, median)), bold=is_ours(row))

    panel, order, rows = ("model", "dtype", "batch"), ("median_s", 1), device.rows("latency")
    small = "Bars: median. Thin lines: to the 99th percentile, or to the 80th where there are fewer than 100 timings."
    return _by_contender(device, "latency", rows, panel, order, "milliseconds", bar, "Latency", small)


def memory(device: Device) -> Figure | None:
    """Draw peak memory and its part of weights, with the largest batch that fits."""

    def bar(row: Row) -> Bar:
        if row["peak_bytes"] is None:
            return Bar(str(row["contender"]), None, "not seen from outside")
        peak, weights = row["peak_bytes"] / 2**20, row["weights_bytes"] / 2**20
        text = f"{peak:,.0f} MiB" + (f", fits {row['largest_batch']:,}" if row["largest_batch"] is not None else "")
        return Bar(row["contender"], peak, text, _color(row), lower=weights, bold=is_ours(row))

    panel, order, rows = ("model", "mode", "dtype", "batch"), ("peak_bytes", 1), device.rows("memory")
    limits = dict.fromkeys(f"{row['limit_bytes'] / 2**30:.3g}" for row in device.done("memory"))
    small = f"Full colour: weights. fits: the largest batch that fits in {' or '.join(limits)} GiB."
    return _by_contender(device, "memory", rows, panel, order, "MiB", bar, "Peak memory", small)


def waterfall(device: Device) -> Figure | None:
    """Draw the gain of each step, one after the other."""
    rows = device.rows("waterfall")
    if not rows:
        return None
    groups = []
    for key, steps in grouped(rows, "model", "size", "dtype"):
        bars, before = [], inf
        for row in steps:
            name = row["contender"] if row is steps[0] else f"+ {row['contender']}"
            if row["status"] != "ok":
                bars.append(Bar(name, None, row["status"]))
                continue
            speed = row["images_per_s"]
            text = f"{tables.FORMS['images_per_s'](speed)}   {row['ratio']:.2f}x"
            bars.append(Bar(name, speed, text, "ours", lower=min(before, speed)))
            before = speed
        groups.append((f"{title(steps[0])}, {key[1]} px, {key[2]}{_batches(steps)}", bars, "images/s"))
    heading = f"What each fusion brings, one after the other: {_where(device)}"
    small = "Light: what the step added. Times: the first step's speed."
    return style.bar_panels(heading, _small(device, "waterfall", small), groups)


# --- lines --------------------------------------------------------------------------------------------------------


def kernels(device: Device) -> Figure | None:
    """Draw the kernels under the ceilings."""
    return rooflines.measured(device, f"Roofline of the kernels: {_where(device)}", partial(_small, device, "kernels"))


def accuracy(device: Device) -> Figure | None:
    """Draw the error after every block, for each backend."""
    rows = [row for row in device.done("accuracy") if row.get("block_errors")]
    if not rows:
        return None
    rows = _size(rows)
    keys = grouped(rows, "model", "dtype")
    heading = f"Error by depth at {rows[0]['size']} pixels, inference: {_where(device)}"
    small = "Largest error after a block against float64, relative to the block's largest value. Lines may coincide."
    columns = min(3, len({row["dtype"] for row in rows}))
    figure, axes = style.panels(heading, _small(device, "accuracy", small), [3.4] * len(keys), columns)
    looks = _looks(dict.fromkeys(row["contender"] for row in rows))
    for ax, (key, group) in zip(axes, keys, strict=True):
        for row in group:
            errors = row["block_errors"]
            ax.plot(range(1, len(errors) + 1), errors, label=row["contender"], **looks[row["contender"]])
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        if high / low < 30:  # a flat curve is to look flat; and the legend has room above it
            ax.set_ylim(low / 3, high * 8)
        style.log_ticks(ax.yaxis, ".0e")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("block")
        ax.set_title(f"{title(group[0])}, {key[1]}")
        ax.legend(loc="upper left", ncols=2)
    return figure


def _looks(contenders: Sequence[str] | dict[str, None]) -> dict[str, dict[str, Any]]:
    """Return the look of each line; later ones are thinner, so that lines which coincide are all seen."""
    colors = cycle(("other", "sky", "ours", "purple", "green", "resnet"))
    dashes = cycle(("-", "-", "--", ":", "-."))
    widths = [4.5 - 3.2 * i / max(len(contenders) - 1, 1) for i in range(len(contenders))]
    return {
        name: {"color": C[color], "linestyle": dash, "linewidth": width, "marker": marker, "markersize": 3.5}
        for name, color, dash, width, marker in zip(contenders, colors, dashes, widths, cycle(MARKERS), strict=False)
    }


FIGURES: tuple[tuple[str, str, Callable[[Device], Figure | None]], ...] = (  # suite, file name, function
    ("throughput", "figure11", figure_11),
    ("throughput", "throughput-inference", partial(throughput, mode="inference")),
    ("throughput", "throughput-training", partial(throughput, mode="training")),
    ("latency", "latency", latency),
    ("memory", "memory", memory),
    ("kernels", "roofline", kernels),
    ("waterfall", "waterfall", waterfall),
    ("accuracy", "accuracy", accuracy),
)
