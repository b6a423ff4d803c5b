"""The settings of a quantisation: what contradicts itself is refused, and the first rule that matches decides."""

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
        (lambda: QuantConfig.preset("w2a2"), "no preset 'w2a2'; choose among w4a4"),
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


def test_the_first_rule_that_matches_decides():
    config = QuantConfig(
        rules=(QuantRule("a.b", act_bits=6), QuantRule("a", skip=True), QuantRule("c", weight_bits=8, operands=()))
    )
    assert config.resolve("a.b.z").act_bits == 6
    assert config.resolve("a.c") is None
    assert (config.resolve("c").weight_bits, config.resolve("c").operands) == (8, ())
    assert config.resolve("d") == QuantConfig()
    assert all(config.resolve(path).rules == () for path in ("a.b", "c", "d"))


def test_rules_come_before_those_of_a_preset():
    config = QuantConfig.preset("w4a4", rules=(QuantRule(r"^head", weight_bits=6), QuantRule("in_proj", act_bits=8)))
    assert (config.resolve("head.proj").weight_bits, config.resolve("head.proj").act_bits) == (6, 4)
    assert config.resolve("stem.proj").weight_bits == 8
    assert config.resolve("blocks.0.mixer.in_proj").act_bits == 8


def test_lists_count_as_tuples():
    """A config is a static argument of compiled functions, so it must be hashable."""
    rule = QuantRule("x", operands=["delta", "B"])
    config = QuantConfig(operands=["delta"], rules=[rule])
    assert (config.operands, config.rules, rule.operands) == (("delta",), (rule,), ("delta", "B"))
    assert hash(config) == hash(QuantConfig(operands=("delta",), rules=(QuantRule("x", operands=("delta", "B")),)))
