"""No images are no logits: of every family, float and quantised, called, compiled and predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILIES, quantised, random_model

from ouromamba_jax import QuantConfig, pure
from ouromamba_jax.data.preprocessing import image_shape
from ouromamba_jax.evaluation.evaluate import evaluate, predict


@pytest.mark.parametrize("kind", ["float", "w4a4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_batches(family, kind):
    is_float = kind == "float"
    model = random_model(f"{family}_micro", **FAMILIES[family]) if is_float else quantised(QuantConfig(), family)
    images, (fn, state) = jnp.zeros((0, *image_shape(model.config))), pure(model)
    for out in (jax.eval_shape(model, images), jax.jit(fn)(state, images)):
        assert (out.shape, out.dtype) == ((0, 7), jnp.float32)
    traced = jax.eval_shape(model.trace, images)[1]
    assert traced.tokens.shape[0] == traced.features.shape[0] == 0
    scans = [scan for layer in traced.layers for scan in layer.scans]
    assert all(scan.u.shape[0] == 0 < scan.A.shape[0] for scan in scans)
    assert {x.shape[0] for x in jax.eval_shape(model.features, images)} == {0}
    grads = jax.eval_shape(jax.grad(lambda x: model(x).sum()), images)
    assert grads.shape == images.shape


def test_empty_batches_eager_predicted_and_evaluated():
    model = random_model("vit_micro", **FAMILIES["vit"])
    images = np.zeros((0, *image_shape(model.config)), np.float32)
    assert model(jnp.asarray(images)).shape == predict(model, images).shape == (0, 7)
    with pytest.raises(ValueError, match=r"^there are no images to evaluate on; name a data set that has some\.$"):
        evaluate(model, [(images, np.zeros(0, np.int32))])
