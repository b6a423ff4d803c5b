"""What XLA fuses on CPUs computes the same as its operations one by one: losses, gradients, scans, models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tolerances
from draws import normal
from flax import nnx
from op_by_op import op_by_op
from quantising import calibrated

from ouromamba_jax import GenConfig, QuantConfig, implicit_attention, pure, selective_scan
from ouromamba_jax.gen import losses
from ouromamba_jax.gen.network import image_losses, split
from ouromamba_jax.quantize.tune import cosine_loss, log_factors, stage_loss, update_of

# Wide enough for XLA's library of fused products, which leaves matrices of 32 rows alone.
MODELS = {
    "vim": dict(img_size=32, patch_size=4, stride=4, embed_dim=64, depth=1),
    "vmamba": dict(img_size=32, dims=(64,), depths=(1,)),
    "mambavision": dict(img_size=64, dim=64, in_dim=16, depths=(1, 2), window_size=(8, 4), num_heads=(1, 2)),
    "vit": dict(img_size=32, patch_size=4, embed_dim=64, depth=1),
}
GRID = (8, 8)


def assert_equal_op_by_op(function, *args):
    compiled, single = (jax.tree.leaves(f(*args)) for f in (jax.jit(function), op_by_op(function)))
    assert any(np.any(value) for value in single)
    for got, expected in zip(compiled, single, strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerances.FUSED * np.abs(expected).max())


def with_gradient(loss):
    """Value and gradient by the first argument of a loss per sample."""
    return jax.value_and_grad(lambda x, *rest: jnp.sum(loss(x, *rest)))


def test_the_known_reproduction():
    """Which fails here without `mend_miscompile`: so the comparison sees it."""
    assert_equal_op_by_op(lambda x: ((x @ jnp.full((96, 96), 0.37)) * x).sum(1), normal(0, (96, 96)))


@pytest.mark.parametrize(
    "loss",
    [
        partial(losses.contrastive_loss, grid=GRID),
        partial(losses.contrastive_loss, grid=GRID, negatives="neighbourhood"),
        losses.patch_similarity_entropy,
        losses.cosine_similarities,
    ],
    ids=["contrastive", "contrastive-near", "entropy", "cosine"],
)
def test_a_loss_of_features(loss):
    assert_equal_op_by_op(with_gradient(loss), normal(0, (2, 64, 96)))


def test_the_output_loss():
    loss = partial(losses.output_loss, targets=jnp.arange(64) % 100)
    assert_equal_op_by_op(with_gradient(lambda w, x: loss(x @ w)), normal(0, (96, 100)), normal(1, (64, 96)))


def test_total_variation():
    assert_equal_op_by_op(with_gradient(losses.total_variation), normal(0, (2, 64, 64, 3)))


def test_the_tuning_loss():
    assert_equal_op_by_op(
        jax.value_and_grad(lambda w, x, y: cosine_loss(x @ w, y)), *(normal(i, (96, 96)) for i in range(3))
    )


def make(family):
    return tiny_models.natural_model(f"{family}_micro", **MODELS[family])


def images_of(model):
    return jnp.clip(normal(0, (2, model.config.img_size, model.config.img_size, 3)), -1, 1)


@pytest.mark.parametrize("family", list(MODELS))
def test_a_forward_pass(family):
    model = make(family)
    function, state = pure(model)
    assert_equal_op_by_op(function, state, images_of(model))


def test_the_objective_of_generation():
    """The gradient of all losses by the pixels."""
    model = make("vim")
    network, weights = split(model)
    config = GenConfig(contrastive=1.0, output=1.0, total_variation=1.0, pse=1.0)

    def objective(images, weights):
        values = image_losses(network, weights, images, jnp.arange(2), config)
        assert set(values) == {"contrastive", "output", "total_variation", "pse"}
        return sum(values.values())

    assert_equal_op_by_op(with_gradient(objective), images_of(model), weights)


def test_implicit_attention():
    model = make("vim")
    graphdef, state = nnx.split(model.blocks[0])

    def attention(state, x):
        layer = nnx.merge(graphdef, state).trace(x)[1]
        return [implicit_attention(layer, neighbourhood=n) for n in (None, 5)]

    assert_equal_op_by_op(attention, state, model.stem(images_of(model)))


def test_the_selective_scan_and_its_gradient():
    shapes = (2, 70, 64), (2, 70, 64), (64, 8), (2, 70, 8), (2, 70, 8), (64,)
    u, delta, A, B, C, D = (normal(i, shape) for i, shape in enumerate(shapes))

    def pulled_back(u, delta, A, B, C, D, dy):
        y, pull = jax.vjp(lambda *x: selective_scan(*x, delta_softplus=True).y, u, delta, A, B, C, D)
        return y, pull(dy)

    assert_equal_op_by_op(pulled_back, u, delta, -jnp.exp(A), B, C, D, normal(7, (2, 70, 64)))


@pytest.mark.slow
def test_the_tuning_of_a_stage():
    """The loss of a stage on rounded values, and its gradient by every scale."""
    model = make("vim")
    x, block = model.stem(images_of(model)), model.blocks[0]
    specs, found, _ = calibrated(block, x, QuantConfig(scale_search="max"))
    graphdef, state = nnx.split(block)

    def loss(factors, state, found, x, target):
        return stage_loss(graphdef, tuple(specs.items()), state, found, factors, x, target)

    assert_equal_op_by_op(jax.value_and_grad(loss), log_factors(found), state, found, x, update_of(block(x), x))


def test_a_quantised_forward_pass():
    model = tiny_models.quantised(QuantConfig.preset("w4a4"))
    function, state = pure(model)
    assert_equal_op_by_op(function, state, normal(0, (2, *model.config.img_size, 3)))
