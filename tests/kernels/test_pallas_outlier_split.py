"""Every backend of the split gives the same integers, scales and lists; the kernel in interpret mode, without races."""

from dataclasses import fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from ouromamba_jax.ops import split as outliers
from ouromamba_jax.ops.dispatch import Backend
from ouromamba_jax.ops.split import for_product, split_outliers
from ouromamba_jax.ops.split_calibration import calibrate_theta, search_token_scales
from ouromamba_jax.ops.split_types import OutlierConfig
from ouromamba_jax.pallas import outlier_split as kernel

CASES = {
    # name: (L, C, config); odd lengths, windows that do not divide L, channels that do not fill a warpgroup
    "pow2": (12, 130, OutlierConfig()),
    "free": (7, 256, OutlierConfig(outlier_scale="free")),
    "w6": (12, 33, OutlierConfig(act_bits=6, n_refresh=4, sigma=2.0)),
    "offline": (11, 70, OutlierConfig(threshold="offline")),
    "floats": (12, 130, OutlierConfig(act_bits=8, outlier_bits=16, n_refresh=5)),
    "single": (3, 5, OutlierConfig(n_refresh=1, outlier_bits=5, sigma=1.0)),
}


@pytest.fixture(params=["interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
def implementation(request, monkeypatch, capfd):
    """A backend's name. The interpreter raises (jax 0.12) or reports (0.11) accesses that no barrier orders."""
    run = partial(kernel.split, interpret=plgpu.InterpretGPUParams(detect_races=True))
    monkeypatch.setitem(outliers.BACKENDS, "interpreted", Backend(kernel.unsuitable, run))
    yield request.param
    assert "RACE" not in "".join(capfd.readouterr())


def activations(rng, L, C, size):
    x = rng.normal(size=(2, L, C)) * np.where(rng.random(C) < 0.05, 20, 1)
    return jnp.asarray((x * np.where(rng.random((2, L, C)) < 0.01, size, 1)).astype(np.float32))


def assert_same(implementation, x, scale, config, theta=None, **options):
    """With the reference, which is returned."""
    expected = split_outliers(x, scale, config, theta=theta, implementation="xla", **options)
    got = split_outliers(x, scale, config, theta=theta, implementation=implementation, **options)
    for field in fields(expected):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        if field.name != "pow2" and b is not None:
            assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=field.name)
    return expected


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_the_reference(name, implementation):
    L, C, config = CASES[name]
    for size in (3, 1e5):
        x = activations(np.random.default_rng(0), L, C, size)
        theta = calibrate_theta(x, config) if config.threshold == "offline" else None
        expected = assert_same(implementation, x, search_token_scales(x, config), config, theta)
        assert 0 < float(jnp.mean(expected.mask.astype(jnp.float32))) < 0.5


def test_a_row_that_is_too_wide_to_be_loaded_ahead(implementation):
    config = OutlierConfig(n_refresh=2)
    x = activations(np.random.default_rng(9), 3, kernel.WIDEST_AHEAD + 5, 30)
    assert assert_same(implementation, x, search_token_scales(x, config), config).mask.any()


@pytest.mark.parametrize("name", ["pow2", "floats"])
def test_bfloat16_activations(name, implementation):
    L, C, config = CASES[name]
    x = activations(np.random.default_rng(4), L, C, 30)
    call = implementation, x.astype(jnp.bfloat16), search_token_scales(x, config), config
    assert assert_same(*call).mask.any()
    assert assert_same(*call, with_mask=False).mask is None


@pytest.mark.parametrize(("name", "dtype"), [*((name, jnp.bfloat16) for name in CASES), ("pow2", jnp.float32)])
def test_rounded_floats_are_the_split_merged(name, dtype, implementation):
    L, C, config = CASES[name]
    x = activations(np.random.default_rng(6), L, C, 100).at[1, 2, 3].set(-jnp.inf).astype(dtype)
    scale = search_token_scales(activations(np.random.default_rng(5), L, C, 1), config)
    theta = jnp.full(L, 3.0) if config.threshold == "offline" else None
    split = split_outliers(x, scale, config, theta=theta, implementation="xla")
    rounded = outliers.round_activation(x, scale, config, theta=theta, implementation=implementation)
    assert rounded.dtype == dtype
    assert np.isnan(rounded).sum() == C
    assert 0 < np.mean(np.asarray(split.mask)) < 1
    expected = outliers.merge(split).astype(dtype)
    np.testing.assert_array_equal(*(x.astype(jnp.float32) for x in (rounded, expected)))  # NaN is itself there


@pytest.mark.parametrize(("act_bits", "C"), [(8, 130), (4, 64), (6, 256)])
def test_16_bit_outliers_in_fixed_point(act_bits, C, implementation):
    """Bytes and steps, for outliers within 32639 S and far beyond, where inliers lose bits; a token of zeros is one."""
    config = OutlierConfig(act_bits=act_bits, outlier_bits=16, n_refresh=4)
    scale = search_token_scales(activations(np.random.default_rng(8), 9, C, 1), config)
    run = outliers.BACKENDS[implementation].run
    for size, dtype in ((30, jnp.bfloat16), (1e5, jnp.float32), (1e9, jnp.float32)):
        x = activations(np.random.default_rng(7), 9, C, size).at[1, 2].set(0).astype(dtype)
        expected = for_product(split_outliers(x, scale, config, implementation="xla"))
        got = run(x, scale, config, form="planes")
        assert got.fixed_point
        assert got.shape == x.shape
        largest = np.abs(256 * np.asarray(expected.far, np.int32) + np.asarray(expected.near)).max()
        assert 16000 < largest <= 32639
        for field in ("far", "near"):
            a, b = getattr(got, field), getattr(expected, field)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a[..., :C], b, err_msg=field)
            assert not a[..., C:].any()
        held = np.asarray(expected.far).any(-1) | np.asarray(expected.near).any(-1)
        assert held.sum() == 2 * 9 - 1
        np.testing.assert_array_equal(got.row_scale[held], expected.row_scale[held])  # of zeros any step will do
        assert np.isfinite(got.row_scale).all()
        np.testing.assert_array_equal(got.shift, expected.shift)


@pytest.mark.parametrize(("size", "C"), [(5, 70), (100, 256), (1e30, 130)])
def test_planes_for_a_product(size, C, implementation):
    """Levels, shifts and steps, and the outliers of shifted tokens; of others nobody reads them."""
    config = OutlierConfig(n_refresh=4)
    scale = search_token_scales(activations(np.random.default_rng(8), 9, C, 1), config)
    x = activations(np.random.default_rng(7), 9, C, size).at[1, 5, 2].set(jnp.nan)
    expected = for_product(split_outliers(x, scale, config, implementation="xla"))
    got = outliers.BACKENDS[implementation].run(x, scale, config, form="planes")
    assert (got.shape, got.fixed_point) == (x.shape, False)
    fine, shifted = np.isfinite(expected.row_scale), np.asarray(expected.shift) > 0
    assert fine.sum() == fine.size - 1
    assert (0 < shifted.mean() < 1) == (size > 5)
    np.testing.assert_array_equal(got.shift, expected.shift)
    np.testing.assert_array_equal(got.row_scale, expected.row_scale)
    np.testing.assert_array_equal(got.near[fine][:, :C], expected.near[fine])
    np.testing.assert_array_equal(got.far[shifted][:, :C], expected.far[shifted])
    assert not got.near[..., C:].any()
    assert not got.far[shifted][:, C:].any()


def test_fixed_point_steps_of_non_finite_tokens_are_nan(implementation):
    config = OutlierConfig(act_bits=8, outlier_bits=16, n_refresh=4)
    x = activations(np.random.default_rng(3), 12, 33, 30)
    scale = search_token_scales(x, config)
    run = outliers.BACKENDS[implementation].run
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        planes = run(x.at[1, 2, 3].set(bad), scale, config, form="planes")
        assert np.flatnonzero(np.isnan(planes.row_scale)).tolist() == [12 + 2]


def test_a_non_finite_token_gets_a_nan_scale_and_other_windows_do_not_see_it(implementation):
    L, C, config = CASES["w6"]
    x = activations(np.random.default_rng(3), L, C, 30)
    scale = search_token_scales(x, config)
    fine = assert_same(implementation, x, scale, config)
    for bad in (jnp.inf, jnp.nan):
        broken = split_outliers(x.at[1, 2, 3].set(bad), scale, config, implementation=implementation)
        assert np.flatnonzero(np.isnan(broken.outlier_scale)).tolist() == [L + 2]
        np.testing.assert_array_equal(broken.inlier_q[0], fine.inlier_q[0])
        np.testing.assert_array_equal(broken.outlier_q[1, config.n_refresh :], fine.outlier_q[1, config.n_refresh :])


def test_a_nan_counts_as_infinite_beside_thresholds(implementation):
    """So that the list that it leaves to later tokens does not depend on what a backend's maximum makes of it."""
    L, C, config = CASES["offline"]
    x = activations(np.random.default_rng(10), L, C, 3).at[0, 1].set(0.5).at[0, 1, 7].set(jnp.nan)
    scale, theta = jnp.ones(L), jnp.full(L, 9.0)
    masks = [
        split_outliers(x, scale, config, theta=theta, implementation=name).mask for name in ("xla", implementation)
    ]
    np.testing.assert_array_equal(*masks)
    assert masks[0][0, 1:10, 7].all()


def test_a_split_has_no_gradients(implementation):
    """Not those of a "free" scale or of 16-bit outliers either, which a kernel has not."""
    for config in (CASES["free"][2], CASES["floats"][2]):
        x = activations(np.random.default_rng(11), 4, 40, 30)
        scale = search_token_scales(x, config)
        split = partial(outliers.round_activation, config=config, implementation=implementation)
        assert not jax.grad(lambda x, split=split, scale=scale: jnp.sum(split(x, scale)))(x).any()


def test_no_outlier_and_nothing_but_outliers(implementation):
    """Scales that hold everything, and thresholds below everything."""
    config = OutlierConfig(threshold="offline")
    for factor, listed in ((100.0, 0.0), (1e-3, 1.0)):
        x = activations(np.random.default_rng(1), 6, 40, 1)
        scale = search_token_scales(x, OutlierConfig()) * factor
        expected = assert_same(implementation, x, scale, config, jnp.zeros_like(scale))
        assert float(jnp.mean(expected.mask.astype(jnp.float32))) == listed


def test_reasons_against_a_call():
    x = jnp.zeros((1, 4, 8))
    scale = jnp.ones(4)
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run this call: it is Algorithm 2 itself"):
        split_outliers(x, scale, OutlierConfig(detection="none"), implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="10000 channels do not fit"):
        split_outliers(jnp.zeros((1, 4, 10000)), scale, OutlierConfig(), implementation="mosaic_gpu")
    assert "int32" in kernel.unsuitable(jax.ShapeDtypeStruct((1024, 2048, 1024), "bfloat16"), OutlierConfig())
    assert kernel.unsuitable(jnp.zeros((0, 4, 8)), OutlierConfig()) == "there is nothing to split"
    with pytest.raises(ValueError, match="it needs an NVIDIA GPU"):
        split_outliers(x, scale, OutlierConfig(), implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="unknown split implementation 'cuda'"):
        split_outliers(x, scale, OutlierConfig(), implementation="cuda")
