"""Layers that do more than their kind, or stand in several places: never quantised as something else in silence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from layered_model import IMAGES, WIDTH, Model, Stage, linear

from ouromamba_jax import QuantConfig, QuantRule, quantize
from ouromamba_jax.evaluation.metrics import sqnr_db
from ouromamba_jax.models.layers import DotProductAttention, Operand, SelectiveScan
from ouromamba_jax.ops.split_calibration import calibrate
from ouromamba_jax.quantize import QuantLinear
from ouromamba_jax.quantize.coverage import check_coverage
from ouromamba_jax.quantize.sites import resolve_sites

W8A8 = QuantConfig(weight_bits=8, act_bits=8, outlier_bits=16, tune_epochs=0, scale_search="max", float_dtype="float32")


class Scaled(nnx.Linear):
    """Three times a linear layer."""

    def __call__(self, x):
        return 3 * super().__call__(x)


def once(self, x):
    return self.a(x)


def twice(self, x):
    return self.b(jax.nn.gelu(self.a(x)))


OTHERS = {
    "subclass": lambda: linear(kind=Scaled),
    "LoRA": lambda: linear(kind=nnx.LoRALinear, lora_rank=2),
    "product": lambda: linear(dot_general=lambda *args, **kw: 2 * jax.lax.dot_general(*args, **kw)),
    "scan": lambda: type("MyScan", (SelectiveScan,), {})(
        1, WIDTH, 3, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    ),
    "operand": lambda: type("MyOperand", (Operand,), {})(),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_layer_that_does_more_than_its_kind_is_refused_with_the_rule_that_leaves_it_out(kind):
    model = Model(Stage(once, u=OTHERS[kind]()))
    with pytest.raises(
        ValueError, match=r"^blocks\.1\.u is a .* would be lost: put a plain one .*skip=True\)\.$"
    ) as error:
        resolve_sites(model, QuantConfig(operands=("u",)))
    rule = eval(str(error.value).rpartition("in float, ")[2].rstrip("."), {"QuantRule": QuantRule})
    assert resolve_sites(model, QuantConfig(operands=("u",), rules=(rule,))) == {}


def test_left_out_it_computes_what_it_did_and_the_report_says_why():
    model = Model(Stage(twice, a=OTHERS["LoRA"](), b=OTHERS["subclass"]()), Stage(once, a=linear(1)))
    model.blocks[1].a.lora.lora_b.set_value(normal(1, (2, WIDTH)))
    low, report = quantize(model, IMAGES, dataclasses.replace(W8A8, rules=(QuantRule(r"1\.[ab]$", skip=True),)))
    layers = (low.blocks[1].a, low.blocks[1].b, low.blocks[2].a)
    assert [type(layer) for layer in layers] == [nnx.LoRALinear, Scaled, QuantLinear]
    assert sqnr_db(np.asarray(model(IMAGES)), np.asarray(low(IMAGES))) > 35
    kept = {path: reason for path, _, reason in report.kept_float}
    paths = ("a.kernel", "a.lora.lora_a", "a.lora.lora_b", "b.kernel", "b.bias")
    assert {kept[f"blocks.1.{path}"] for path in paths} == {r"the rule '1\\.[ab]$' leaves it out"}
    assert kept["blocks.2.a.bias"] == "not a matmul"


@pytest.mark.parametrize("place", ["attribute", "call"])
def test_a_layer_in_two_places_of_a_stage_is_one_quantised_layer_calibrated_on_both(place):
    layer = linear()
    layers = dict(a=layer, b=layer) if place == "attribute" else dict(a=layer)
    call = twice if place == "attribute" else lambda self, x: self.a(jax.nn.gelu(self.a(x)))
    model = Model(Stage(call, **layers))
    low, report = quantize(model, IMAGES, W8A8)
    block = low.blocks[1]
    assert type(block.a) is QuantLinear
    assert place == "call" or block.b is block.a
    assert [site.path for site in report.sites] == ["blocks.1.a"]
    x = IMAGES.reshape(6, 4, WIDTH)
    seen = jnp.concatenate([x, jax.nn.gelu(layer(x))])
    np.testing.assert_array_equal(block.a.act.scale[...], calibrate(seen, W8A8.splitting, search=False).scale)
    assert sqnr_db(np.asarray(model(IMAGES)), np.asarray(low(IMAGES))) > 30


def test_places_of_other_token_counts_are_refused():
    model = Model(Stage(lambda self, x: self.a(x) + self.a(x[:, :1])))
    model.blocks[1].a = linear()
    with pytest.raises(ValueError, match="a is used at 4 and at 1 tokens per sample"):
        quantize(model, IMAGES, W8A8)


def test_a_layer_that_nothing_uses_is_refused():
    with pytest.raises(ValueError, match="no forward pass uses b: remove it, or leave it in float by a rule"):
        quantize(Model(Stage(once, a=linear(), b=linear())), IMAGES, W8A8)


def test_a_layer_of_two_stages_is_refused_or_float_in_both():
    layer = linear()
    model = Model(Stage(once, a=layer), Stage(once, a=layer))
    with pytest.raises(ValueError, match=r"blocks\.2\.a is the same layer as blocks\.1\.a, .*nnx\.clone"):
        quantize(model, IMAGES, W8A8)
    low, report = quantize(model, IMAGES, QuantConfig(rules=(QuantRule("1.a", skip=True),), float_dtype="float32"))
    np.testing.assert_array_equal(low(IMAGES), model(IMAGES))
    assert {path: reason for path, _, reason in report.kept_float} == {
        f"blocks.{i}.a.{name}": "the rule '1.a' leaves it out" for i in (1, 2) for name in ("kernel", "bias")
    }


def test_an_attention_that_multiplies_more_than_ours_is_seen():
    class Biased(DotProductAttention):
        def __call__(self, q, k, v):
            return super().__call__(q, k, v) + q @ jnp.ones((WIDTH, WIDTH))

    x = jax.ShapeDtypeStruct((1, 4, WIDTH), jnp.float32)
    for kind, products in ((DotProductAttention, 0), (Biased, 3)):
        stage = Stage(lambda self, x: self.a(x, x, x), a=kind(2, dtype=jnp.float32))
        if products:
            with pytest.raises(ValueError, match="toy has 3 matrix products outside"):
                check_coverage(stage, x, "toy")
        else:
            check_coverage(stage, x, "toy")
