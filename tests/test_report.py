"""Metrics against hand-made cases; tables cell by cell; figures are written whole and are not blank."""

import io
import math

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ouromamba_jax.report import (
    agreement,
    attention_maps,
    image_grid,
    line_chart,
    markdown_table,
    outlier_map,
    print_table,
    sqnr_db,
    top1,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_top1_and_agreement(rng):
    logits = rng.normal(size=(200, 7))
    labels = np.array([row.tolist().index(max(row)) for row in logits])
    labels[:50] = (labels[:50] + 1) % 7
    assert top1(logits, labels) == 0.75
    other = logits.copy()
    other[:20, :] = -other[:20, :]  # the largest becomes the smallest
    assert agreement(logits, other) == 0.9
    with pytest.raises(ValueError, match="200 rows of logits"):
        top1(logits, labels[:10])
    with pytest.raises(ValueError, match="a label -1, which is no class"):
        top1(logits, labels - 1)


def test_sqnr_of_noise_a_tenth_of_the_signal_is_20_db(rng):
    signal, noise = rng.normal(size=(2, 40, 50)).astype(np.float32)
    noise *= np.sqrt(np.sum(signal**2) / np.sum(noise**2)) / 10
    assert sqnr_db(signal, signal + noise) == pytest.approx(20, abs=1e-3)
    assert sqnr_db(signal, signal) == math.inf
    assert sqnr_db(np.zeros(3), np.array([0.0, 1.0, 0.0])) == -math.inf
    with pytest.raises(ValueError, match="shape"):
        sqnr_db(signal, signal[:1])


ROWS = [["real", 98.256, 3], ["noise [x]", math.pi, None]]


def test_markdown_table():
    assert markdown_table(ROWS, ["images", "top-1", "n"]).splitlines() == [
        "| images | top-1 | n |",
        "| --- | ---: | ---: |",
        "| real | 98.26 | 3 |",
        "| noise [x] | 3.14 | - |",
    ]
    assert "a\\|b" in markdown_table([["a|b"]], ["name"])


def test_terminal_table():
    text = io.StringIO()
    print_table(ROWS, ["images", "top-1", "n"], title="Result", console=Console(file=text, width=80))
    assert "Result" in text.getvalue()
    for cell in ("real", "98.26", "noise [x]", "3.14"):
        assert cell in text.getvalue()


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match="2 cells, but there are 3 headers"):
        markdown_table([["a", 1]], ["a", "b", "c"])


def pictures(rng, count):
    return rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


FIGURES = {
    "image_grid": lambda path, rng: image_grid(path, pictures(rng, 7), list("0123456"), heading="Images"),
    "image_grid_plain": lambda path, rng: image_grid(path, pictures(rng, 1)),
    "outlier_map": lambda path, rng: outlier_map(path, rng.random((33, 48)) < 0.05, n_refresh=10),
    "attention_maps": lambda path, rng: attention_maps(path, pictures(rng, 2), *rng.random((2, 2, 4, 4))),
    "line_chart": lambda path, rng: line_chart(
        path, {"real": [1.0, 2.0], "noise": [None, 1.5]}, ["w4a4", "w8a8"], ylabel="dB", reference=("float", 2.5)
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
    with pytest.raises(ValueError, match="do not match"):
        attention_maps(tmp_path / "a.png", pictures(rng, 2), rng.random((2, 4, 4)), rng.random((1, 4, 4)))
    with pytest.raises(ValueError, match="real has 1 values, but there are 2 ticks"):
        line_chart(tmp_path / "a.png", {"real": [1.0]}, ["a", "b"], ylabel="dB")
    assert not list(tmp_path.iterdir())
