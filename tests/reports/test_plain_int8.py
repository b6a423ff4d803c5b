"""Outliers of no more bits than inliers: plain rounding, which is saved, loaded and resumed like any other."""

import jax.numpy as jnp
import numpy as np
import pytest
from quantising import bits_of, float_model, images

from ouromamba_jax import OutlierConfig, QuantConfig, load, quantize, save, split_outliers
from ouromamba_jax.ops.split_calibration import calibrate

CONFIG = QuantConfig.preset("w8a8", outlier_bits=8, tune_epochs=0)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """(model, report), and the folder of its stages."""
    folder = tmp_path_factory.mktemp("stages")
    return *quantize(float_model(), images(), CONFIG, resume=folder), folder


def test_it_has_no_outliers_anywhere(quantised):
    _, report, _ = quantised
    assert report.outlier_rate == 0
    assert report.mean_bits == 8
    assert {site.outlier_bits for site in report.sites if site.kind != "operand" or site.outlier_bits} == {8}


def test_it_is_saved_loaded_and_resumed(quantised, tmp_path):
    model, report, folder = quantised
    save(tmp_path / "model", model)
    assert bits_of(load(tmp_path / "model")) == bits_of(model)
    again, its_report = quantize(float_model(), images(), CONFIG, resume=folder)
    assert bits_of(again) == bits_of(model)
    assert its_report.sites == report.sites


@pytest.mark.parametrize("detection", ["dynamic", "static", "none"])
def test_equal_bits_list_nothing_whatever_the_detection(detection):
    x = jnp.asarray(np.random.default_rng(0).standard_t(2, (2, 23, 40)), jnp.float32)
    config = QuantConfig(act_bits=4, outlier_bits=4, detection=detection).splitting
    found = calibrate(x, config)
    assert (found.theta, found.shift, found.channels) == (None, None, None)
    assert not found.split(x, config).listed().any()


def test_no_detection_takes_no_list():
    x, config = jnp.full((2, 5, 8), 9.0), OutlierConfig(detection="none")
    split = split_outliers(x, jnp.ones(5), config, theta=jnp.zeros(5), channels=jnp.ones(8, bool))
    assert not split.listed().any()
    assert (np.asarray(split.levels()) == 7).all()
