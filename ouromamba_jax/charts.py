"""Charts of numbers as PNG files: repeated measurements, and curves side by side."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ouromamba_jax.report import _GRID, _SERIES, _TEXT, _figure, _save

_MARKERS = "osD^vPX"


def dot_chart(
    path: str | Path,
    series: Mapping[str, Sequence[Sequence[float]]],
    ticks: Sequence[str],
    *,
    ylabel: str,
    heading: str | None = None,
    reference: tuple[str, float] | None = None,
) -> None:
    """Measurements by setting: one column per tick, in it a mark at each name's mean and a bar over its range.

    Args:
      series: per name and tick, the repeated measurements (e.g. one per seed).
      reference: (name, value) drawn as a horizontal line.

    Raises:
      ValueError: if a name has another number of settings than there are ticks, or a setting no measurement.
    """
    for name, cells in series.items():
        if len(cells) != len(ticks) or not all(len(cell) for cell in cells):
            raise ValueError(f"{name} needs measurements for each of the {len(ticks)} ticks.")
    figure = _figure(max(6.0, 1.7 * len(ticks) + 3.0), 4.4)
    axis = figure.subplots()
    step = 0.8 / len(series)
    for i, ((name, cells), marker, colour) in enumerate(
        zip(series.items(), itertools.cycle(_MARKERS), itertools.cycle(_SERIES), strict=False)
    ):
        middle = [float(np.mean(cell)) for cell in cells]
        below = [m - min(cell) for m, cell in zip(middle, cells, strict=True)]
        above = [max(cell) - m for m, cell in zip(middle, cells, strict=True)]
        places = np.arange(len(ticks)) + (i - (len(series) - 1) / 2) * step
        axis.errorbar(
            places, middle, yerr=(below, above), fmt=marker, color=colour, markersize=6, capsize=3, label=name
        )
    if reference is not None:
        axis.axhline(reference[1], color=_TEXT, linewidth=1.0, linestyle="--", label=reference[0])
    for place in range(1, len(ticks)):
        axis.axvline(place - 0.5, color=_GRID, linewidth=0.8)
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set(ylabel=ylabel, xlim=(-0.5, len(ticks) - 0.5))
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    if heading:
        figure.suptitle(heading, fontsize=12)
    _save(path, figure)


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
    figure = _figure(4.2 * columns, 2.6 * rows + 0.9)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (name, curves) in zip(axes, panels.items(), strict=False):
        for (label, values), colour in zip(curves.items(), itertools.cycle(_SERIES), strict=False):
            axis.plot(range(len(values)), values, color=colour, linewidth=1.4, label=label)
        axis.set(title=name, xlabel=xlabel, ylabel=ylabel, yscale="log")
        axis.grid(axis="y", color=_GRID, linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    drawn = [pair for axis in figure.axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    labels = {label: line for line, label in drawn}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    if heading:
        figure.suptitle(heading, fontsize=12)
    _save(path, figure)
