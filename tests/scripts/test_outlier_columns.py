"""The shares of outliers per tile that scripts/outlier_columns.py prints."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from script_modules import load_script
from tiny_models import FAMILIES, random_model

from ouromamba_jax.ops.split import split_outliers
from ouromamba_jax.ops.split_types import OutlierConfig


def test_shares_of_tiles():
    """Three samples of 50 tokens: tiles of 64 and 128 rows cross samples, and the last ones are ragged."""
    rng = np.random.default_rng(0)
    x = jnp.asarray((rng.normal(size=(3, 50, 40)) * np.where(rng.random((3, 50, 40)) < 0.02, 30, 1)).astype(np.float32))
    split = split_outliers(x, jnp.full(50, 0.2, jnp.float32), OutlierConfig())
    mask, shifted = np.asarray(split.mask).reshape(150, 40), np.asarray(split.shifted).reshape(150)
    inputs, outliers, of_64, of_128, over_half, tokens, tiles, time = load_script("outlier_columns").describe(split)
    assert inputs == 40
    assert 0 < tokens == shifted.mean() < 1
    assert 0 < outliers == mask.mean()
    assert of_64 == pytest.approx(np.mean([mask[a:b].any(0).mean() for a, b in ((0, 64), (64, 128), (128, 150))]))
    assert of_128 == pytest.approx((mask[:128].any(0).mean() + mask[128:].any(0).mean()) / 2)
    assert over_half == np.mean([mask[a:b].any(0).sum() > 20 for a, b in ((0, 128), (128, 150))])
    assert tiles == np.mean([shifted[:128].any(), shifted[128:].any()])
    assert outliers < of_64 < of_128
    assert time == 0.5 + of_128


@pytest.mark.slow
def test_every_kind_of_inner_product_is_seen(monkeypatch):
    """On a tiny model and random images."""
    script = load_script("outlier_columns")
    model = random_model("vim_micro", **FAMILIES["vim"])
    images = np.random.default_rng(1).normal(size=(2, *FAMILIES["vim"]["img_size"], 3)).astype(np.float32)
    monkeypatch.setattr(script.oj, "load", lambda name: model)
    monkeypatch.setattr(script, "load_images", lambda *_, **__: SimpleNamespace(images=images))
    rows = script.rows_of("tiny", "w4a4")
    assert {row[0] for row in rows} == {f"tiny {kind}" for kind in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    assert all(len(row) == len(script.HEADERS) for row in rows)
    assert any(row[2] > 0 for row in rows)
