"""Values that are not finite are named where they stand, before anything is calibrated on them."""

import jax
import jax.numpy as jnp
import pytest
import tiny_models
from flax import nnx

from ouromamba_jax import QuantConfig, quantize
from ouromamba_jax.data.preprocessing import image_shape


@pytest.mark.parametrize(
    ("path", "value"), [("head.proj.kernel", jnp.nan), ("head.proj.bias", jnp.inf), ("blocks.0.mixer.scan.D", jnp.nan)]
)
def test_finite_weights_are_asked_for(path, value):
    model = tiny_models.natural_model("vim_micro", **tiny_models.TINY)
    leaf = next(leaf for place, leaf in nnx.to_flat_state(nnx.state(model)) if ".".join(map(str, place)) == path)
    leaf.set_value(leaf.get_value().at[(0,) * leaf.ndim].set(value))
    images = jax.random.normal(jax.random.key(0), (2, *image_shape(model.config)))
    with pytest.raises(ValueError, match=rf"^{path} of the model holds NaN or infinity: load whole weights"):
        quantize(model, images, QuantConfig.preset("w4a4"))
