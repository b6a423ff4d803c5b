"""A NaN or an infinity that arises inside the float model is blamed on the first layer that meets or makes it."""

import jax.numpy as jnp
import pytest
from draws import normal
from layered_model import IMAGES, WIDTH, Model, Stage, linear
from tiny_models import FAMILIES, natural_model

from ouromamba_jax import QuantConfig, quantize
from ouromamba_jax.baselines.rtn import RTNConfig, quantize_rtn
from ouromamba_jax.data.preprocessing import image_shape
from ouromamba_jax.ops.split_calibration import NOT_FINITE
from ouromamba_jax.quantize.stages import Fitted, quantize_stages

CONFIG = QuantConfig(tune_epochs=0, scale_search="max", float_dtype="float32")
MEETS = rf"cannot be calibrated: {NOT_FINITE}"
MAKES = r"cannot be calibrated: it makes NaN or infinity of finite activations; check its weights and .*dtype\."


def overflowing(x):
    return jnp.exp(1000 * jnp.abs(x) + 100)


def three(self, x):
    """In the order z, y, x, which is not that of their names."""
    return self.x(self.y(overflowing(self.z(x))))


def masked(self, x):
    return self.x(jnp.nan_to_num(self.y(overflowing(self.z(x)))))


CALLS = {
    "between layers": (three, rf"^blocks\.2\.y {MEETS}"),
    "seen no more behind": (masked, rf"^blocks\.2\.y {MEETS}"),
    "behind the last": (lambda self, x: overflowing(self.z(x)), r"^blocks\.2 returns NaN or infinity, though what its"),
    "a product": (lambda self, x: self.a(self.z(x)), rf"^blocks\.2\.z {MAKES}"),
}


@pytest.mark.parametrize("how", CALLS)
def test_the_first_that_meets_it_is_named(how):
    call, says = CALLS[how]
    layers = {name: linear(i) for i, name in enumerate("axyz") if name in call.__code__.co_names}
    if says.endswith(MAKES):
        layers["z"].kernel[...] = jnp.full((WIDTH, WIDTH), 3e38)
    model = Model(Stage(lambda self, x: self.a(x), a=linear(7)), Stage(call, **layers))
    with pytest.raises(ValueError, match=says):
        quantize(model, IMAGES, CONFIG)
    with pytest.raises(ValueError, match=says):
        quantize_rtn(model, IMAGES, RTNConfig(float_dtype="float32", rules=()))


@pytest.mark.parametrize("part", ["norm", "proj"])
def test_the_last_norm_and_the_head(part):
    model = natural_model("vit_micro", **FAMILIES["vit"])
    leaf = model.head.norm.scale if part == "norm" else model.head.proj.kernel
    leaf[...] = jnp.full(leaf.shape, 3e38)
    images = normal(0, (2, *image_shape(model.config)))
    with pytest.raises(ValueError, match=rf"^head\.proj {MEETS if part == 'norm' else MAKES}"):
        quantize_stages(model, images, CONFIG, lambda stage, inputs: Fitted({}, ()))
