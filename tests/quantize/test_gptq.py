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
from ouromamba_jax.ops.qtensor import QTensor, quantize_with_scale
from ouromamba_jax.ops.weight_rounding import gptq_round
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


CONFIG = QuantConfig.preset("w4a8", tune_epochs=0, batch_size=4)


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
    made = {path: found[path]["weight"] for path in found if isinstance(found[path].get("weight"), QTensor)}
    assert sorted(made) == sorted(".".join(map(str, p)) for p in linears)
    entered = block.norm(x)
    rounded = calibrated["mixer.in_proj"]["input"].fake(entered, CONFIG.splitting)
    rows = np.asarray(rounded, np.float64).reshape(-1, entered.shape[-1])
    kernel, scale = block.mixer.in_proj.kernel[...], calibrated["mixer.in_proj"]["weight"]
    expected = gptq_round(kernel, scale, jnp.asarray(rows.T @ rows, jnp.float32), bits=4)
    assert np.mean(np.asarray(made["mixer.in_proj"].values != expected)) < 0.01

    def loss(weight):
        return np.sum((rows @ np.asarray(kernel - weight.dequantize(), np.float64)) ** 2)

    assert loss(made["mixer.in_proj"]) < 0.8 * loss(quantize_with_scale(kernel, scale, 4))


def test_a_model_has_other_levels_than_the_nearest_and_saves(model, images, tmp_path):
    low, _ = quantize(model, images, CONFIG)
    nearest, _ = quantize(model, images, dataclasses.replace(CONFIG, weight_rounding="nearest"))

    def layers(model):
        return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, QuantLinear)}

    ours, others = layers(low), layers(nearest)
    assert any((ours[path].levels[...] != others[path].levels[...]).any() for path in ours)
    for layer in ours.values():
        layer.weight.check()
    save(tmp_path / "low", low)
    np.testing.assert_array_equal(predict(load(tmp_path / "low"), images), predict(low, images))


def test_tuning_moves_the_scales_of_levels_that_stay(model, images):
    untuned, _ = quantize(model, images, CONFIG)
    tuned, _ = quantize(model, images, dataclasses.replace(CONFIG, tune_epochs=1))
    before, after = untuned.blocks[0].mixer.in_proj, tuned.blocks[0].mixer.in_proj
    # The stem, tuned before it, moves what enters this layer, and with it few of its levels.
    assert np.mean(np.asarray(before.levels[...] != after.levels[...])) < 0.1
    assert (before.weight_scale[...] != after.weight_scale[...]).all()


def test_another_rounding_is_refused():
    with pytest.raises(ValueError, match="weight_rounding must be 'gptq' or 'nearest', not 'up'"):
        QuantConfig(weight_rounding="up")
