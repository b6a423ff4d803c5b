"""Figures are written whole and are not blank."""

import numpy as np
import pytest
from PIL import Image

from ouromamba_jax.report import charts
from ouromamba_jax.report.charts import dot_chart, line_chart, line_panels
from ouromamba_jax.report.figures import image_grid, outlier_map


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pictures(rng, count):
    return rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


FIGURES = {
    "image_grid": lambda path, rng: image_grid(path, pictures(rng, 7), list("0123456"), heading="Images"),
    "image_grid_plain": lambda path, rng: image_grid(path, pictures(rng, 1)),
    "outlier_map": lambda path, rng: outlier_map(path, rng.random((33, 48)) < 0.05, n_refresh=10),
    "line_chart": lambda path, rng: line_chart(
        path, {"real": [1.0, 2.0], "noise": [None, 1.5]}, ["w4a4", "w8a8"], ylabel="dB", reference=("float", 2.5)
    ),
    "dot_chart": lambda path, rng: dot_chart(
        path, {"a": rng.random((2, 3)).tolist(), "b": [[0.5], [0.7, 0.6]]}, ["w4a4", "w8a8"], ylabel="dB"
    ),
    "line_panels": lambda path, rng: line_panels(
        path,
        {f"layer {i}": {"real": rng.random(20), "noise": rng.random(20)} for i in range(4)},
        xlabel="x",
        ylabel="y",
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_written_and_not_blank(name, tmp_path, rng):
    pytest.importorskip("matplotlib")
    path = tmp_path / "figures" / f"{name}.png"
    FIGURES[name](path, rng)
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float64)
    assert min(pixels.shape[:2]) > 100
    assert pixels.std() > 10
    # Nothing touches the border: no clipped text.
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    np.testing.assert_array_equal(border, 255)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_outlier_map_shows_the_mask(tmp_path, rng):
    pytest.importorskip("matplotlib")
    counts = []
    for share in (0.02, 0.5):
        outlier_map(tmp_path / "a.png", rng.random((40, 40)) < share)
        pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), np.int64)
        counts.append(np.mean(pixels[..., 0] - pixels[..., 2] > 100))  # the accent colour is orange
    assert counts[1] > 5 * counts[0] > 0


def test_a_failed_figure_leaves_the_old_one(tmp_path, rng, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    path = tmp_path / "a.png"
    image_grid(path, pictures(rng, 2))
    before = path.read_bytes()

    def fail(self, file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure_module.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        image_grid(path, pictures(rng, 3))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_mismatched_figures_are_refused(tmp_path, rng):
    with pytest.raises(ValueError, match="3 images but 2 titles"):
        image_grid(tmp_path / "a.png", pictures(rng, 3), ["a", "b"])
    with pytest.raises(ValueError, match=r"\(tokens, channels\) of one sample"):
        outlier_map(tmp_path / "a.png", rng.random((2, 3, 4)) < 0.5)
    with pytest.raises(ValueError, match="real has 1 values, but there are 2 ticks"):
        line_chart(tmp_path / "a.png", {"real": [1.0]}, ["a", "b"], ylabel="dB")
    assert not list(tmp_path.iterdir())


def test_a_dot_chart_has_no_bars_for_single_measurements(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "save_png", lambda path, figure: drawn.append(figure))
    for second in ([2.0], [2.0, 3.0]):
        charts.dot_chart(tmp_path / "a.png", {"a": [[1.0], second]}, ["w4a4", "w8a8"], ylabel="dB")
    (single,), (repeated,) = (figure.axes[0].containers for figure in drawn)
    assert not single.has_yerr
    assert repeated.has_yerr


def test_a_dot_chart_needs_measurements_for_every_tick(tmp_path):
    with pytest.raises(ValueError, match="b needs measurements for each of the 2 ticks"):
        dot_chart(tmp_path / "a.png", {"a": [[1.0], [2.0]], "b": [[1.0], []]}, ["w4a4", "w8a8"], ylabel="dB")
