"""The page of all results: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import zip_longest

from benchmarks.measurements import Row
from benchmarks.report import derived, style, tables
from benchmarks.report.results import Device, short_commit
from benchmarks.report.style import Plot
from benchmarks.report.tables import Table
from benchmarks.suites import SUITES

NOT_MEASURED = "Not measured yet."
LONG = 40  # rows; a longer table is folded
LONG_TEXT = 70  # characters; longer text takes several lines

CSS = """
:root { color-scheme: light dark; --ground: #ffffff; --card: #f6f8fa; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ground: #12171d; --card: #1b222a; DARK } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.25; margin: 2.2em 0 .6em }
h1 { margin-top: .5em }
h2 { border-bottom: 1px solid var(--grid); padding-bottom: .3em }
a { color: var(--ours) }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere }
.faint, figcaption { color: var(--faint); font-size: .9rem }
.wide { overflow-x: auto; margin: 1rem 0 }
figure { margin: 1.2rem 0 }
svg { display: block; width: 100%; min-width: 44rem; height: auto }
svg text { white-space: pre }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--grid) }
th { color: var(--faint); font-weight: 600; background: var(--card) }
.left { text-align: left }
th button { all: unset; cursor: pointer }
th button:focus-visible { outline: 2px solid var(--ours) }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
tr.ours td { color: var(--ours); font-weight: 600 }
tr.lost td:last-child { color: var(--red) }
td.text { white-space: normal; min-width: 16rem }
dt { font-weight: 600 }
dd { margin: 0 0 .7rem }
summary { cursor: pointer; color: var(--ours) }
.none { background: var(--card); padding: .8rem 1rem; border-radius: .4rem }
@media print {
  body { max-width: none; font-size: 11px }
  nav { display: none }
  svg { min-width: 0 }
  .wide { overflow: visible }
  h2, h3 { break-after: avoid }
  figure, tr { break-inside: avoid }
  table { font-size: 8px }
  th, td, td.text { padding: 1px 3px; white-space: normal; min-width: 0 }
}
"""

# Sorts a table by the column whose heading is pressed, and unfolds what is folded before printing.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0], i = head.cellIndex
  const up = head.ariaSort !== "ascending"
  const key = row => row.cells[i].textContent.replace(/^± |,(?=\\d{3})|[x%]$/g, "")
  const order = (a, b) => isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) || a.localeCompare(b) : a - b
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort")
  head.ariaSort = up ? "ascending" : "descending"
  body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b))))
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(one => one.open = true))
"""


def render(
    devices: Sequence[Device],
    plots: Mapping[str, Mapping[str, Sequence[Plot]]],
    static: derived.Found | None,
    static_plots: Iterable[Plot],
) -> str:
    """Return the page.

    Args:
        devices: the measured devices.
        plots: of each device's folder, by suite.
        static: the content of static.json, if it is there. static_plots: its plots.
    """
    sections = [(device.folder, device.name) for device in devices]
    if not any(device.is_gpu for device in devices):
        sections.insert(0, ("gpu", "GPU"))
    links = [
        ("where", "Devices and runs"),
        *sections,
        ("static", "Derived and compiled"),
        ("how", "How it is measured"),
    ]
    known = {device.folder: device for device in devices}
    body = [
        "<h1>fastvit: benchmarks</h1>",
        "<p>Every figure here comes from a result file; what no file holds says that it is not measured yet. "
        "Contenders run the same network with the same weights, side by side.</p>",
        "<nav>" + "".join(f'<a href="#{_id(to)}">{escape(name)}</a>' for to, name in links) + "</nav>",
        _heading(2, "where", "Measured devices and runs"),
        _where(devices),
    ]
    for folder, name in sections:
        body.append(_heading(2, folder, name))
        if folder in known:
            body += _device(known[folder], plots.get(folder, {}))
        else:
            body.append(_none("No result from a GPU is there. <code>make gpu</code> on a machine with one makes them."))
    body += [_heading(2, "static", "Derived and compiled, not timed"), *_static(static, static_plots)]
    body += [_heading(2, "how", "How it is measured"), _how()]
    return _document("\n".join(body))


def _document(body: str) -> str:
    css = CSS
    for i, theme in enumerate(("LIGHT", "DARK")):
        css = css.replace(theme, " ".join(f"--{name}: {colors[i]};" for name, colors in style.COLORS.items()))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>fastvit: benchmarks</title>\n'
        f"<style>{css}</style>\n</head>\n<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _id(name: str) -> str:
    return escape(name.replace(" ", "-"))


def _heading(level: int, to: str, text: str) -> str:
    return f'<h{level} id="{_id(to)}">{escape(text)}</h{level}>'


def _none(more: str = "") -> str:
    return f'<p class="none">{NOT_MEASURED} {more}</p>'


def _plots(plots: Iterable[Plot]) -> list[str]:
    return [f'<figure class="wide">{plot.svg}</figure>' for plot in plots]


def _device(device: Device, plots: Mapping[str, Sequence[Plot]]) -> list[str]:
    """Return every suite: its plots and all its rows."""
    parts = [f'<p class="faint">{escape(", ".join(device.settings()))}</p>']
    for suite in SUITES:
        parts.append(_heading(3, f"{device.folder}-{suite.name}", f"{suite.name}: {suite.help}"))
        rows = device.rows(suite.name)
        if not rows:
            parts.append(_none(f"<code>python -m benchmarks {suite.name} --keep</code> measures it."))
            continue
        parts += _plots(plots.get(suite.name, ()))
        parts.append(_rows(rows, suite.columns))
    return parts


def _rows(rows: Sequence[Row], columns: tables.Columns) -> str:
    """Format rows as a table, ours in colour."""
    kinds = [
        "lost" if row["status"] != "ok" else "ours" if str(row["contender"]).startswith("fastvit") else ""
        for row in rows
    ]
    return _table(tables.of_rows(rows, columns), kinds)


def _table(table: Table, kinds: Sequence[str] = ()) -> str:
    """Format a table that can be sorted, with notes below; ``kinds`` are classes of its lines. Fold a long one."""
    texts = [max(map(len, column), default=0) > LONG_TEXT for column in zip(*table.lines, strict=True)]
    classes = ["left text" if long else "left" if left else "" for left, long in zip(table.left, texts, strict=True)]
    to = [f' class="{one}"' if one else "" for one in classes]
    head = "".join(f"<th{c}><button>{escape(name)}</button></th>" for name, c in zip(table.header, to, strict=True))
    body = []
    for line, kind in zip_longest(table.lines, kinds, fillvalue=""):
        cells = "".join(f"<td{c}>{escape(text)}</td>" for text, c in zip(line, to, strict=True))
        body.append(f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>")
    inner, notes = "\n".join(body), "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    shown = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{inner}\n</tbody></table></div>'
    shown += f'<ol class="faint">{notes}</ol>' if notes else ""
    rows = len(table.lines)
    return f"<details><summary>All {rows} rows</summary>{shown}</details>" if rows > LONG else shown


def _where(devices: Sequence[Device]) -> str:
    """Return the table of runs: device, time, commit, command, versions."""
    if not devices:
        return _none()
    lines = []
    for device in devices:
        for suite in SUITES:
            for run, count in device.runs(suite.name):
                about = run["device"]["name"], suite.name, f"{count}", run["started"][:16].replace("T", " ")
                versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
                lines.append([*about, short_commit(run), run["command"], versions])
    header = ("device", "suite", "rows", "started, UTC", "commit", "command", "versions")
    return _table(tables.of_texts("", header, lines))


def _static(static: derived.Found | None, plots: Iterable[Plot]) -> list[str]:
    if static is None:
        return [_none("<code>python -m benchmarks static</code> derives them; it needs no GPU.")]
    parts = [
        '<p class="faint">From shapes, from the compiler and from data sheets: '
        f"{escape(derived.versions(static))}. Nothing here was timed.</p>",
        *_plots(plots),
    ]
    for table in derived.tables(static):
        parts += [f"<h3>{escape(table.title)}</h3>", _table(table)]
    return parts


def _how() -> str:
    """Describe each suite in its own words."""
    items = "".join(f"<dt>{escape(suite.name)}</dt><dd>{escape(suite.description)}</dd>" for suite in SUITES)
    return (
        "<p>Contenders take turns, each in a process of its own, so that drift of clocks and load hits all alike; "
        "rounds start with another one each time. GPUs are timed with CUDA events, CPUs with the wall clock. Every "
        "contender is checked against float64 before it is timed: its error may be twice the baseline's. Images are "
        "crops of photographs, weights are random. The spread is half the distance from the 20th to the 80th "
        f"percentile, relative to the median. Clocks and power limits are left as they are found.</p><dl>{items}</dl>"
    )
