"""Results as tables of text: on a terminal and in Markdown. (:mod:`benchmarks.report.page` has them in HTML.)"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.measurements import Row

Columns = Sequence[tuple[str, str | Callable[[Row], str]]]
NUMBER = re.compile(r"[+-]?[\d,]*\.?\d+[x%]?|-")

# The format of a field, by its whole name or by the end of its name.
FORMS: dict[str, Callable[[float], str]] = {
    "_bytes": lambda value: f"{value / 2**20:,.0f}",
    "_per_s": lambda value: f"{value:.3g}" if value < 1000 else f"{value:,.0f}",
    "_s": lambda value: f"{1e3 * value:.3g}" if value < 1 else f"{1e3 * value:,.0f}",
    "_error": "{:.1e}".format,
    "_diff": "{:.1e}".format,
    "images_per_s": lambda value: f"{value:.2f}" if value < 100 else f"{value:,.0f}",
    "spread": lambda value: f"± {50 * value:.0f}%",
    "ratio": "{:.2f}".format,
    "_percent": "{:.0f}%".format,
}


class Table(NamedTuple):
    """A table of text."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    left: Sequence[bool]  # whether a column is set to the left: words are, numbers are not
    title: str = ""
    notes: Sequence[str] = ()  # numbered from 1


def text(row: Row, field: str | Callable[[Row], str]) -> str:
    """Format one field of a row; "-" where it has no value."""
    if callable(field):
        return field(row)
    value = row.get(field)
    if value is None:
        return "-"
    if isinstance(value, (str, bool)):
        return str(value)
    form = FORMS.get(field) or next((form for end, form in FORMS.items() if field.endswith(end)), None)
    if form is not None:
        return form(value)
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def of_rows(rows: Sequence[Row], columns: Columns) -> Table:
    """Make a table of rows. A row without a result ends with its status and the number of the note with the reason."""
    lines, notes = [], list(dict.fromkeys(row["reason"] for row in rows if row["status"] != "ok"))
    for row in rows:
        line = [text(row, field) for _, field in columns]
        if row["status"] != "ok":
            line[-1] = f"{row['status']} [{notes.index(row['reason']) + 1}]"
        lines.append(line)
    left = [callable(field) or any(isinstance(row.get(field), str) for row in rows) for _, field in columns]
    return Table([title for title, _ in columns], lines, left, notes=notes)


def of_texts(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Make a table of text; columns in which every line is a number are set to the right."""
    left = [not all(NUMBER.fullmatch(cell) for cell in column) for column in zip(*lines, strict=True)]
    return Table(header, lines, left, title)


def terminal(table: Table) -> str:
    """Format a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(table.header, *table.lines, strict=True)]
    shown = [
        "  ".join(f"{cell:{'<' if left else '>'}{w}}" for cell, w, left in zip(line, widths, table.left, strict=True))
        for line in (table.header, ["-" * width for width in widths], *table.lines)
    ]
    notes = [f"[{i}] {note}" for i, note in enumerate(table.notes, 1)]
    return "\n".join([*([table.title] if table.title else []), *(line.rstrip() for line in shown), *notes])


def markdown(table: Table) -> str:
    """Format a table, without its title, for a Markdown page."""
    lines = [table.header, [":--" if left else "--:" for left in table.left], *table.lines]
    shown = ["| " + " | ".join(_one_line(cell) for cell in cells) + " |" for cells in lines]
    notes = [f"{i}. {_one_line(note)}" for i, note in enumerate(table.notes, 1)]
    return "\n".join([*shown, *(["", *notes] if notes else [])])


def _one_line(cell: str) -> str:
    """Escape text that would end a cell of a Markdown table or start a tag."""
    return " ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;")
