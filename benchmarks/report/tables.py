"""Rows as tables: on a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.measurements import Row

Columns = Sequence[tuple[str, str | Callable[[Row], str]]]

# How a field is written, by its name's ending or by its whole name.
FORMS: dict[str, Callable[[float], str]] = {
    "_bytes": lambda value: f"{value / 2**20:,.0f}",
    "_per_s": lambda value: f"{value:.3g}" if value < 1000 else f"{value:,.0f}",
    "_s": lambda value: f"{1e3 * value:.3g}" if value < 1 else f"{1e3 * value:,.0f}",
    "_us": lambda value: f"{1e6 * value:,.1f}",
    "_error": lambda value: f"{value:.1e}",
    "_diff": lambda value: f"{value:.1e}",
    "images_per_s": lambda value: f"{value:.2f}" if value < 100 else f"{value:,.0f}",
    "spread": lambda value: f"± {50 * value:.0f}%",
    "ratio": lambda value: f"{value:.2f}",
    "_ratio": lambda value: f"{value:.2f}",
    "_percent": lambda value: f"{value:.0f}%",
}


def text(row: Row, field: str | Callable[[Row], str]) -> str:
    """One field of a row; "-" where it has no value."""
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


def set_left(rows: Sequence[Row], columns: Columns) -> list[bool]:
    """Whether a column is set to the left: words are, numbers are not."""
    return [callable(field) or any(isinstance(row.get(field), str) for row in rows) for _, field in columns]


def terminal(rows: Sequence[Row], columns: Columns) -> str:
    """The rows for a terminal; one without a result is followed by its reason."""
    header = [title for title, _ in columns]
    body = [[text(row, field) for _, field in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    left = set_left(rows, columns)

    def line(cells: Sequence[str]) -> str:
        parts = [c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(cells, widths, left, strict=True)]
        return "  ".join(parts).rstrip()

    lines = [line(header), line(["-" * width for width in widths])]
    for row, cells in zip(rows, body, strict=True):
        lines.append(line(cells))
        if row["status"] != "ok":
            lines.append(f"    {row['status']}: {row['reason']}")
    return "\n".join(lines)


def noted(rows: Sequence[Row], columns: Columns) -> tuple[list[list[str]], list[str]]:
    """The cells of every row, and the reasons of those without a result.

    Such a row ends with its status and the number of its reason, counted from 1.
    """
    cells, reasons = [], []
    for row in rows:
        line = [text(row, field) for _, field in columns]
        if row["status"] != "ok":
            if row["reason"] not in reasons:
                reasons.append(row["reason"])
            line[-1] = f"{row['status']} [{reasons.index(row['reason']) + 1}]"
        cells.append(line)
    return cells, reasons


def markdown(rows: Sequence[Row], columns: Columns) -> str:
    """The rows for README.md; below them the reasons of those without a result."""
    body, reasons = noted(rows, columns)
    header = [title for title, _ in columns]
    lines = [header, [":--" if to_left else "--:" for to_left in set_left(rows, columns)], *body]
    table = ["| " + " | ".join(_one_line(cell) for cell in cells) + " |" for cells in lines]
    notes = [f"{i}. {_one_line(reason)}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([*table, *(["", *notes] if notes else [])])


def _one_line(cell: str) -> str:
    """Text that neither ends a cell of a Markdown table nor starts a tag."""
    return " ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;")
