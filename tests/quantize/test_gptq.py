"""Weights rounded in turn on a whole model, by what its quantised layers see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from tiny_models import TINY

from ouromamba_jax import QuantConfig, load, quantize, save
from ouromamba_jax.data.preprocessing import image_shape
from ouromamba_jax.evaluation.evaluate import predict
from ouromamba_jax.ops.weight_rounding import round_in_turn
from ouromamba_jax.quantize import QuantLinear
from ouromamba_jax.quantize.gptq import with_levels
from ouromamba_jax.quantize.run import calibrate_sites
from ouromamba_jax.quantize.sites import resolve_sites
from ouromamba_jax.quantize.stages import StageInputs


@pytest.fixture(scope="module")
def model():
    return tiny_models.random_model("vim_micro", **TINY)


@pytest.fixture(scope="module")
def images(model):
    return jax.random.normal(jax.random.key(0), (6, *image_shape(model.config)))


CONFIG = QuantConfig.preset("w4a8", weight_rounding="gptq", tune_epochs=1, batch_size=4)


def test_a_layer_sees_the_moments_of_its_rounded_inputs(model, images):
    """Of the first block, in batches of 4 and 2: the same as all at once by hand."""
    x, block = model.stem(images), model.blocks[0]
    configs = {
        p.removeprefix("blocks.0."): c for p, c in resolve_sites(model, CONFIG).items() if p.startswith("blocks.0.")
    }
    inputs = StageInputs("blocks.0", block, x, x, configs, 4)
    specs, calibrated = calibrate_sites(block, inputs)
    found = with_levels(block, specs, calibrated, x, 4)
    linears = [path for path, site in nnx.iter_modules(block) if isinstance(site, nnx.Linear)]
    assert sorted(path for path in found if "levels" in found[path]) == sorted(".".join(map(str, p)) for p in linears)
    entered = block.norm(x)
    rounded = calibrated["mixer.in_proj"]["input"].fake(entered, CONFIG.splitting)
    rows = np.asarray(rounded, np.float64).reshape(-1, entered.shape[-1])
    kernel, scale = block.mixer.in_proj.kernel[...], calibrated["mixer.in_proj"]["weight"]
    expected = round_in_turn(kernel, scale, jnp.asarray(rows.T @ rows, jnp.float32), bits=4)
    assert np.mean(np.asarray(found["mixer.in_proj"]["levels"] != expected)) < 0.01


def test_a_model_keeps_its_logits_better_and_saves(model, images, tmp_path):
    exact = predict(model, images)
    low, _ = quantize(model, images, CONFIG)
    nearest, _ = quantize(model, images, dataclasses.replace(CONFIG, weight_rounding="nearest"))

    def layers(model):
        return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, QuantLinear)}

    ours, others = layers(low), layers(nearest)
    assert any((ours[path].levels[...] != others[path].levels[...]).any() for path in ours)
    for layer in ours.values():
        layer.weight.check()
    first = ("stem", "proj")  # later ones are tuned to what the layers before them give
    np.testing.assert_array_equal(ours[first].weight_scale[...], others[first].weight_scale[...])

    def error(model):
        return float(np.mean((predict(model, images) - exact) ** 2))

    assert error(low) < error(nearest)
    save(tmp_path / "low", low)
    np.testing.assert_array_equal(predict(load(tmp_path / "low"), images), predict(low, images))


def test_another_rounding_is_refused():
    with pytest.raises(ValueError, match="weight_rounding must be 'nearest' or 'gptq', not 'up'"):
        QuantConfig(weight_rounding="up")
