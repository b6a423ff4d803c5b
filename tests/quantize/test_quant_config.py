"""The settings of a quantisation: what contradicts itself is refused, and rules combine field by field."""

import pytest

from ouromamba_jax.quantize import QuantConfig, QuantRule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantRule("x", skip=True, act_bits=4), "both skips its sites and sets act_bits"),
        (lambda: QuantRule("x"), "sets nothing"),
        (lambda: QuantRule("(", skip=True), "not a regular expression"),
        (lambda: QuantConfig(weight_bits=16), "weight_bits must be 2 to 8, not 16"),
        (lambda: QuantConfig(act_bits=16), "act_bits"),
        (lambda: QuantConfig(act_bits=8, outlier_bits=4), "outlier_bits"),
        (lambda: QuantConfig(weight_group=0), "weight_group"),
        (lambda: QuantConfig(operands=("delta", "X")), "operands X do not exist"),
        (lambda: QuantConfig(operands="u"), "operands must be a tuple of names, not 'u'"),
        (lambda: QuantRule("x", operands=("X",)), "operands X do not exist"),
        (lambda: QuantRule("x", operands="delta"), "operands must be a tuple of names, not 'delta'"),
        (lambda: QuantConfig(rules="stem"), "rules must be a tuple of QuantRule"),
        (lambda: QuantConfig(rules=QuantRule("x", skip=True)), "rules must be a tuple of QuantRule"),
        (lambda: QuantConfig(rules=("stem",)), "rules must be a tuple of QuantRule"),
        (lambda: QuantConfig(float_dtype="int8"), "float_dtype must be 'float16', 'bfloat16' or 'float32', not 'int8'"),
        (lambda: QuantConfig(float_dtype="floaty"), "not 'floaty'"),
        (lambda: QuantConfig(scale_search="fast"), "scale_search"),
        (lambda: QuantConfig(tune_epochs=-1), "tune_epochs"),
        (lambda: QuantConfig(detection="sometimes"), "detection"),
        (lambda: QuantConfig(rules=(QuantRule("x", act_bits=9),)).resolve("x.y"), "rules say, x.y cannot .* not 9"),
        (lambda: QuantConfig(rules=(QuantRule("x", detection="no"),)).resolve("x"), "detection must be 'dynamic', "),
        (lambda: QuantConfig(outlier_bits=6, rules=(QuantRule("x", act_bits=8),)).resolve("x"), "not 6"),
        (lambda: QuantConfig.preset("w2a2"), "no preset 'w2a2'; choose one of w4a4"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_alone_have_no_operands_and_no_outliers_no_wider_levels():
    weights, none = QuantConfig(act_bits=None), QuantConfig(detection="none")
    assert (weights.activation_operands, none.activation_operands) == ((), QuantConfig().operands)
    assert (none.splitting.act_bits, none.splitting.outlier_bits) == (4, 4)
    assert QuantConfig.preset("w8a8", outlier_bits=8).splitting.detection == "none"


def test_the_last_rule_that_sets_a_field_decides_it():
    rules = (
        QuantRule("a", act_bits=6, sigma=2.0),
        QuantRule("a.c", skip=True),
        QuantRule("a.b", weight_bits=8, sigma=3.0, operands=()),
        QuantRule("a.c.d", skip=False),
    )
    config = QuantConfig(rules=rules)
    assert config.resolve("a.z") == QuantConfig(act_bits=6, sigma=2.0)
    assert config.resolve("a.b") == QuantConfig(act_bits=6, weight_bits=8, sigma=3.0, operands=())
    assert config.deciding("a.b") == {
        "act_bits": rules[0],
        **dict.fromkeys(("weight_bits", "sigma", "operands"), rules[2]),
    }
    assert config.resolve("a.c") is None
    assert config.resolve("a.c.d") == config.resolve("a.z")
    assert config.resolve("e") == QuantConfig()


def test_every_setting_of_a_site_has_a_rule():
    fields = dict(weight_bits=3, act_bits=5, outlier_bits=16, weight_group=4, operands=("B",), sigma=2.5, n_refresh=7)
    rule = QuantRule("x", **fields, detection="static")
    assert QuantConfig(rules=(rule,)).resolve("x") == QuantConfig(**fields, detection="static")
    nothing = QuantRule("x", weight_group=0, act_bits=0)
    assert QuantConfig(weight_group=4, rules=(nothing,)).resolve("x") == QuantConfig(act_bits=None)


def test_a_rule_for_part_of_the_first_or_last_layer_keeps_the_rest():
    config = QuantConfig.preset("w4a4", rules=(QuantRule(r"^head", weight_bits=6), QuantRule("in_proj", act_bits=8)))
    for path, bits in (("head.proj", (6, 8, 16)), ("stem.proj", (8, 8, 16)), ("blocks.0.mixer.in_proj", (4, 8, 8))):
        found = config.resolve(path)
        assert (found.weight_bits, found.act_bits, found.outlier_bits) == bits


def test_lists_count_as_tuples():
    """A config is a static argument of compiled functions, so it must be hashable."""
    rule = QuantRule("x", operands=["delta", "B"])
    config = QuantConfig(operands=["delta"], rules=[rule])
    assert (config.operands, config.rules, rule.operands) == (("delta",), (rule,), ("delta", "B"))
    assert hash(config) == hash(QuantConfig(operands=("delta",), rules=(QuantRule("x", operands=("delta", "B")),)))
