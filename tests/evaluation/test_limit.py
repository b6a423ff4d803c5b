"""The limit of a quantised model: what it computes, and what it leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from draws import normal
from flax import nnx

from ouromamba_jax.evaluation.limit import BareLinear, with_bare_products
from ouromamba_jax.evaluation.stand_in import quantised_stand_in
from ouromamba_jax.models import pure
from ouromamba_jax.quantize import QuantConfig, QuantLinear


@pytest.fixture(scope="module")
def quantised():
    return tiny_models.quantised(QuantConfig.preset("w4a4"))


def layers(model, kind):
    return {path: m for path, m in nnx.iter_modules(model) if isinstance(m, kind)}


def test_every_linear_layer_becomes_a_bare_product(quantised):
    bare = with_bare_products(quantised)
    assert set(layers(bare, BareLinear)) == set(layers(quantised, QuantLinear))
    assert not layers(bare, QuantLinear)
    assert not layers(quantised, BareLinear)


def test_a_bare_product_is_one_of_stored_levels(quantised):
    layer = next(iter(layers(quantised, QuantLinear).values()))
    bare = BareLinear(layer)
    x = normal(0, (3, *bare.levels.shape))
    exact = bare.levels[...].astype(jnp.float32) * bare.token_scale[...][:, None] @ layer.weight.dequantize()
    expected = exact + (0 if layer.bias is None else layer.bias[...])
    y = bare(x)
    assert y.shape == (3, *expected.shape)
    np.testing.assert_allclose(y, jnp.broadcast_to(expected[None], y.shape), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(bare(x + jnp.nan), y)


def test_what_makes_the_input_stays_in_the_program(quantised):
    """And becomes levels of 8 bits, in one fusion that the product does not share."""
    layer = next(iter(layers(quantised, QuantLinear).values()))
    graphdef, state = nnx.split(BareLinear(layer))
    shape = (3, layer.spec.tokens, layer.weight.shape[0])

    def produced(state, x):
        return nnx.merge(graphdef, state)(jnp.tanh(x))

    text = jax.jit(produced).lower(state, normal(0, shape)).compile().as_text()
    assert f"f32[{','.join(map(str, shape))}]{{2,1,0}} tanh(" in text
    assert " dot(" in text


def test_a_stand_in_is_shaped_like_what_quantize_makes():
    model = tiny_models.random_model("vim_micro", **tiny_models.TINY)
    config = QuantConfig.preset("w4a4")
    low, expected = quantised_stand_in(model, config), tiny_models.quantised(config)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(m)) for m in (low, expected)]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])
    function, state = pure(low)
    assert bool(jnp.isfinite(jax.jit(function)(state, normal(0, (2, 12, 16, 3)))).all())
