"""What calibration finds: thresholds, steps, their reach and fixed lists, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from split_loop import largest_levels, loop_loss, loop_split, loop_step, loop_theta

from ouromamba_jax import OutlierConfig, split_outliers
from ouromamba_jax.ops.passes import gather, together
from ouromamba_jax.ops.split_calibration import calibrate, calibrating, theta_sum

pytestmark = pytest.mark.optimized


def activations(seed: int, B: int, L: int, C: int) -> np.ndarray:
    """Gaussian with a few heavy channels and a few single heavy entries."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, L, C)) * np.where(rng.random(C) < 0.1, 15, 1)
    return (x * np.where(rng.random((B, L, C)) < 0.01, 20, 1)).astype(np.float32)


@pytest.mark.parametrize(("L", "config"), [(7, OutlierConfig(n_refresh=4)), (23, OutlierConfig(sigma=2.0))])
def test_theta_and_steps_equal_a_loop(L, config):
    x = activations(0, 3, L, 48)
    found = calibrate(jnp.asarray(x), config)
    theta = loop_theta(x, config)
    np.testing.assert_allclose(theta_sum(jnp.asarray(x), config) / len(x), theta, rtol=1e-5)
    assert (found.theta == (theta_sum(jnp.asarray(x), config) / len(x)).astype(jnp.bfloat16)).all()
    beyond_theta = loop_split(x, np.full(L, 1e-6, np.float32), config, theta=np.asarray(found.theta, np.float32))[1]
    assert 0.02 < beyond_theta.mean() < 0.5
    steps = np.array([loop_step(np.where(beyond_theta, 0, x)[:, t], 7) for t in range(L)])
    reached = np.abs(x).max((0, 2)) <= 127 * steps  # elsewhere steps are raised, see below
    assert reached.mean() > 0.5
    np.testing.assert_allclose(np.asarray(found.scale)[reached], steps[reached], rtol=tolerances.SCALE_ROUNDING)
    assert found.channels is None
    largest = calibrate(jnp.asarray(x), config, search=False).scale
    expected = np.abs(np.where(beyond_theta, 0, x)).max((0, 2)) / np.float32(7)
    np.testing.assert_allclose(np.asarray(largest)[reached], expected[reached], rtol=tolerances.SCALE_ROUNDING)


def test_steps_may_use_the_full_range():
    x = jnp.asarray(np.random.default_rng(16).choice([-0.875, 0.25, 0.875], size=(2, 3, 64)).astype(np.float32))
    np.testing.assert_array_equal(calibrate(x, OutlierConfig()).scale, np.full(3, 0.125, np.float32))


def on_the_grid(outliers: np.ndarray, samples: int = 2) -> np.ndarray:
    """(samples, 4, 128) levels of 4 bits, so that the step is 1; in the first sample, an outlier at every token."""
    x = np.random.default_rng(5).integers(-7, 8, (samples, 4, 128)).astype(np.float32)
    x[:, :, 1] = 7
    x[0, :, 0] = outliers
    return x


def off_the_grid(outliers, samples=2):
    """`on_the_grid` with inliers that are no levels, so that every step has a loss."""
    x = on_the_grid(outliers, samples)
    inliers = np.random.default_rng(3).uniform(-7, 7, x.shape).astype(np.float32)
    return np.where(np.abs(x) > 7, x, inliers)


def test_a_step_is_raised_until_outliers_fit_where_that_loses_less():
    config = OutlierConfig()
    base = np.asarray(calibrate(jnp.asarray(off_the_grid(np.full(4, 90, np.float32))), config).scale)
    x = off_the_grid(np.float32([90, 120, 135, 150]))
    found = calibrate(jnp.asarray(x), config)
    assert found.shift is None
    expected = np.maximum(base, np.float32([90, 120, 135, 150]) / 127)
    assert (expected[2:] > base[2:]).all()
    np.testing.assert_allclose(found.scale, expected, rtol=tolerances.SCALE_ROUNDING)
    theta = np.asarray(found.theta, np.float32)
    before, after = (loop_loss(x, scale, config, theta=theta) for scale in (base, np.asarray(found.scale)))
    np.testing.assert_array_equal(after < before, [False, False, True, True])


@pytest.mark.parametrize(("outlier_bits", "samples"), [(5, 2), (8, 2), (8, 100)])
def test_else_outliers_get_a_second_byte(outlier_bits, samples):
    """Where one token loses more than twice as much by a raised step: the smallest shifts, and steps as they were."""
    config = OutlierConfig(outlier_bits=outlier_bits)
    Q = largest_levels(config)[1]
    x = on_the_grid(Q * np.float32([0.9, 1.02, 2, 5]), samples)
    found = calibrate(jnp.asarray(x), config)
    np.testing.assert_array_equal(found.scale, np.ones(4, np.float32))
    np.testing.assert_array_equal(found.shift, [0, 1, 1, 3])
    split = found.split(jnp.asarray(x), config)
    assert split.high is not None
    error = np.abs(np.asarray(split.merge()) - x)[0, :, 0]
    assert (error <= 0.5 * 2.0 ** np.asarray(found.shift)).all()
    wide = calibrate(jnp.asarray(x), OutlierConfig(outlier_bits=16))
    assert wide.shift is None
    np.testing.assert_array_equal(wide.scale, found.scale)


def test_a_huge_outlier_leaves_the_inliers_their_levels():
    config = OutlierConfig()
    x = off_the_grid(np.float32([90, 90, 90, 1e4]))
    found = calibrate(jnp.asarray(x), config)
    base = calibrate(jnp.asarray(off_the_grid(np.full(4, 90, np.float32))), config)
    np.testing.assert_array_equal(found.scale, base.scale)
    np.testing.assert_array_equal(found.shift, [0, 0, 0, 7])


@pytest.mark.parametrize(("channels", "sigma", "steps"), [(10, 3.0, 1), (10, 2.0, 12), (11, 3.0, 12), (1, 3.0, 1)])
def test_few_channels_have_one_step(channels, sigma, steps):
    """None of ten values lies three deviations above their mean."""
    x = activations(6, 2, 12, channels)
    found = calibrate(jnp.asarray(x), OutlierConfig(sigma=sigma, outlier_bits=16))
    assert found.theta.shape == found.scale.shape == (12,)
    assert len(np.unique(found.scale)) == steps
    if steps == 1:
        np.testing.assert_allclose(found.scale[0], loop_step(x, 7), rtol=tolerances.SCALE_ROUNDING)


@pytest.mark.parametrize("config", [OutlierConfig(detection="none"), OutlierConfig(4, 4), OutlierConfig(4, 4, 5, 2.0)])
def test_where_nothing_is_set_apart_steps_fit_every_entry(config):
    x = activations(7, 2, 12, 40)
    found = calibrate(jnp.asarray(x), config)
    assert (found.theta, found.shift, found.channels) == (None, None, None)
    expected = [loop_step(x[:, t], 7) for t in range(12)]
    np.testing.assert_allclose(found.scale, expected, rtol=tolerances.SCALE_ROUNDING)


def test_static_channels_are_the_heavy_ones():
    rng = np.random.default_rng(18)
    x = rng.normal(size=(4, 9, 64)).astype(np.float32)
    x[:, :, [5, 40]] = rng.choice([-30.0, 30.0], size=(4, 9, 2)) * rng.uniform(0.9, 1.1, size=(4, 9, 2))
    config = OutlierConfig(detection="static", n_refresh=1)
    found = calibrate(jnp.asarray(x), config)
    np.testing.assert_array_equal(np.flatnonzero(found.channels), [5, 40])
    assert found.theta is None
    inliers = np.where(np.asarray(found.channels), 0, x)
    expected = [loop_step(inliers[:, t], 7) for t in range(9)]
    np.testing.assert_allclose(found.scale, expected, rtol=tolerances.SCALE_ROUNDING)
    np.testing.assert_array_equal(
        found.split(jnp.asarray(x), config).listed(), np.broadcast_to(found.channels, x.shape)
    )


@pytest.mark.parametrize("statistic", ["mean", "max"])
def test_the_static_list_has_the_dynamic_budget_and_the_largest_channels(statistic):
    x = activations(23, 6, 20, 64)
    config = OutlierConfig(detection="static", static_list=statistic, n_refresh=1)
    theta = theta_sum(jnp.asarray(x), config) / len(x)
    tiny = jnp.full((20,), 1e-6)
    listed = split_outliers(jnp.asarray(x), tiny, OutlierConfig(n_refresh=1), theta=theta).listed()
    budget = int(np.ceil(np.asarray(listed).sum(axis=-1).mean()))
    assert 0 < budget < 32
    order = np.argsort(-getattr(np.abs(x), statistic)(axis=(0, 1)))
    channels = calibrate(jnp.asarray(x), config).channels
    np.testing.assert_array_equal(np.flatnonzero(channels), np.sort(order[:budget]))


@pytest.mark.parametrize(
    ("channels", "config"),
    [
        (48, OutlierConfig(outlier_bits=5)),
        (48, OutlierConfig(detection="static", static_list="mean")),
        (48, OutlierConfig(detection="static", static_list="max")),
        (48, OutlierConfig(detection="none")),
        (5, OutlierConfig()),
    ],
)
def test_batches_change_nothing(channels, config):
    """Two batches side by side with another activation, each in as many passes as it needs."""
    x, other = activations(31, 6, 7, channels), activations(32, 6, 7, 48)
    asking = together(
        {
            "x": calibrating(config, of=lambda batch: batch[0]),
            "other": calibrating(OutlierConfig(), of=lambda batch: batch[1]),
        }
    )
    passes = []

    def batches():
        passes.append(0)
        return ([jnp.asarray(part) for part in pair] for pair in ((x[:4], other[:4]), (x[4:], other[4:])))

    found = gather(asking, batches)
    for made, whole in ((found["x"], (x, config)), (found["other"], (other, OutlierConfig()))):
        expected = calibrate(jnp.asarray(whole[0]), whole[1])
        assert jax.tree.structure(made) == jax.tree.structure(expected)
        for one, two in zip(*map(jax.tree.leaves, (made, expected)), strict=True):
            np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(two, np.float32), rtol=1e-6)
    assert len(passes) <= 6
