"""The look of plots: colours, the frame of a figure, rows of bars, and the files of a figure."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# name: (on white, on the page's dark ground). Told apart by lightness too, and by people who see no red or no green.
COLORS = {
    "ink": ("#1f2933", "#e6eaee"),
    "faint": ("#616e7c", "#9aa7b4"),
    "grid": ("#e4e7eb", "#323b45"),
    "ours": ("#2a6fdb", "#6ea8ff"),
    "gain": ("#dbe6f8", "#274b80"),
    "other": ("#9aa5b1", "#7b8794"),
    "resnet": ("#d9912b", "#e8b15c"),
    "floor": ("#d5dae0", "#47515c"),
    "green": ("#0b8a6a", "#3fc09c"),
    "purple": ("#8e4ec6", "#c08cf0"),
    "red": ("#b42318", "#f07b6f"),
    "sky": ("#3aa5d9", "#7cc8ee"),
}
C = {name: light for name, (light, _) in COLORS.items()}
MARKERS = "osD^vPX*<>ph"
WIDTH = 13.0  # inches
FONT = "DejaVu Sans"  # comes with matplotlib
SIMILAR = f"'{FONT}', Verdana, sans-serif"  # as wide, where a browser has no DejaVu
RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastvit",  # the same file every time
    "font.family": FONT,
    "text.color": C["ink"],
    "axes.labelcolor": C["faint"],
    "axes.labelsize": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": C["ink"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": C["grid"],
    "xtick.color": C["faint"],
    "ytick.color": C["faint"],
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def panels(title: str, small: str, heights: Sequence[float], columns: int) -> tuple[Figure, list[Axes]]:
    """Make a figure with small print below and a panel for each of ``heights`` (inches) in rows of ``columns``."""
    columns = min(columns, len(heights))
    rows = [max(heights[i : i + columns]) for i in range(0, len(heights), columns)]
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.09)
    figure = Figure(figsize=(WIDTH, sum(rows) + 0.75 + 0.15 * small.count("\n")), layout=layout)
    figure.suptitle(title, x=0.008, ha="left", fontsize=13, weight="bold")
    figure.supxlabel(small, x=0.008, ha="left", fontsize=8, color=C["faint"])
    grid = figure.add_gridspec(len(rows), columns, height_ratios=rows)
    return figure, [figure.add_subplot(grid[divmod(i, columns)]) for i in range(len(heights))]


@dataclass(frozen=True)
class Bar:
    """A bar, the text at its end, and a thin line over it."""

    label: str
    value: float | None  # None: no bar, only the text
    text: str
    color: str = "other"
    span: tuple[float, float] | None = None  # the thin line
    lower: float | None = None  # from here on the bar is lighter
    bold: bool = False

    @property
    def light(self) -> str:
        """Return the colour of its lighter part."""
        return "gain" if self.color == "ours" else "floor"


def bars(ax: Axes, rows: Sequence[Bar], label: str) -> None:
    """Draw bars from the left, the first on top."""
    top = max([max(row.value or 0, *(row.span or (0,))) for row in rows] + [1e-12])
    for y, row in enumerate(rows):
        weight = "bold" if row.bold else "normal"
        end = 0.0
        if row.value is not None:
            full = row.value if row.lower is None else row.lower
            ax.barh([y, y], [full, row.value - full], left=[0, full], height=0.68, color=[C[row.color], C[row.light]])
            end = max(row.value, *(row.span or (0,)))
        if row.span is not None:
            ax.plot(row.span, [y, y], color=C["ink"], linewidth=1.2, solid_capstyle="butt")
        color = "ink" if row.value is not None else "red"
        ax.text(end + 0.015 * top, y, row.text, va="center", fontsize=9, color=C[color], weight=weight)
    ax.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=9.5)
    for tick, row in zip(ax.get_yticklabels(), rows, strict=True):
        tick.set_color(C["ours" if row.bold else "ink"])
        tick.set_fontweight("bold" if row.bold else "normal")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, top * 1.42)
    ticks = [tick for tick in MaxNLocator(5).tick_values(0, top) if tick <= top]
    ax.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    ax.set_xlabel(label)
    ax.grid(axis="y", visible=False)


def bar_panels(heading: str, small: str, groups: Sequence[tuple[str, Sequence[Bar], str]], columns: int = 2) -> Figure:
    """Draw a panel of bars for every (title, bars, axis label), the long ones first."""
    groups = sorted(groups, key=lambda group: -len(group[1]))  # neighbours are as high
    lengths = [len(rows) for _, rows, _ in groups]
    figure, axes = panels(heading, small, [0.8 + 0.27 * length for length in lengths], columns)
    for i, (ax, (name, rows, label)) in enumerate(zip(axes, groups, strict=True)):
        bars(ax, rows, label)
        beside = lengths[i - i % columns :][:columns]
        ax.set_ylim(max(beside) - 0.4, -0.6)  # as thick bars as in the panel beside it
        ax.set_title(name)
    return figure


def log_ticks(axis: Axis, form: str) -> None:
    """Set ticks at 1, 2 and 5 times powers of ten on a logarithmic axis, in the format ``form``."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format(value, form)))


@dataclass(frozen=True)
class Plot:
    """A drawn figure as a PNG file and as an SVG element for a page."""

    path: Path  # the PNG
    svg: str
    title: str


def save(figure: Figure, path: Path) -> Plot:
    """Write ``figure`` to ``path``, a PNG. The same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()  # lays it out
    figure.set_layout_engine("none")  # once
    figure.savefig(path, dpi=130)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    title = figure.get_suptitle()
    return Plot(path, _inline(text.getvalue(), f"{path.parent.name}-{path.stem}", title), title)


def _inline(svg: str, name: str, title: str) -> str:
    """Turn an SVG file into an element of a page: no prologue, names of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="|url\(#|href="#', lambda found: f"{found[0]}{name}-", svg)
    svg = svg.replace(f"'{FONT}'", SIMILAR).replace("#ffffff", "none")
    for color, (light, _) in COLORS.items():
        svg = svg.replace(light, f"var(--{color})")
    width, height = (re.search(rf'{side}="([\d.]+)pt"', svg) for side in ("width", "height"))
    assert width is not None and height is not None
    svg = svg.replace(width[0], "", 1).replace(height[0], "", 1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def context() -> Any:
    """Return a context manager that sets the look of the figures drawn inside."""
    return matplotlib.rc_context(RC)
