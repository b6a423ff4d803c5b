"""Charts of numbers as PNG files: repeated measurements, and curves side by side."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ouromamba_jax.report.figures import GRID, new_figure, save_png

_MARKERS = "osD^vPX"
# Okabe and Ito's palette: told apart by every kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_TEXT = "#555555"


def line_chart(
    path: str | Path,
    series: Mapping[str, Sequence[float | None]],
    ticks: Sequence[str],
    *,
    ylabel: str,
    xlabel: str = "bits",
    heading: str | None = None,
    reference: tuple[str, float] | None = None,
) -> None:
    """One line per name in `series` over labelled settings; None leaves a gap.

    With more than eight ticks the labels are rotated.

    Args:
      reference: (name, value) drawn as a horizontal line, e.g. ("float", 99.0).

    Raises:
      ValueError: if a name has another number of values than there are ticks.
    """
    for name, values in series.items():
        if len(values) != len(ticks):
            raise ValueError(f"{name} has {len(values)} values, but there are {len(ticks)} ticks.")
    many = len(ticks) > 8
    figure = new_figure(max(6.0, (0.3 if many else 1.2) * len(ticks) + 3.0), 5.4 if many else 4.2)
    axis = figure.subplots()
    for (name, values), marker, colour in zip(
        series.items(), itertools.cycle(_MARKERS), itertools.cycle(_COLOURS), strict=False
    ):
        numbers = [math.nan if value is None else value for value in values]
        axis.plot(range(len(ticks)), numbers, marker=marker, color=colour, linewidth=1.8, markersize=6, label=name)
    axis.set_xticks(range(len(ticks)), ticks, rotation=90 if many else 0, fontsize=8 if many else None)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.margins(x=0.06, y=0.1)
    _finish(path, figure, heading, reference)


def dot_chart(
    path: str | Path,
    series: Mapping[str, Sequence[Sequence[float]]],
    ticks: Sequence[str],
    *,
    ylabel: str,
    xlabel: str | None = None,
    heading: str | None = None,
    reference: tuple[str, float] | None = None,
) -> None:
    """Measurements by setting: one column per tick, in it a mark at each name's mean and, if
    repeated, a bar over its range.

    Args:
      series: per name and tick, the repeated measurements (e.g. one per seed).
      reference: (name, value) drawn as a horizontal line.

    Raises:
      ValueError: if a name has another number of settings than there are ticks, or a setting no measurement.
    """
    for name, cells in series.items():
        if len(cells) != len(ticks) or not all(len(cell) for cell in cells):
            raise ValueError(f"{name} needs measurements for each of the {len(ticks)} ticks.")
    figure = new_figure(max(6.0, 1.7 * len(ticks) + 3.0), 4.4)
    axis = figure.subplots()
    step = 0.8 / len(series)
    for i, ((name, cells), marker, colour) in enumerate(
        zip(series.items(), itertools.cycle(_MARKERS), itertools.cycle(_COLOURS), strict=False)
    ):
        middle = [float(np.mean(cell)) for cell in cells]
        below = [m - min(cell) for m, cell in zip(middle, cells, strict=True)]
        above = [max(cell) - m for m, cell in zip(middle, cells, strict=True)]
        bars = (below, above) if any(len(cell) > 1 for cell in cells) else None
        places = np.arange(len(ticks)) + (i - (len(series) - 1) / 2) * step
        axis.errorbar(places, middle, yerr=bars, fmt=marker, color=colour, markersize=6, capsize=3, label=name)
    for place in range(1, len(ticks)):
        axis.axvline(place - 0.5, color=GRID, linewidth=0.8)
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set(xlabel=xlabel or "", ylabel=ylabel, xlim=(-0.5, len(ticks) - 0.5))
    _finish(path, figure, heading, reference)


def _finish(path: str | Path, figure: Any, heading: str | None, reference: tuple[str, float] | None) -> None:
    """What charts of one panel share: the reference line, the grid, the legend beside the axes, the heading."""
    (axis,) = figure.axes
    if reference is not None:
        axis.axhline(reference[1], color=_TEXT, linewidth=1.0, linestyle="--", label=reference[0])
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    if heading:
        figure.suptitle(heading, fontsize=12)
    save_png(path, figure)


def line_panels(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    heading: str | None = None,
) -> None:
    """Curves over their index, a panel per name, with a logarithmic axis: {panel: {curve: values}}."""
    if not panels:
        raise ValueError("there is nothing to draw; give at least one panel.")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.2 * columns, 2.6 * rows + 0.9)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (name, curves) in zip(axes, panels.items(), strict=False):
        for (label, values), colour in zip(curves.items(), itertools.cycle(_COLOURS), strict=False):
            axis.plot(range(len(values)), values, color=colour, linewidth=1.4, label=label)
        axis.set(title=name, xlabel=xlabel, ylabel=ylabel, yscale="log")
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    drawn = [pair for axis in figure.axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    labels = {label: line for line, label in drawn}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    if heading:
        figure.suptitle(heading, fontsize=12)
    save_png(path, figure)
