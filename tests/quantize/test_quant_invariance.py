"""What a quantised model makes of a sample does not depend on the other samples of its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, student_t
from tiny_models import FAMILIES, quantised
from tolerances import BATCHED_FLOAT

from ouromamba_jax import QuantConfig, QuantRule, pure
from ouromamba_jax.quantize import OPERANDS

BATCH = 6
CASES = [
    ("vim", QuantConfig.preset("w4a4", operands=OPERANDS)),
    pytest.param("vmamba", QuantConfig.preset("w4a8"), marks=pytest.mark.slow),
    pytest.param("mambavision", QuantConfig.preset("w4a4"), marks=pytest.mark.slow),
    pytest.param("vit", QuantConfig.preset("w4a4"), marks=pytest.mark.slow),
]


def spiky_images(family: str, key: int) -> jax.Array:
    """Half of the images hold rare pixels up to 60 times their standard deviation, and half none."""
    shape = (BATCH, *FAMILIES[family]["img_size"], 3)
    is_heavy = (jnp.arange(BATCH) % 2 == 0)[:, None, None, None]
    return jnp.where(is_heavy, student_t(key, shape, 1.2, 60), normal(key + 100, shape))


@pytest.mark.parametrize(("family", "config"), CASES)
def test_mates_do_not_change_a_sample(family, config):
    """Detection and products are integers; what stays float is XLA's own, and may round by the size of a batch."""
    fn, state = pure(quantised(config, family))
    fn, images = jax.jit(fn), spiky_images(family, 0)
    expected = np.asarray(fn(state, images))
    size = np.abs(expected).max()
    assert np.isfinite(expected).all()
    assert (expected.std(axis=0) > 0).all()

    def assert_same(logits, samples):
        np.testing.assert_allclose(logits, expected[samples], rtol=0, atol=BATCHED_FLOAT * size)

    order = np.random.default_rng(0).permutation(BATCH)
    assert_same(fn(state, images[order]), order)
    others = spiky_images(family, 1).at[3].set(images[3]).at[2].set(jnp.nan)
    assert_same(fn(state, others)[3], 3)
    assert_same(fn(state, images[3:5]), slice(3, 5))


@pytest.mark.parametrize("family", ["vim", pytest.param("vmamba", marks=pytest.mark.slow)])
def test_a_sample_that_is_not_finite_has_nan_logits(family):
    """Though integers hold no NaN: here one token's residual stream does, and none that the head reads."""
    config = QuantConfig.preset("w4a4", rules=(QuantRule("^stem", skip=True),))
    fn, state = pure(quantised(config, family))
    images = spiky_images(family, 0).at[1, 0, 0, 0].set(jnp.nan).at[4, 0, 0, 0].set(jnp.inf)
    logits = np.asarray(jax.jit(fn)(state, images))
    np.testing.assert_array_equal(np.isnan(logits), np.isin(np.arange(BATCH), [1, 4])[:, None] & np.full((1, 7), True))
