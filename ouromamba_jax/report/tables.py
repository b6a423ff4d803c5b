"""Rows of numbers and names as a table: on the terminal, and as Markdown."""

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
