"""Algorithm 2 against a plain loop; invariance, gradients, calibration."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st

from ouromamba_jax.ops.split import fake_quant, merge, outlier_statistics, split_outliers
from ouromamba_jax.ops.split_calibration import calibrate_channels, calibrate_theta, search_token_scales
from ouromamba_jax.ops.split_types import OutlierConfig, OutlierSplit

pytestmark = pytest.mark.optimized


def activations(rng, B, L, C, *, heavy=0.05, size=20.0):
    """Gaussian with a few heavy channels and a few single heavy entries."""
    x = rng.normal(size=(B, L, C)) * np.where(rng.random(C) < heavy, size, 1)
    return (x * np.where(rng.random((B, L, C)) < 0.01, size, 1)).astype(np.float32)


def loop_algorithm_2(x, scale, config, theta=None):
    """Algorithm 2 as loops, one channel list at a time. Float32 divisions, float64 statistics."""
    q_in, q_out = 2 ** (config.act_bits - 1) - 1, 2 ** (config.outlier_bits - 1) - 1
    B, L, C = x.shape
    inlier, outlier = np.zeros((B, L, C), np.int8), np.zeros((B, L, C), np.int8)
    outlier_scale, mask = np.zeros((B, L), np.float32), np.zeros((B, L, C), bool)
    for b in range(B):
        for t in range(L):
            if t % config.n_refresh == 0:
                listed = set()
            row = np.abs(x[b, t])
            free = [c for c in range(C) if c not in listed]
            if free and max(row[c] for c in free) / np.float32(q_in) > scale[t]:
                counted = np.array([0.0 if c in listed else row[c] for c in range(C)], np.float64)
                limit = counted.mean() + config.sigma * counted.std(ddof=1) if theta is None else theta[t]
                listed |= {c for c in free if row[c] >= limit}
            top = max((row[c] for c in listed), default=np.float32(0))
            if config.outlier_scale == "free":
                s_out = max(top, np.float32(1e-8)) / np.float32(q_out)
            else:
                s_out = scale[t]
                while np.rint(top / s_out) > q_out:
                    s_out = s_out * np.float32(2)
            outlier_scale[b, t] = s_out
            for c in range(C):
                if c in listed:
                    mask[b, t, c] = True
                    outlier[b, t, c] = np.clip(np.rint(x[b, t, c] / s_out), -q_out, q_out)
                else:
                    inlier[b, t, c] = np.clip(np.rint(x[b, t, c] / scale[t]), -q_in, q_in)
    return inlier, outlier, outlier_scale, mask


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.sampled_from([(1, 1, 5), (2, 7, 48), (3, 23, 33), (2, 20, 130)]),
    st.sampled_from([(2, 8), (4, 8), (6, 8), (4, 5), (8, 8)]),
    st.sampled_from([(1, 3.0), (4, 2.0), (10, 3.0)]),
    st.sampled_from(["online", "offline"]),
    st.sampled_from(["pow2", "free"]),
    st.sampled_from([0.5, 3.0, 1e4]),
    st.integers(0, 2**32 - 1),
)
def test_split_equals_the_plain_loop(shape, bits, window, threshold, outlier_scale, size, seed):
    rng = np.random.default_rng(seed)
    x = activations(rng, *shape, size=size)
    scale = rng.uniform(0.5, 3, size=shape[1]).astype(np.float32) / (2 ** (bits[0] - 1) - 1)
    theta = rng.uniform(1, 4, size=shape[1]).astype(np.float32) if threshold == "offline" else None
    config = OutlierConfig(*bits, *window, threshold=threshold, outlier_scale=outlier_scale)
    split = split_outliers(
        jnp.asarray(x), jnp.asarray(scale), config, theta=None if theta is None else jnp.asarray(theta)
    )
    inlier, outlier, s_out, mask = loop_algorithm_2(x, scale, config, theta)
    np.testing.assert_array_equal(split.mask, mask)
    np.testing.assert_array_equal(split.outlier_scale, s_out)
    np.testing.assert_array_equal(split.inlier_q, inlier)
    np.testing.assert_array_equal(split.outlier_q, outlier)
    assert (split.inlier_q.dtype, split.outlier_q.dtype) == (jnp.int8, jnp.int8)


CONFIGS = {
    "pow2": OutlierConfig(),
    "free": OutlierConfig(outlier_scale="free"),
    "offline": OutlierConfig(threshold="offline"),
    "static": OutlierConfig(detection="static"),
    "none": OutlierConfig(detection="none"),
    "float": OutlierConfig(act_bits=8, outlier_bits=16),
}


def calibrated(config, x):
    """(scale, theta, channels) for a config."""
    channels = calibrate_channels(x, config) if config.detection == "static" else None
    theta = calibrate_theta(x, config) if config.threshold == "offline" else None
    return search_token_scales(x, config, channels=channels), theta, channels


@pytest.mark.parametrize(("name", "jit"), [*((name, True) for name in CONFIGS), ("pow2", False)])
def test_a_sample_keeps_its_bits_in_any_batch(name, jit):
    config = CONFIGS[name]
    x = jnp.asarray(activations(np.random.default_rng(7), 8, 23, 48))
    scale, theta, channels = calibrated(config, x)
    split = partial(split_outliers, config=config, theta=theta, channels=channels)
    function = (
        jax.jit(lambda x: (split(x, scale), merge(split(x, scale))))
        if jit
        else lambda x: (
            split(x, scale),
            merge(split(x, scale)),
        )
    )
    whole = function(x)
    arrays = lambda tree: [a for a in jax.tree.leaves(tree) if a.shape[:1] != (23,)]  # noqa: E731
    order = np.random.default_rng(8).permutation(8)
    for a, b in zip(arrays(whole), arrays(function(x[order])), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[order], b)
    for size in (1, 3):
        for a, b in zip(arrays(whole), arrays(function(x[:size])), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[:size], b)


@pytest.mark.parametrize("name", CONFIGS)
def test_fake_quant_is_the_merged_split_and_reaches_every_scale(name):
    config = CONFIGS[name]
    x = jnp.asarray(activations(np.random.default_rng(9), 2, 23, 48))
    scale, theta, channels = calibrated(config, x)
    fake = partial(fake_quant, config=config, theta=theta, channels=channels)
    expected = merge(split_outliers(x, scale, config, theta=theta, channels=channels))
    np.testing.assert_array_equal(fake(x, scale), expected)
    weights = jnp.asarray(np.random.default_rng(10).normal(size=x.shape).astype(np.float32))
    d_x, d_scale = jax.jit(jax.grad(lambda x, s: jnp.sum(weights * fake(x, s)), argnums=(0, 1)))(x, scale)
    assert np.all(np.asarray(d_scale) != 0)
    assert np.isfinite(np.asarray(d_scale)).all()
    split = split_outliers(x, scale, config, theta=theta, channels=channels)
    q = 2 ** (config.act_bits - 1) - 1
    ratio = np.asarray(x) / np.asarray(scale)[None, :, None]
    inside = ~np.asarray(split.mask) & (np.abs(ratio) < q + 0.499)
    np.testing.assert_allclose(np.asarray(d_x)[inside], np.asarray(weights)[inside], rtol=tolerances.SCALE_ROUNDING)


@pytest.mark.parametrize("pow2", [True, False])
def test_near_holds_all_levels_of_tokens_that_are_not_shifted(pow2):
    rng = np.random.default_rng(12)
    shape = (2, 9, 20)
    mask = rng.random(shape) < 0.3
    inlier = np.where(mask, 0, rng.integers(-7, 8, size=shape)).astype(np.int8)
    outlier = np.where(mask, rng.integers(-127, 128, size=shape), 0).astype(np.int8)
    scale = rng.uniform(0.1, 1, size=9).astype(np.float32)
    outlier_scale = scale * np.ldexp(np.float32(1), rng.integers(0, 2, size=shape[:2]))
    outlier_scale[1, 3] = np.nan
    arrays = map(jnp.asarray, (inlier, outlier, outlier_scale, mask, scale))
    split = OutlierSplit.from_levels(*arrays, pow2=pow2)
    np.testing.assert_array_equal(split.inlier_q, inlier)
    np.testing.assert_array_equal(split.outlier_q, outlier)
    together = (outlier_scale == scale)[:, :, None] & pow2
    assert 0.2 < together.mean() < 0.8 or not pow2
    np.testing.assert_array_equal(split.near, inlier + np.where(together, outlier, 0))
    np.testing.assert_array_equal(split.far, np.where(together, 0, outlier))
    assert split.near.dtype == split.far.dtype == jnp.int8


def test_scale_gradient_is_the_lsq_formula():
    config = OutlierConfig()
    x = activations(np.random.default_rng(11), 2, 12, 40)
    scale = search_token_scales(jnp.asarray(x), config)
    split = split_outliers(jnp.asarray(x), scale, config)
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(fake_quant(jnp.asarray(x), s, config))))(scale)
    s, mask, s_out = (
        np.asarray(scale)[None, :, None],
        np.asarray(split.mask),
        np.asarray(split.outlier_scale)[..., None],
    )
    ratio = x / s
    inlier = np.where(np.abs(np.rint(ratio)) <= 7, np.rint(ratio) - ratio, 7 * np.sign(ratio))
    outlier = (np.rint(x / s_out) - x / s_out) * (s_out / s)
    np.testing.assert_allclose(
        gradient, np.where(mask, outlier, inlier).sum((0, 2)), rtol=tolerances.EPILOGUE, atol=tolerances.EPILOGUE * 127
    )


@pytest.mark.parametrize(
    ("ratio", "power"), [(127, 1), (127.4, 1), (127.5, 2), (128, 2), (254, 2), (256, 4), (2.0**30, 2.0**24)]
)
def test_power_of_two_is_the_smallest_that_clips_nothing(ratio, power):
    scale = np.float32(0.25)
    x = np.random.default_rng(12).uniform(-1, 1, size=(1, 1, 64)).astype(np.float32)
    x[0, 0, 5] = -ratio * scale
    split = split_outliers(jnp.asarray(x), jnp.asarray([scale]), OutlierConfig())
    assert bool(split.mask[0, 0, 5])
    assert float(split.outlier_scale[0, 0]) == power * scale


def test_rows_without_outliers():
    x = jnp.asarray(np.random.default_rng(13).uniform(-0.3, 0.3, size=(2, 12, 16)).astype(np.float32))
    scale = jnp.full((12,), 0.25, jnp.float32)
    pow2, free, wide = (split_outliers(x, scale, CONFIGS[name]) for name in ("pow2", "free", "float"))
    assert not any(np.asarray(s.mask).any() for s in (pow2, free, wide))
    np.testing.assert_array_equal(pow2.outlier_scale, np.full((2, 12), 0.25, np.float32))
    assert (np.asarray(free.outlier_scale) > 0).all()
    np.testing.assert_array_equal(wide.outlier_scale, np.ones((2, 12), np.float32))


def test_sixteen_bit_outliers_keep_their_type_and_value():
    x = jnp.asarray(activations(np.random.default_rng(14), 2, 23, 48)).astype(jnp.bfloat16)
    config = CONFIGS["float"]
    split = split_outliers(x, search_token_scales(x, config), config)
    assert split.outlier_q.dtype == jnp.bfloat16
    mask = np.asarray(split.mask)
    assert 0 < mask.mean() < 0.5
    np.testing.assert_array_equal(np.asarray(merge(split))[mask], np.asarray(x.astype(jnp.float32))[mask])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_non_finite_tokens_are_visible_and_stay_alone(name, value):
    config = CONFIGS[name]
    x = activations(np.random.default_rng(15), 2, 23, 48)
    scale, theta, channels = calibrated(config, jnp.asarray(x))
    broken = x.copy()
    broken[1, 4, 7] = value
    split = partial(split_outliers, scale=scale, config=config, theta=theta, channels=channels)
    fine, bad = np.asarray(merge(split(jnp.asarray(x)))), np.asarray(merge(split(jnp.asarray(broken))))
    assert np.isnan(bad[1, 4]).all() == (not np.isfinite(value))
    np.testing.assert_array_equal(bad[0], fine[0])
    np.testing.assert_array_equal(bad[1, 10:], fine[1, 10:])


@pytest.mark.parametrize("channel", [0, 3, 64, 199])
def test_a_nan_is_seen_in_every_place(channel):
    x = activations(np.random.default_rng(29), 2, 70, 200)
    x[1, 4, channel] = np.nan
    scale = jnp.full((70,), 0.3, jnp.float32)
    for config in (OutlierConfig(), OutlierConfig(outlier_scale="free"), OutlierConfig(act_bits=8, outlier_bits=16)):
        broken = np.isnan(split_outliers(jnp.asarray(x), scale, config).outlier_scale)
        np.testing.assert_array_equal(np.argwhere(broken), [[1, 4]])


def test_paper_scales_may_use_the_full_range():
    x = jnp.asarray(np.random.default_rng(16).choice([-0.875, 0.25, 0.875], size=(2, 3, 64)).astype(np.float32))
    scale = search_token_scales(x, OutlierConfig(act_bits=4))
    np.testing.assert_array_equal(scale, np.full(3, 0.125, np.float32))


def test_theta_is_the_online_statistic_averaged():
    x = activations(np.random.default_rng(17), 3, 7, 48)
    config = OutlierConfig(n_refresh=4, threshold="offline")
    expected = np.zeros((3, 7))
    for b in range(3):
        for t in range(7):
            if t % 4 == 0:
                listed = np.zeros(48, bool)
            free = np.where(listed, 0, np.abs(x[b, t].astype(np.float64)))
            expected[b, t] = free.mean() + 3 * free.std(ddof=1)
            listed |= free > expected[b, t]
    np.testing.assert_allclose(calibrate_theta(jnp.asarray(x), config), expected.mean(0), rtol=1e-5)


def test_static_channels_are_the_heavy_ones():
    rng = np.random.default_rng(18)
    x = rng.normal(size=(4, 9, 64)).astype(np.float32)
    x[:, :, [5, 40]] = rng.choice([-30.0, 30.0], size=(4, 9, 2)) * rng.uniform(0.9, 1.1, size=(4, 9, 2))
    config = OutlierConfig(detection="static")
    channels = calibrate_channels(jnp.asarray(x), config)
    np.testing.assert_array_equal(np.flatnonzero(channels), [5, 40])
    split = split_outliers(
        jnp.asarray(x), search_token_scales(jnp.asarray(x), config, channels=channels), config, channels=channels
    )
    np.testing.assert_array_equal(split.mask, np.broadcast_to(np.asarray(channels), x.shape))


@pytest.mark.parametrize("statistic", ["mean", "max"])
def test_the_static_list_has_the_dynamic_budget_and_the_largest_channels(statistic):
    x = activations(np.random.default_rng(23), 6, 20, 64)
    listed = split_outliers(jnp.asarray(x), jnp.full((20,), 1e-6, jnp.float32), OutlierConfig(n_refresh=1)).mask
    channels = np.asarray(
        calibrate_channels(jnp.asarray(x), OutlierConfig(detection="static", static_list=statistic, n_refresh=1))
    )
    budget = int(np.ceil(np.asarray(listed).sum(axis=-1).mean()))
    assert 0 < budget < 32
    order = np.argsort(-getattr(np.abs(x), statistic)(axis=(0, 1)))
    np.testing.assert_array_equal(np.flatnonzero(channels), np.sort(order[:budget]))


def test_statistics_count_outliers_and_shifted_tokens():
    x = np.random.default_rng(19).uniform(-1, 1, size=(1, 2, 100)).astype(np.float32)
    x[0, 0, 3], x[0, 1, 3] = 20, 500
    stats = outlier_statistics(split_outliers(jnp.asarray(x), jnp.full((2,), 0.2, jnp.float32), OutlierConfig()))
    assert stats.rate == pytest.approx(0.01)
    assert stats.shifted_rows == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["pow2", "free", "16"])
def test_without_its_mask_a_split_is_the_same(name):
    fields = dict(free=dict(outlier_scale="free"), pow2={}).get(name, dict(act_bits=8, outlier_bits=16))
    config = OutlierConfig(**fields)
    x = jnp.asarray(activations(np.random.default_rng(5), 2, 13, 30, size=200.0))
    scale = search_token_scales(x, config)
    full, bare = (split_outliers(x, scale, config, with_mask=m) for m in (True, False))
    np.testing.assert_array_equal(merge(bare), merge(full))
    np.testing.assert_array_equal(bare.near, full.near)
    np.testing.assert_array_equal(bare.far, full.far)
    assert bare.mask is None
    with pytest.raises(ValueError, match="without its mask"):
        outlier_statistics(bare)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_bits": 16}, "not a number of levels"),
        ({"outlier_bits": 256}, "outlier_bits"),
        ({"act_bits": 6, "outlier_bits": 4}, "outlier_bits"),
        ({"n_refresh": 0}, "n_refresh"),
        ({"sigma": 0.0}, "sigma"),
        ({"threshold": "on"}, "online, offline"),
        ({"spec": "released"}, "outlier_scale"),
    ],
)
def test_config_refuses_contradictions(fields, message):
    with pytest.raises(ValueError, match=message):
        OutlierConfig(**fields)


def test_missing_or_misshapen_arguments_are_named():
    x = jnp.asarray(np.random.default_rng(20).normal(size=(1, 5, 8)).astype(np.float32))
    scale = jnp.full((5,), 0.3, jnp.float32)
    with pytest.raises(ValueError, match="token count"):
        split_outliers(x, scale[:4], OutlierConfig())
    with pytest.raises(ValueError, match="calibrate_theta"):
        split_outliers(x, scale, OutlierConfig(threshold="offline"))
    with pytest.raises(ValueError, match="calibrate_channels"):
        split_outliers(x, scale, OutlierConfig(detection="static"))
