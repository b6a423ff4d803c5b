"""PTQ4VM: its grids against a NumPy loop, smoothing, integers, and the joint learning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from baseline_models import SCAN, baseline, captured_block, float_model, images, modules_of
from draws import heavy_tailed
from flax import nnx
from tiers import slow
from tiny_models import TOKENS
from tolerances import FAKE_AGAINST_INTEGER

from ouromamba_jax.baselines import PTQ4VMConfig
from ouromamba_jax.baselines.ptq4vm import learn, stage_loss
from ouromamba_jax.baselines.ptq4vm_linear import (
    AsymmetricLinear,
    FakeAsymmetricLinear,
    centred_levels,
    find_parameters,
    smoothing,
)
from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.quantize.sites import iter_sites, set_module


def ranges_in_numpy(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero) per token: both ends shrink towards each other; the best range is widened to hold 0."""
    top = 2**bits - 1
    scales, zeros = [], []
    for values in np.moveaxis(x, 1, 0).reshape(x.shape[1], -1).astype(np.float64):
        best = np.inf
        for i in range(1, 101):
            a = i / 100
            low = values.min() * (1 - a) + values.max() * a
            high = values.min() * a + values.max() * (1 - a)
            s = max((high - low) / top, 1e-8)
            z = -np.round(low / s)
            error = np.mean(np.abs(values - (np.clip(np.round(values / s) + z, 0, top) - z) * s) ** 2.4)
            if error < best:
                best, ends = error, (low, high)
        s = max((max(ends[1], 0) - min(ends[0], 0)) / top, 1e-8)
        scales.append(s)
        zeros.append(np.clip(-np.round(min(ends[0], 0) / s), 0, top))
    return np.array(scales), np.array(zeros)


@pytest.mark.parametrize("offset", [-30.0, *slow(0.3, 30.0)])
def test_ptq4vm_parameters(offset):
    """Smoothing factors, and a scale and a zero point among the levels for every token."""
    x = heavy_tailed(0, (3, 5, 12)) + offset
    kernel = 0.3 * heavy_tailed(1, (12, 4))
    params, zero = find_parameters(x, kernel, 4, 4, 0.65)
    smooth = np.abs(x).max((0, 1)) ** 0.65 / np.abs(kernel).max(1) ** 0.35
    np.testing.assert_allclose(params["smooth"], smooth, rtol=1e-5)
    scale, expected_zero = ranges_in_numpy(np.asarray(x) / np.asarray(params["smooth"]), 4)
    np.testing.assert_allclose(params["act"], scale, rtol=1e-5)
    np.testing.assert_array_equal(zero, expected_zero)
    assert params["act"].shape == zero.shape == (5,)
    assert params["weight"].shape == (1, 4)
    assert {-30.0: 15, 30.0: 0}.get(offset, zero[0]) == zero[0]
    step = np.asarray(params["act"])[:, None] * np.asarray(params["smooth"])
    levels = np.round(np.clip(np.asarray(x) / step + expected_zero[:, None], 0, 15) - expected_zero[:, None])
    np.testing.assert_array_equal(centred_levels(x, params, zero, 4), levels)


@pytest.mark.slow
def test_smoothing_changes_nothing_in_float():
    model, x = nnx.clone(float_model()), images(1)
    exact = model(x)

    class Smoothed(nnx.Module):
        def __init__(self, linear, factors):
            self.linear, self.factors = linear, nnx.Variable(factors)
            linear.kernel.set_value(linear.kernel[...] * factors[:, None])

        def __call__(self, x):
            return self.linear(x / self.factors[...].reshape((1,) * (x.ndim - 1) + (-1,)))

    _, _, _, captured, _ = captured_block()
    block = model.blocks[0]
    for path, site in list(iter_sites(block)):
        if isinstance(site, nnx.Linear):
            factors = smoothing(captured[path]["input"], site.kernel[...], 0.5)
            assert float(jnp.abs(jnp.log(factors)).max()) > 0.1, path
            set_module(block, path, Smoothed(site, factors))
    np.testing.assert_allclose(model(x), exact, rtol=0, atol=1e-5 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize(("offset", "weight_bits", "act_bits"), [(-4.0, 4, 4), *slow((0.2, 8, 8), (0.2, 3, 6))])
def test_ptq4vm_integers_are_its_stand_in(offset, weight_bits, act_bits):
    linear = nnx.Linear(33, 9, rngs=nnx.Rngs(1))
    linear.bias.set_value(heavy_tailed(5, (9,)))
    params, zero = find_parameters(heavy_tailed(2, (4, 6, 33)) + offset, linear.kernel[...], weight_bits, act_bits, 0.5)
    params["act"] = 0.7 * params["act"]  # some clip
    x = 1.5 * heavy_tailed(3, (5, 6, 33)) + offset
    integer = AsymmetricLinear(linear, params, zero, weight_bits, act_bits)
    fake = FakeAsymmetricLinear(linear, params, zero, weight_bits, act_bits)(x)
    largest = float(jnp.abs(fake).max())
    np.testing.assert_allclose(integer(x), fake, rtol=0, atol=FAKE_AGAINST_INTEGER * largest)
    # And both are the product of rounded values.
    levels = np.asarray(centred_levels(x, params, zero, act_bits), np.float64)
    assert levels.min() == -float(zero.max()) or levels.max() == 2**act_bits - 1 - float(zero.min())
    rows = levels * np.asarray(params["act"])[:, None]
    product = rows @ np.asarray(integer.weight.dequantize(), np.float64) + np.asarray(linear.bias[...])
    np.testing.assert_allclose(fake, product, rtol=0, atol=FAKE_AGAINST_INTEGER * largest)
    assert np.isnan(integer(x.at[1, 2, 0].set(jnp.inf))[1, 2]).all()


@pytest.mark.slow
def test_joint_learning_lowers_its_loss_and_moves_every_parameter():
    block, x, out, captured, _ = captured_block()
    linears = {path: site for path, site in iter_sites(block) if isinstance(site, nnx.Linear)}
    bits = dict.fromkeys(linears, (4, 4))
    found = {p: find_parameters(captured[p]["input"], s.kernel[...], 4, 4, 0.5) for p, s in linears.items()}
    params, zeros = {p: f for p, (f, _) in found.items()}, {p: z for p, (_, z) in found.items()}
    config = PTQ4VMConfig(epochs=6)
    learned, losses = learn(block, bits, params, zeros, x, out - x, config)
    assert len(losses) == 7
    assert min(losses[1:]) < 0.97 * losses[0]
    graphdef, state = nnx.split(block)
    loss = jax.jit(lambda p: stage_loss(p, graphdef, tuple(bits.items()), state, zeros, x, out - x))
    measured = [float(loss(p)) for p in (params, learned)]
    np.testing.assert_allclose(measured, [losses[0], min(losses)], rtol=1e-3)
    best = int(np.argmin(losses))
    for path, own in params.items():
        for name, before in own.items():
            moved = np.abs(np.asarray(learned[path][name]) - np.asarray(before))
            rate = 1e-2 if name == "smooth" else 5e-4
            assert np.mean(moved > 0.01 * rate) > 0.95, (path, name)
            assert moved.max() < 1.5 * rate * best, (path, name)  # AdamW moves by its rate at most, or nearly so
    again, _ = learn(block, bits, params, zeros, x, out - x, config)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), learned, again))


def test_ptq4vm_leaves_all_but_the_linear_layers_of_blocks_alone():
    exact, low = modules_of(float_model()), modules_of(baseline("ptq4vm")[0])
    assert {p for p in exact if type(low[p]) is not type(exact[p])} == {
        p for p, m in exact.items() if isinstance(m, nnx.Linear) and p.startswith("blocks")
    }
    for path, module in low.items():
        if isinstance(module, AsymmetricLinear):
            assert module.act_scale.shape == module.zero.shape == (TOKENS,)
            assert module.smooth.shape == module.levels.shape[:1]
            assert module.weight_scale.shape == (1, module.levels.shape[1])
            assert ((module.zero[...] >= 0) & (module.zero[...] <= 15)).all()
            assert (module.zero[...] == jnp.round(module.zero[...])).all()
        elif path in exact and not path:
            assert module is not exact[path]
    assert type(low[SCAN]) is SelectiveScan
