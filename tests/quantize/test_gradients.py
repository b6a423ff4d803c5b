"""Gradients of a quantised model are those of its activations rounded in floats, at the same levels of the weights."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from draws import normal
from flax import nnx
from quantising import calibrated, float_model, images, module_at
from tolerances import FAKE_AGAINST_INTEGER

import ouromamba_jax as om
from ouromamba_jax.models.layers import after
from ouromamba_jax.ops.producers import rms_norm
from ouromamba_jax.ops.scan_types import Unsplit
from ouromamba_jax.ops.split import fake_quant
from ouromamba_jax.quantize import OPERANDS, QuantSelectiveScan
from ouromamba_jax.quantize.kinds import kind_of
from ouromamba_jax.quantize.stages import replace_sites

SPLITS = [
    om.OutlierConfig(),
    om.OutlierConfig(act_bits=8, outlier_bits=16),
    om.OutlierConfig(detection="static"),
    om.OutlierConfig(detection="none", outlier_bits=4),
]


@cache
def quantised():
    """(float model, quantised model, specs, what calibration found, what entered every site)."""
    model = float_model()
    config = om.QuantConfig(scale_search="max", float_dtype="float32", operands=tuple(n for n in OPERANDS if n != "h"))
    specs, found, seen = calibrated(model, images(1), config, shifted=True)
    sites = {path: module_at(model, path) for path in specs}
    modules = {path: kind_of(site).make(site, specs[path], found[path]) for path, site in sites.items()}
    return model, replace_sites(model, modules), specs, found, seen


@pytest.mark.parametrize("config", SPLITS, ids=lambda c: f"{c.act_bits}-{c.outlier_bits}-{c.detection}")
@pytest.mark.parametrize("shifted", [False, True])
def test_gradients_of_a_split(config, shifted):
    """To the activation and to its steps, in any type of floats."""
    x = (3 * normal(0, (2, 13, 6))).at[:, 4, 2].set(60.0)
    found = dict(
        theta=jnp.full((13,), 4.0, jnp.bfloat16),
        shift=jnp.arange(13, dtype=jnp.int8) % 4 if shifted else None,
        channels=jnp.arange(6) == 2 if config.detection == "static" else None,
    )
    weights = normal(1, x.shape)

    def rounded(x, scale):
        return jnp.sum(weights * Unsplit(x, scale, config, **found).merge())

    def smooth(x, scale):
        return jnp.sum(weights * fake_quant(x, scale, config, **found))

    scale = jnp.linspace(0.2, 0.5, 13, dtype=jnp.float32)
    for one, other in zip(*(jax.grad(f, argnums=(0, 1))(x, scale) for f in (rounded, smooth)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert bool((one != 0).any())


def test_gradients_of_every_site_are_those_of_its_stand_in():
    """To its inputs and scales, from the same inputs: linear layers, scan and all their directions."""
    model, low, specs, found, seen = quantised()

    def compare(entered, found):
        differences = {}
        for path, spec in specs.items():
            float_site, site = module_at(model, path), module_at(low, path)
            graphdef, state = nnx.split(site)
            names = ("u", "delta", "B", "C") if isinstance(site, QuantSelectiveScan) else ("input",)
            inputs = tuple(entered[path][name] for name in names)

            def real(inputs, scales, graphdef=graphdef, state=state):
                out = nnx.merge(graphdef, with_scales(state, scales))(*inputs)
                return out.y if hasattr(out, "y") else out

            def fake(inputs, scales, path=path, spec=spec, float_site=float_site, state=state):
                return stand_in(float_site, spec, found[path], state, scales)(*inputs)

            scales = scales_of(state)
            pairs = []
            for function in (real, fake):
                y, pull = jax.vjp(function, inputs, scales)
                pairs.append((y, pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))))
            for (key, one), other in zip(jax.tree.leaves_with_path(pairs[0]), jax.tree.leaves(pairs[1]), strict=True):
                largest = jnp.max(jnp.abs(other))
                differences[path + jax.tree_util.keystr(key)] = jnp.max(jnp.abs(one - other)) / largest, largest
        return differences

    differences = jax.jit(compare)(seen, found)
    assert len(differences) > 50
    for name, (difference, largest) in differences.items():
        assert float(largest) > 0, name
        assert float(difference) <= 4 * FAKE_AGAINST_INTEGER, (name, float(difference))  # sums of two products


def scales_of(state):
    return {key: leaf[...] for key, leaf in nnx.to_flat_state(state) if str(key[-1]) in SCALES or key[0] in SCALES}


SCALES = ("scale", "weight_scale", "parameter_scale")


def with_scales(state, scales):
    return nnx.from_flat_state(
        [(key, leaf.replace(scales[key]) if key in scales else leaf) for key, leaf in nnx.to_flat_state(state)]
    )


def stand_in(site, spec, found, state, scales):
    """The float stand-in of a site with these steps and scales, and the levels of the quantised one held fixed."""
    flat = dict(nnx.to_flat_state(state))
    if isinstance(site, nnx.Linear):
        found = {**found, "input": step(found["input"], scales[("act", "scale")])}
        fake = kind_of(site).fake(nnx.clone(site), spec, found)
        levels = flat[("levels",)][...].astype(jnp.float32)
        fake.linear.kernel.set_value(levels * scales[("weight_scale",)])
        found["weight"] = scales[("weight_scale",)]
        return fake
    if not hasattr(site, "A_log"):
        return kind_of(site).fake(site, spec, {"input": step(found["input"], scales[("act", "scale")])})
    found = {
        name: [step(c, scales[("act", name, g, "scale")]) for g, c in enumerate(value)]
        if isinstance(value, list)
        else value
        for name, value in found.items()
    }
    fake = kind_of(site).fake(site, spec, found)

    def parameter(name):
        levels = flat[("parameter_levels", name)][...].astype(jnp.float32)
        scale = scales[("parameter_scale", name)]
        return levels * jnp.repeat(scale, len(levels) // len(scale), axis=0)

    fake.parameter = parameter
    return lambda *inputs: fake(*inputs).y


def step(calibration, scale):
    return replace(calibration, scale=scale)


def test_gradients_pass_a_producer_and_a_residual():
    """What is split where it is made, kept beside and added to."""
    _, low, _, _, _ = quantised()
    graphdef, state = nnx.split(low.blocks[0].mixer.in_proj)
    x, scale, residual = normal(0, (2, 13, 20)), 1 + 0.1 * normal(1, (20,)), normal(2, (2, 13, 80))

    def made(x, scale, residual):
        layer = nnx.merge(graphdef, state)
        options = dict(keep=True, residual=residual, eps=1e-5, dtype=jnp.float32)
        y, kept = after(layer, rms_norm, x, scale, **options)
        return jnp.sum(jnp.sin(y)) + jnp.sum(kept**3)

    def apart(x, scale, residual):
        layer = nnx.merge(graphdef, state)
        kept = rms_norm(x, scale, eps=1e-5, dtype=jnp.float32)
        return jnp.sum(jnp.sin(residual + layer(kept))) + jnp.sum(kept**3)

    for one, other in zip(*(jax.jit(jax.grad(f, (0, 1, 2)))(x, scale, residual) for f in (made, apart)), strict=True):
        assert float(jnp.abs(other).max()) > 0
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()))


def test_gradients_train_the_floats_of_a_quantised_model():
    """As `pure` says: float32 copies of what is kept in 16 bits, and all steps and scales."""
    _, low, _, _, _ = quantised()
    for _, leaf in nnx.to_flat_state(nnx.state(low, nnx.Param)):
        leaf.set_value(leaf[...].astype(jnp.float16))
    fn, state = om.pure(low)
    floats, rest = nnx.split_state(state, lambda path, leaf: isinstance(leaf, nnx.Param) or path[-1] == "scale", ...)
    floats = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), floats)
    x, labels, optimizer = images(1), jnp.arange(6) % 7, optax.adamw(3e-3)

    def loss(floats):
        logits = fn(nnx.merge_state(floats, rest), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def update(floats, moments):
        value, gradients = jax.value_and_grad(loss)(floats)
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(gradients, moments, floats)
        return optax.apply_updates(floats, updates), moments, value

    moments, losses = optimizer.init(floats), []
    for _ in range(8):
        floats, moments, value = update(floats, moments)
        losses.append(float(value))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize(
    "cast",
    [
        lambda leaf: leaf.astype(jnp.float16),
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf,
        lambda leaf: leaf.astype(jnp.int32) if leaf.dtype == jnp.int8 else leaf,
    ],
)
def test_a_state_that_lost_its_types_is_refused(cast, tmp_path):
    """At the first call, and when it is saved."""
    low = tiny_models.quantised(om.QuantConfig())
    fn, state = om.pure(low)
    state = jax.tree.map(cast, state)
    with pytest.raises(TypeError, match=r"a cast has lost their values; cast leaves of type nnx\.Param") as caught:
        jax.eval_shape(fn, state, images())
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"the model is not what its config describes.* is (float16|bfloat16|int32)"):
        om.save(tmp_path / "a", nnx.merge(nnx.graphdef(low), state))
    assert list(tmp_path.iterdir()) == []


def test_levels_that_packing_would_cut_off_are_refused_when_saved(tmp_path):
    low = tiny_models.quantised(om.QuantConfig())
    levels = low.blocks[0].mixer.in_proj.levels
    levels.set_value(levels[...].at[0, 0].set(9))
    with pytest.raises(ValueError, match=r"blocks\.0\.mixer\.in_proj\.levels has levels beyond 4 bits"):
        om.save(tmp_path / "a", low)
