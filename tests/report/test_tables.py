"""Tables cell by cell."""

import io
import json
import math

import pytest
from rich.console import Console

from ouromamba_jax.report.tables import csv_table, json_table, latex_table, markdown_table, print_table

ROWS = [["real", 98.256, 3], ["noise [x]", math.pi, None]]


def test_markdown_table():
    assert markdown_table(ROWS, ["images", "top-1", "n"]).splitlines() == [
        "| images | top-1 | n |",
        "| --- | ---: | ---: |",
        "| real | 98.26 | 3 |",
        "| noise [x] | 3.14 | - |",
    ]
    assert "a\\|b" in markdown_table([["a|b"]], ["name"])


def test_csv_latex_and_json():
    headers = ["images", "top-1 %", "n"]
    assert csv_table(ROWS, headers).splitlines() == [
        "images,top-1 %,n",
        "real,98.256,3",
        f"noise [x],{math.pi},",
    ]
    assert latex_table([["a_b & 5 %", 1.0]], ["name", "n"]).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"name & n \\",
        r"\midrule",
        r"a\_b \& 5 \% & 1.00 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    rows = json.loads(json_table([*ROWS, ["none", math.nan, 0]], headers))
    assert rows == [dict(zip(headers, row, strict=True)) for row in [*ROWS, ["none", None, 0]]]


def test_terminal_table():
    text = io.StringIO()
    print_table(ROWS, ["images", "top-1", "n"], title="Result", console=Console(file=text, width=80))
    assert "Result" in text.getvalue()
    for cell in ("real", "98.26", "noise [x]", "3.14"):
        assert cell in text.getvalue()


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match="2 cells, but there are 3 headers"):
        markdown_table([["a", 1]], ["a", "b", "c"])
