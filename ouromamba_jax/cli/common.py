"""What verbs share: outputs refused before the work, fields of configs, seeds, bars of progress."""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ouromamba_jax.data.sources import has_splits
from ouromamba_jax.files import check_writable, local_path
from ouromamba_jax.report.tables import FORMATS, Cell, print_table

Verb = Callable[..., argparse.ArgumentParser]
"""Adds a verb: called with its name, function, help and example."""

console = Console(stderr=True)


def given(arguments: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of a config that the command line sets."""
    values = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value is not None}


def check_output(path: str, *, suffix: str | None = None) -> None:
    """Raises, before any work is done, if `path` exists or cannot be written."""
    if suffix is not None and not path.endswith(suffix):
        raise ValueError(f"{path} must end in {suffix}.")
    if local_path(path).exists():
        raise ValueError(f"{path} already exists; choose another name or remove it first.")
    check_writable(path)


@contextmanager
def unfinished(arguments: argparse.Namespace) -> Iterator[Path]:
    """The folder of a run's state: that of --resume, else one beside OUT, which goes when the block ends well."""
    kept = getattr(arguments, "resume", None)
    out = local_path(arguments.out)
    folder = local_path(kept) if kept else out.with_name(f"{out.name}.unfinished")
    arguments.resume = folder  # what an interruption names
    yield folder
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class ShownTable:
    """What `print_table` takes."""

    rows: Sequence[Sequence[Cell]]
    headers: Sequence[str]
    title: str


def add_formats(sub: argparse.ArgumentParser) -> None:
    """Adds --format, and --json as its short form."""
    sub.add_argument("--format", choices=("terminal", *FORMATS), default="terminal", help="of what is printed")
    sub.add_argument("--json", action="store_const", dest="format", const="json", help="the same as --format json")


def print_tables(tables: Iterable[ShownTable], format: str) -> None:
    """Prints tables as they come; as JSON, all at the end as {title: rows}."""
    if format == "json":
        print(json.dumps({t.title: json.loads(FORMATS["json"](t.rows, t.headers)) for t in tables}, indent=1))
        return
    for table in tables:
        if format == "terminal":
            print_table(table.rows, table.headers, title=table.title)
        else:
            print(FORMATS[format](table.rows, table.headers))


@contextmanager
def bar(label: str):
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("of about"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total, name: progress.update(
            task, completed=done, total=total, description=f"{label} {name}"
        )


def chosen_split(data: str, split: str | None, default: str) -> str:
    """The split that --split names, or the default one.

    Raises:
      ValueError: if there is a choice where the data have no splits.
    """
    if split is not None and not has_splits(data):
        raise ValueError(
            f"{data} has no splits; leave out --split {split}, or write {{split}} where it stands in the path."
        )
    return default if split is None else split


def parse_seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed; give a whole number from 0 to {2**32 - 1}")
    return seed
