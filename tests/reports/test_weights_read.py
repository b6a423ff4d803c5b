"""A module that reads a layer's weight instead of calling it: refused with the rule that leaves the layer in float."""

import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from layered_model import IMAGES, WIDTH, Model, Stage, linear

from ouromamba_jax import QuantConfig, QuantRule, quantize

FAST = dict(tune_epochs=0, scale_search="max", float_dtype="float32")
WAYS = {
    "product": lambda self, x: x @ self.a.kernel[...],
    "tied": lambda self, x: self.a(x) @ self.a.kernel[...].T,
    "einsum": lambda self, x: jnp.einsum("bli,oi->blo", x, self.a.kernel[...].astype(jnp.float32)),
    "standardised": lambda self, x: x @ (self.a.kernel[...] - self.a.kernel[...].mean(0, keepdims=True)),
    "elementwise": lambda self, x: (x[..., None] * self.a.kernel[...][None, None]).sum(-2),
    "bias": lambda self, x: self.a(x) + self.a.bias[...][None, None],
    "width": lambda self, x: self.a(x) / self.a.out_features,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_read(way):
    model = Model(Stage(WAYS[way], a=linear()), Stage(lambda self, x: self.b(x), b=linear(1)))
    reads = {"bias": "bias", "width": "out_features"}.get(way, "kernel")
    with pytest.raises(
        ValueError, match=rf"^the model reads '{reads}' of blocks\.1\.a itself, .* skip=True\)\."
    ) as error:
        quantize(model, IMAGES, QuantConfig(**FAST))
    rule = eval(str(error.value).rpartition("in float, ")[2].rstrip("."), {"QuantRule": QuantRule})
    low, report = quantize(model, IMAGES, QuantConfig(**FAST, rules=(rule,)))
    assert [site.path for site in report.sites] == ["blocks.2.b"]
    np.testing.assert_allclose(low.blocks[1](normal(0, (2, 4, WIDTH))), model.blocks[1](normal(0, (2, 4, WIDTH))))
    kept = {path: reason for path, _, reason in report.kept_float}
    assert kept["blocks.1.a.kernel"] == f"the rule {rule.pattern!r} leaves it out"


def test_a_product_with_another_weight_is_still_seen():
    call = lambda self, x: x @ self.a.kernel[...] @ self.own[...]  # noqa: E731
    model = Model(Stage(call, a=linear(), own=nnx.Param(jnp.ones((WIDTH, WIDTH)))))
    with pytest.raises(ValueError, match=r"blocks\.1 has 1 matrix products outside of its linear layers"):
        quantize(model, IMAGES, QuantConfig(**FAST, rules=(QuantRule(r"1\.a", skip=True),)))


def test_a_head_tied_to_the_embedding_of_another_stage():
    embedding = linear()
    tied = Stage(lambda self, x: x @ self.a.kernel[...].T, a=embedding)
    model = Model(Stage(lambda self, x: self.a(x), a=embedding), Stage(lambda self, x: self.b(x), b=linear(1)), tied)
    with pytest.raises(ValueError, match=r"blocks\.3\.a is the same layer as blocks\.1\.a, .*skip=True") as error:
        quantize(model, IMAGES, QuantConfig(**FAST))
    rule = eval(str(error.value).rpartition("in float, ")[2].rstrip("."), {"QuantRule": QuantRule})
    _, report = quantize(model, IMAGES, QuantConfig(**FAST, rules=(rule,)))
    assert [site.path for site in report.sites] == ["blocks.2.b"]
