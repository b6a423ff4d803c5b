"""Rows of numbers and names as a table: on the terminal, as Markdown, CSV, LaTeX and JSON."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Cell = str | int | float | None


def print_table(
    rows: Sequence[Sequence[Cell]], headers: Sequence[str], *, title: str | None = None, console: Console | None = None
) -> None:
    """A table on the terminal: text to the left, numbers to the right. Floats get two decimals, None a dash.

    Where the output goes to a file, the table is as wide as its cells.
    """
    _check_rows(rows, headers)
    table = Table(title=title, title_justify="left", header_style="bold")
    for header, numeric in zip(headers, _numeric_columns(rows, headers), strict=True):
        table.add_column(header, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(escape(_text(cell)) for cell in row))
    console = console or Console()
    if not console.is_terminal:
        cells = console.measure(table, options=console.options.update(width=1000)).maximum
        console = Console(file=console.file, width=max(console.width, cells))
    console.print(table)


def markdown_table(rows: Sequence[Sequence[Cell]], headers: Sequence[str]) -> str:
    """The same table as Markdown text."""
    _check_rows(rows, headers)
    rule = ["---:" if numeric else "---" for numeric in _numeric_columns(rows, headers)]
    lines = [list(headers), rule, *([_text(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_table(rows: Sequence[Sequence[Cell]], headers: Sequence[str]) -> str:
    """The same table as CSV, its numbers in full."""
    _check_rows(rows, headers)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([headers, *rows])
    return text.getvalue()


def latex_table(rows: Sequence[Sequence[Cell]], headers: Sequence[str]) -> str:
    """The same table as a LaTeX tabular with the rules of booktabs."""
    _check_rows(rows, headers)
    columns = "".join("r" if numeric else "l" for numeric in _numeric_columns(rows, headers))
    first, *others = (" & ".join(map(_latex, map(_text, line))) + " \\\\" for line in (headers, *rows))
    lines = [
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        first,
        "\\midrule",
        *others,
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _latex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


def json_table(rows: Sequence[Sequence[Cell]], headers: Sequence[str]) -> str:
    """The same table as a JSON list of {header: cell}; what is not finite becomes null."""
    _check_rows(rows, headers)
    cells = [[None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row] for row in rows]
    return json.dumps([dict(zip(headers, row, strict=True)) for row in cells], indent=1) + "\n"


FORMATS = {"markdown": markdown_table, "csv": csv_table, "latex": latex_table, "json": json_table}
"""Tables as text, beside `print_table` for the terminal."""


def _check_rows(rows: Sequence[Sequence[Cell]], headers: Sequence[str]) -> None:
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"the row {list(row)} has {len(row)} cells, but there are {len(headers)} headers.")


def _numeric_columns(rows: Sequence[Sequence[Cell]], headers: Sequence[str]) -> list[bool]:
    return [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(headers))]


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.2f}" if isinstance(cell, float | np.floating) else str(cell)
