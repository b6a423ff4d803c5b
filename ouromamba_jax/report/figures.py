"""Figures as PNG files: pictures and outlier channels. They need Matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from ouromamba_jax.files import whole_file


def image_grid(
    path: str | Path,
    images: UInt8[np.ndarray, "N H W I"],
    titles: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    heading: str | None = None,
) -> None:
    """Pictures side by side as a PNG, each with its title; `columns` makes the grid about square if None."""
    if len(images) == 0 or (titles is not None and len(titles) != len(images)):
        raise ValueError(f"there are {len(images)} images but {0 if titles is None else len(titles)} titles.")
    columns = min(len(images), columns or math.ceil(math.sqrt(len(images))))
    rows = math.ceil(len(images) / columns)
    aspect = images.shape[1] / images.shape[2]
    figure = new_figure(1.25 * columns, (1.25 * aspect + (0.22 if titles else 0.04)) * rows + (0.4 if heading else 0.0))
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for i, axis in enumerate(axes):
        axis.set_axis_off()
        if i < len(images):
            axis.imshow(images[i], interpolation="nearest", cmap="gray", vmin=0, vmax=255)  # of one channel
            if titles is not None:
                axis.set_title(titles[i], fontsize=9, pad=3)
    if heading:
        figure.suptitle(heading, fontsize=12)
    save_png(path, figure)


def outlier_map(
    path: str | Path, mask: Bool[np.ndarray, "L C"], *, n_refresh: int | None = None, heading: str = "Outlier channels"
) -> None:
    """Which channel is an outlier at which token, with the share per channel above and per token at the right.

    `n_refresh` draws the windows after which the list of outliers starts anew.
    """
    mask = np.asarray(mask, bool)
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"the mask has shape {mask.shape}; (tokens, channels) of one sample is needed.")
    tokens, channels = mask.shape
    figure = new_figure(10.0, 5.5)
    grid = figure.add_gridspec(2, 2, width_ratios=(6, 1), height_ratios=(1, 4))
    main = figure.add_subplot(grid[1, 0])
    above, right = figure.add_subplot(grid[0, 0], sharex=main), figure.add_subplot(grid[1, 1], sharey=main)
    main.imshow(mask, aspect="auto", interpolation="nearest", cmap=_two_colours(), vmin=0, vmax=1)
    if n_refresh:
        for t in range(n_refresh, tokens, n_refresh):
            main.axhline(t - 0.5, color=GRID, linewidth=0.6)
    main.set(xlabel="channel", ylabel="token, in scan order")
    above.bar(np.arange(channels), 100 * mask.mean(0), width=1.0, color=ACCENT)
    above.set(ylabel="% of tokens", xlim=(-0.5, channels - 0.5))
    right.barh(np.arange(tokens), 100 * mask.mean(1), height=1.0, color=ACCENT)
    right.set(xlabel="% of channels", ylim=(tokens - 0.5, -0.5))
    for axis in (above, right):
        axis.spines[["top", "right"]].set_visible(False)
    above.tick_params(labelbottom=False)
    right.tick_params(labelleft=False)
    corner = figure.add_subplot(grid[0, 1])
    corner.set_axis_off()
    corner.text(0, 0.8, "outlier", color=ACCENT, fontsize=10, weight="bold")
    corner.text(0, 0.5, f"{100 * mask.mean():.1f} % of all values", fontsize=9)
    if n_refresh:
        corner.text(0, 0.25, f"lines: lists start anew\n(every {n_refresh} tokens)", fontsize=8, va="top")
    figure.suptitle(heading, fontsize=12)
    save_png(path, figure)


ACCENT, GRID = "#D55E00", "#D9D9D9"


def new_figure(width: float, height: float) -> Any:
    """A figure in inches, outside pyplot's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need Matplotlib; pip install "ouromamba_jax[demo]".') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _two_colours() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(["#F5F5F2", ACCENT])


def save_png(path: str | Path, figure: Any) -> None:
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150, facecolor="white")
