"""Results as tables, plots, README.md's part and the page. Nothing here measures.

Functions import the modules that draw: other commands need only :mod:`benchmarks.report.tables`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measurements import RESULTS, ROOT, load

STATIC = RESULTS / "static.json"  # what `python -m benchmarks static --out benchmarks/results` writes
README = ROOT / "README.md"
OUT = Path("bench-out/report")  # where the command writes by default


def write(results: Path, static_path: Path | None, out: Path, readme: Path | None) -> list[Path]:
    """Draw every plot, make the page, and bring README.md's part up to date.

    Args:
        results: the folder that has a folder for every device, with SUITE.json in it; or one of these.
        static_path: static.json; None, or a path where there is none: page and README say "not measured yet".
        out: gets the page, index.html, and the plots, DEVICE/PLOT.png and static/PLOT.png.
        readme: a file with the marks of :mod:`benchmarks.report.readme`; None: no README is touched.

    Returns:
        The written files, the page first.

    Raises:
        ValueError: a file is no result file, or the README has no marks.
    """
    from benchmarks.report import derived, page, plots
    from benchmarks.report import readme as part
    from benchmarks.report.results import read

    devices, found = read(results), derived.read(static_path)
    text = part.updated(readme.read_text(), part.render(devices, found)) if readme else ""
    drawn = {device.folder: plots.draw(device, out / device.folder) for device in devices}
    static_plots = derived.plots(found, out / "static") if found else []
    index = out / "index.html"
    out.mkdir(parents=True, exist_ok=True)
    index.write_text(page.render(devices, drawn, found, static_plots))
    if readme:
        readme.write_text(text)
    pictures = [plot.path for by_suite in drawn.values() for some in by_suite.values() for plot in some]
    return [index, *pictures, *(plot.path for plot in static_plots), *([readme] if readme else [])]


def draw(path: Path) -> list[Path]:
    """Draw the plots of one result file, SUITE.json, beside it, and return their paths.

    Raises:
        ValueError: it is no result file.
    """
    from benchmarks.report import plots
    from benchmarks.report.results import Device

    device = Device(path.parent.name, {path.stem: load(path)})
    return [plot.path for some in plots.draw(device, path.parent).values() for plot in some]


def static(found: dict[str, Any], path: Path) -> str:
    """Draw static.png of the content of a static.json into ``path``, and return its tables for a terminal."""
    from benchmarks.report import derived, style, tables

    with style.context():
        style.save(derived.fusions(found), path)
    return "\n\n".join(map(tables.terminal, derived.summary(found))) + "\n"


def is_current(results: Path, static_path: Path | None, readme: Path) -> bool:
    """Return whether README.md's part is what :func:`write` would write; arguments and errors are its."""
    from benchmarks.report import derived
    from benchmarks.report import readme as part
    from benchmarks.report.results import read

    text = readme.read_text()
    return part.updated(text, part.render(read(results), derived.read(static_path))) == text
