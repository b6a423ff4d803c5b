"""Algorithm 2 on one grid: levels against a plain loop, independence of samples, gradients by formula, errors."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from split_loop import loop_split

from ouromamba_jax import OutlierConfig, split_outliers
from ouromamba_jax.ops.producers import gelu, split_after
from ouromamba_jax.ops.split import fake_quant

pytestmark = pytest.mark.optimized


def steps(rng, L):
    """Powers of two for half of the tokens: there, ties are exact."""
    scale = rng.uniform(0.05, 0.4, L)
    return np.where(np.arange(L) % 2, scale, 2.0 ** np.round(np.log2(scale))).astype(np.float32)


def samples(rng, scale, theta, q, C):
    """One sample each (7, L, C): normal, heavy-tailed, no outlier, nothing else, ties, at the limit, infinite."""
    L = len(scale)
    S, limit = scale[:, None], np.maximum(theta, np.float32(q) * scale)[:, None]
    sign = rng.choice(np.float32([-1, 1]), (L, C))
    ties = S * (rng.integers(-2 * q, 2 * q, (L, C)) + np.float32(0.5))
    edge = np.where(rng.random((L, C)) < 0.2, np.nextafter(limit, np.float32(np.inf)), limit)
    kinds = (
        rng.standard_normal((L, C)),
        rng.standard_t(1.2, (L, C)) * rng.choice([1, 1, 1, 100], C),
        rng.uniform(-1, 1, (L, C)) * q * S,
        limit * rng.uniform(1.01, 300, (L, C)) * sign,
        ties,
        edge * sign,
        np.where(rng.random((L, C)) < 0.1, sign * np.float32(np.inf), rng.standard_normal((L, C))),
    )
    return np.stack([np.asarray(kind, np.float32) for kind in kinds])


# (act_bits, outlier_bits, n_refresh), tokens, channels, with theta, with shift
CASES = [
    ((2, 8, 10), 23, 33, True, False),
    ((3, 16, 4), 23, 33, True, False),
    ((4, 8, 10), 23, 33, True, False),
    ((4, 8, 1), 23, 33, True, True),
    ((5, 8, 40), 23, 33, True, True),
    ((6, 16, 10), 23, 33, False, True),  # which ignores the shift
    ((7, 8, 4), 20, 33, False, True),
    ((8, 8, 10), 7, 1, True, False),
    ((8, 16, 10), 1, 33, True, False),
    ((4, 4, 10), 7, 33, True, False),
    ((4, 8, 200), 150, 5, True, True),  # windows too long for int8
]


@pytest.mark.parametrize(("settings", "L", "C", "with_theta", "with_shift"), CASES)
def test_levels_are_those_of_the_plain_loop(settings, L, C, with_theta, with_shift):
    """And `fake_quant` is `merge`, to the bit."""
    rng = np.random.default_rng(sum(settings))
    config = OutlierConfig(*settings)
    q = 2 ** (config.act_bits - 1) - 1
    scale, theta = steps(rng, L), (rng.uniform(0.3, 1.7, L) * q * 0.2).astype(np.float32)
    shift = rng.integers(0, 9, L).astype(np.int8) if with_shift else None
    theta = theta if with_theta else None
    x = samples(rng, scale, np.zeros(L, np.float32) if theta is None else theta, q, C)
    levels, listed = loop_split(x, scale, config, theta=theta, shift=None if config.outlier_bits == 16 else shift)
    assert L * C < 100 or 0.1 < listed.mean() < 0.9
    call = dict(theta=theta, shift=shift)
    split = split_outliers(jnp.asarray(x), scale, config, **call)
    np.testing.assert_array_equal(split.listed(), listed)
    np.testing.assert_array_equal(split.levels(), levels)
    np.testing.assert_array_equal(split.merge(), levels.astype(np.float32) * scale[:, None])
    assert split.low.dtype == jnp.int8
    assert (split.high is None) == (config.outlier_bits <= 8 and shift is None)
    assert split.high is None or split.high.dtype == jnp.int8
    np.testing.assert_array_equal(fake_quant(jnp.asarray(x), scale, config, **call), split.merge())


@pytest.mark.parametrize("detection", ["static", "none"])
def test_fixed_lists(detection):
    rng = np.random.default_rng(1)
    config = OutlierConfig(detection=detection)
    scale, channels = steps(rng, 13), rng.random(20) < 0.3 if detection == "static" else None
    x = jnp.asarray(rng.standard_t(2, (3, 13, 20)), jnp.float32)
    levels, listed = loop_split(np.asarray(x), scale, config, channels=channels)
    assert listed.any() == (detection == "static")
    split = split_outliers(x, scale, config, channels=channels)
    np.testing.assert_array_equal(split.listed(), listed)
    np.testing.assert_array_equal(split.levels(), levels)
    np.testing.assert_array_equal(fake_quant(x, scale, config, channels=channels), split.merge())


def test_half_precision_is_split_as_the_floats_that_it_holds():
    rng = np.random.default_rng(2)
    x, scale = jnp.asarray(rng.standard_t(2, (2, 12, 30)), jnp.bfloat16), steps(rng, 12)
    half, whole = (split_outliers(value, scale, OutlierConfig()) for value in (x, x.astype(jnp.float32)))
    jax.tree.map(np.testing.assert_array_equal, half, whole)


@pytest.mark.parametrize("with_shift", [False, True])
@pytest.mark.parametrize("bits", [(4, 8), (8, 16)])
def test_a_sample_does_not_depend_on_its_mates_and_nan_on_nothing(bits, with_shift):
    """NaN becomes level 0 and lists no channel."""
    rng = np.random.default_rng(3)
    config, scale = OutlierConfig(*bits), steps(rng, 23)
    shift = rng.integers(0, 9, 23).astype(np.int8) if with_shift else None
    x = rng.standard_t(1.5, (6, 23, 48)).astype(np.float32)
    x[2, 3, 7], x[2, 12, 9], x[4, 22] = np.nan, -np.nan, np.nan
    split = partial(split_outliers, scale=scale, config=config, shift=shift)
    whole = np.asarray(split(jnp.asarray(x)).levels())
    shift = None if bits[1] == 16 else shift
    np.testing.assert_array_equal(whole, loop_split(np.nan_to_num(x, nan=0.0), scale, config, shift=shift)[0])
    order = rng.permutation(6)
    np.testing.assert_array_equal(split(jnp.asarray(x[order])).levels(), whole[order])
    np.testing.assert_array_equal(split(jnp.asarray(x[2:4])).levels(), whole[2:4])


@pytest.mark.parametrize("case", ["one byte", "two bytes", "shifted", "none"])
def test_gradients_are_those_of_lsq(case):
    """To x: 1 where nothing is clipped. To the step: round(r) - r there, else +-the largest level; r = x / step."""
    rng = np.random.default_rng(4)
    config = {"two bytes": OutlierConfig(8, 16), "none": OutlierConfig(detection="none")}.get(case, OutlierConfig())
    L = 23
    scale = steps(rng, L) / (4 if case == "two bytes" else 1)
    scale = np.where(np.arange(L) % 5, scale, scale / 1000).astype(np.float32)  # some outliers are clipped, too
    shift = rng.integers(0, 9, L).astype(np.int8) if case == "shifted" else None
    x = rng.standard_t(1.5, (2, L, 48)).astype(np.float32)
    weights = rng.standard_normal(x.shape).astype(np.float32)

    def loss(x, scale):
        return jnp.sum(weights * fake_quant(x, scale, config, shift=shift))

    to_x, to_scale = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(x), jnp.asarray(scale))
    listed = loop_split(x, scale, config, shift=shift)[1]
    unit = np.where(
        listed, 2.0 ** (0 if shift is None else shift.astype(float))[..., None] if shift is not None else 1, 1
    )
    bound = np.where(listed, config.largest_outlier, config.largest_inlier)
    ratio = x.astype(np.float64) / (scale[:, None] * unit)
    inside = np.abs(np.round(ratio)) <= bound
    assert case == "none" or (inside & listed).any()
    assert (~inside & (listed if case != "none" else True)).any()
    np.testing.assert_allclose(to_x, np.where(inside, weights, 0), rtol=tolerances.SCALE_ROUNDING)
    each = weights * unit * np.where(inside, np.round(ratio) - ratio, np.sign(ratio) * bound)
    largest = np.abs(each).max(axis=(0, 2))
    assert (np.abs(np.asarray(to_scale) - each.sum(axis=(0, 2))) <= tolerances.EPILOGUE * 48 * largest).all()
    assert (np.asarray(to_scale) != 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_bits": 16}, "not a number of levels"),
        ({"outlier_bits": 256}, "outlier_bits"),
        ({"act_bits": 6, "outlier_bits": 4}, "outlier_bits"),
        ({"n_refresh": 0}, "n_refresh"),
        ({"sigma": 0.0}, "sigma"),
        ({"detection": "on"}, "'dynamic', 'static' or 'none'"),
        ({"static_list": "median"}, "'mean' or 'max'"),
    ],
)
def test_config_refuses_contradictions(fields, message):
    with pytest.raises(ValueError, match=message):
        OutlierConfig(**fields)


def test_missing_or_misshapen_arguments_are_named():
    x, scale = jnp.ones((1, 5, 8)), jnp.full((5,), 0.3)
    config = OutlierConfig()
    with pytest.raises(ValueError, match="token count"):
        split_outliers(x, scale[:4], config)
    with pytest.raises(ValueError, match="theta must be of scale's shape"):
        split_outliers(x, scale, config, theta=scale[:4])
    with pytest.raises(ValueError, match="shift must be of scale's shape"):
        fake_quant(x, scale, config, shift=jnp.zeros(4, jnp.int8))
    with pytest.raises(ValueError, match=r"Calibration\.channels"):
        split_outliers(x, scale, replace(config, detection="static"))
    with pytest.raises(ValueError, match=r"choose one of .*xla"):
        split_outliers(x, scale, config, implementation="cuda")


def test_a_split_for_a_product_does_not_say_what_is_listed():
    x, scale = jnp.ones((1, 5, 8)), jnp.full((5,), 0.3)
    split, _ = split_after(gelu, (x,), dict(approximate=True), scale, OutlierConfig())
    np.testing.assert_array_equal(split.levels(), split_outliers(jax.nn.gelu(x), scale, OutlierConfig()).levels())
    with pytest.raises(ValueError, match="use split_outliers"):
        split.listed()
