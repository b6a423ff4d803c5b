"""Stochastic depth and rematerialisation: what a training step of a model computes, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from draws import normal
from flax import nnx
from tiny_models import random_model

import ouromamba_jax as om
from ouromamba_jax.models import create_model
from ouromamba_jax.models.windows import join_windows, split_windows

FIELDS = {
    "vim": {**tiny_models.TINY, "depth": 2},
    "vmamba": dict(img_size=(12, 16), dims=(8,), depths=(2,), num_classes=7),
    "mambavision": {**tiny_models.FAMILIES["mambavision"], "depths": (1, 1), "layer_scale": None},
    "vit": {**tiny_models.FAMILIES["vit"], "depth": 2},
}


@pytest.fixture(scope="module", params=FIELDS)
def model(request):
    made = random_model(f"{request.param}_micro", **FIELDS[request.param])
    made.drop_path = 0.5
    return made


def by_hand(model, images, factors):
    """Logits where the updates of block i are multiplied by factors[:, i]."""
    x = model.stem(images)
    for i, block in enumerate(model.blocks):
        first, second = (factors[:, i, k].reshape(-1, *(1,) * (x.ndim - 1)) for k in range(2))
        if model.family == "vim":
            x = x + first * block.mixer(block.norm(x))
        elif model.family == "vit":
            x = x + first * block.mixer(block.norm1(x))
            x = x + second * block.mlp(block.norm2(x))
        elif model.family == "vmamba":
            x = x + first * block.mixer(block.norm(x))
            x = x + second * block.mlp(block.norm2(x))
        elif i == 0:
            x = x + first * block.conv2(jax.nn.gelu(block.conv1(x), approximate=True))
        else:
            x = block._enter(x)
            update = block.mixer(split_windows(block.norm1(x), block.window))
            x = x + first * join_windows(update, block.window, block.grid)
            x = x + second * block.mlp(block.norm2(x))
            x = x[:, : block.grid[0], : block.grid[1]]
    return model.head(x)


def test_a_training_step_is_the_one_by_hand(model):
    graphdef, state = nnx.split(model)
    images = normal(0, (8, *model.config.img_size, 3))

    @jax.jit
    def run(state, images, key):
        model = nnx.merge(graphdef, state)
        factors = model._kept(images, key)
        return model(images, rngs=key), by_hand(model, images, factors), model(images), factors

    seen = []
    for seed in range(3):
        out, expected, without, factors = run(state, images, jax.random.key(seed))
        np.testing.assert_allclose(out, expected, rtol=0, atol=5e-5 * float(jnp.abs(expected).max()))
        assert not np.allclose(out, without, rtol=0, atol=1e-3 * float(jnp.abs(expected).max()))
        np.testing.assert_array_equal(factors[:, 0], 1)
        assert set(np.unique(factors[:, 1])) <= {0, 2}
        seen.append(np.asarray(factors[:, 1]))
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0][:, 0], seen[0][:, 1])  # each branch for itself


def test_factors_have_the_rates_of_their_blocks():
    """Half a percent is seven deviations of a mean over so many."""
    model = nnx.eval_shape(lambda: create_model("vim_micro", depth=4, drop_path=0.3))
    factors = np.asarray(model._kept(jnp.zeros((4000, 1)), jax.random.key(0)))
    assert factors.shape == (4000, 4, 2)
    rates = np.array([0, 0.1, 0.2, 0.3])
    np.testing.assert_allclose((factors == 0).mean((0, 2)), rates, rtol=0, atol=0.02)
    np.testing.assert_allclose(factors.mean((0, 2)), 1, rtol=0, atol=0.03)
    for i, rate in enumerate(rates):
        np.testing.assert_allclose(np.unique(factors[:, i])[-1], 1 / (1 - rate), rtol=1e-6)


def test_nothing_is_dropped_without_a_key_or_a_rate():
    """Not even in the program: it is that of a model without the option."""
    plain = random_model("vim_micro", **tiny_models.TINY)
    x, key = normal(0, (2, 12, 16, 3)), jax.random.key(0)
    program = str(jax.make_jaxpr(plain)(x))
    assert str(jax.make_jaxpr(lambda x: plain(x, rngs=key))(x)) == program
    model = random_model("vim_micro", **tiny_models.TINY, drop_path=0.4, remat=True)
    assert (model.drop_path, model.remat) == (0.4, True)
    model.remat = False
    assert str(jax.make_jaxpr(model)(x)) == program
    assert str(jax.make_jaxpr(lambda x: model(x, rngs=key))(x)) != program


def test_rngs_are_a_key_or_streams():
    model = random_model("vim_micro", **FIELDS["vim"], drop_path=0.5)
    x, rngs, again = normal(0, (6, 12, 16, 3)), nnx.Rngs(dropout=3), nnx.Rngs(dropout=3)
    run = jax.jit(lambda key: (model(x, rngs=key), model.features(x, rngs=key)[0]))
    first, second = (run(rngs.dropout()) for _ in range(2))
    assert not np.array_equal(first[0], second[0])
    assert not np.array_equal(first[1], second[1])
    np.testing.assert_array_equal(model._kept(x, again), model._kept(x, nnx.Rngs(dropout=3).dropout()))
    np.testing.assert_array_equal(run(again.dropout())[0], second[0])  # a stream that went on


def gradients_of(model, remat):
    """(gradients of floats and scales, number of entries that the backward pass keeps), as a jitted and a shape."""
    model.remat = remat
    fn, state = om.pure(model)
    images, key = normal(0, (2, *model.config.img_size, 3)), jax.random.key(1)
    floats, rest = nnx.split_state(state, lambda path, leaf: path[-1] == "scale" or isinstance(leaf, nnx.Param), ...)

    def loss(floats):
        return jnp.sum(jnp.sin(fn(nnx.merge_state(floats, rest), images, rngs=key)))

    kept = jax.eval_shape(lambda floats: jax.vjp(loss, floats)[1], floats)
    model.remat = False
    return lambda: jax.jit(jax.grad(loss))(floats), sum(leaf.size for leaf in jax.tree.leaves(kept))


def test_remat_keeps_less(model):
    assert gradients_of(model, True)[1] < 0.7 * gradients_of(model, False)[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: random_model("vim_micro", **FIELDS["vim"]),
        pytest.param(lambda: tiny_models.quantised(om.QuantConfig()), marks=pytest.mark.slow),
    ],
    ids=["float", "quantised"],
)
def test_remat_changes_no_gradient(make):
    model = make()
    model.drop_path = 0.5
    once, again = (gradients_of(model, remat)[0]() for remat in (False, True))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(once), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * (float(jnp.abs(b).max()) + 1e-3))


def test_no_checkpoint_holds_them(tmp_path):
    model = random_model("vim_micro", **tiny_models.TINY, drop_path=0.4, remat=True)
    om.save(tmp_path / "a", model)
    assert "drop_path" not in (tmp_path / "a" / "config.json").read_text()
    loaded = om.load(tmp_path / "a")
    assert (loaded.drop_path, loaded.remat, loaded.config) == (0.0, False, model.config)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 3])
def test_impossible_rates_are_refused(rate):
    model = nnx.eval_shape(lambda: create_model("vim_micro", **tiny_models.TINY))
    model.drop_path = rate
    with pytest.raises(ValueError, match=r"drop_path is .*, but it is a rate from 0 to less than 1; change it\."):
        jax.eval_shape(lambda x: model(x), normal(0, (1, 12, 16, 3)))
