"""The split's kernel in interpret mode: the reference's integers, scales and lists, without races."""

from dataclasses import fields

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from ouromamba_jax.outliers import OutlierConfig, calibrate_theta, search_token_scales, split_outliers
from ouromamba_jax.pallas import outlier_split as kernel

CASES = {
    # name: (L, C, config); odd lengths, windows that do not divide L, channels that do not fill a warpgroup
    "pow2": (23, 130, OutlierConfig()),
    "free": (7, 256, OutlierConfig(outlier_scale="free")),
    "w6": (12, 33, OutlierConfig(act_bits=6, n_refresh=4, sigma=2.0)),
    "w8": (11, 192, OutlierConfig(act_bits=8)),
    "offline": (13, 70, OutlierConfig(threshold="offline")),
    "single": (3, 5, OutlierConfig(n_refresh=1, outlier_bits=5, sigma=1.0)),
}


def activations(rng, L, C, size):
    x = rng.normal(size=(2, L, C)) * np.where(rng.random(C) < 0.05, 20, 1)
    return jnp.asarray((x * np.where(rng.random((2, L, C)) < 0.01, size, 1)).astype(np.float32))


def both(x, scale, config, *, races=False):
    theta = calibrate_theta(x, config) if config.threshold == "offline" else None
    interpret = plgpu.InterpretGPUParams(detect_races=races)
    got = kernel.split(x, scale, config, theta=theta, interpret=interpret)
    return got, split_outliers(x, scale, config, theta=theta)


def assert_same(got, expected):
    for field in fields(expected):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        if field.name != "pow2":
            assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.mark.parametrize("size", [3, 1e5])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_the_reference(name, size):
    L, C, config = CASES[name]
    x = activations(np.random.default_rng(0), L, C, size)
    assert kernel.supports(x, config) is None
    got, expected = both(x, search_token_scales(x, config), config)
    assert 0 < float(jnp.mean(expected.mask.astype(jnp.float32))) < 0.5
    assert_same(got, expected)


@pytest.mark.parametrize(("factor", "listed"), [(100.0, 0.0), (1e-3, 1.0)])
def test_no_outlier_and_nothing_but_outliers(factor, listed):
    """Scales that hold everything, and thresholds below everything."""
    x = activations(np.random.default_rng(1), 6, 40, 1)
    config = OutlierConfig(threshold="offline")
    scale = search_token_scales(x, OutlierConfig()) * factor
    theta = jnp.zeros_like(scale)
    expected = split_outliers(x, scale, config, theta=theta)
    assert float(jnp.mean(expected.mask.astype(jnp.float32))) == listed
    assert_same(kernel.split(x, scale, config, theta=theta, interpret=plgpu.InterpretGPUParams()), expected)


def test_no_race(capfd):
    L, C, config = CASES["pow2"]
    x = activations(np.random.default_rng(2), L, C, 30)
    assert_same(*both(x, search_token_scales(x, config), config, races=True))
    assert "RACE" not in "".join(capfd.readouterr())


def test_a_non_finite_token_gets_a_nan_scale_and_other_windows_do_not_see_it():
    config = OutlierConfig()
    x = activations(np.random.default_rng(3), 20, 64, 30)
    scale = search_token_scales(x, config)
    fine, _ = both(x, scale, config)
    for bad in (jnp.inf, jnp.nan):
        broken, _ = both(x.at[1, 4, 3].set(bad), scale, config)
        assert np.flatnonzero(np.isnan(broken.outlier_scale)).tolist() == [20 + 4]
        np.testing.assert_array_equal(broken.inlier_q[0], fine.inlier_q[0])
        np.testing.assert_array_equal(broken.outlier_q[1, 10:], fine.outlier_q[1, 10:])


def test_reasons_against_a_call():
    x = jnp.zeros((1, 4, 8))
    assert "Algorithm 2" in kernel.supports(x, OutlierConfig(detection="static"))
    assert "16-bit" in kernel.supports(x, OutlierConfig(outlier_bits=16))
    assert "registers" in kernel.supports(jnp.zeros((1, 1, 10000)), OutlierConfig())
