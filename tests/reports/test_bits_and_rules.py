"""Bits in any spelling, bits without a preset, and rules on the command line of `quantize`."""

import pytest

from ouromamba_jax import QuantConfig, QuantRule
from ouromamba_jax.cli import quantize
from ouromamba_jax.cli.main import main
from ouromamba_jax.quantize import PRESETS

CALL = ("quantize", "vim_micro", "--images", "nowhere", "out")


def config_of(monkeypatch, *options):
    """What the command would quantise with."""
    seen = []

    def stop(arguments):
        seen.append(quantize.quant_config(arguments))

    monkeypatch.setattr(quantize, "quantize_verb", stop)
    assert main([*CALL, *options]) == 0
    return seen[0]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("spell", [str.lower, str.upper, str.capitalize])
def test_presets_in_any_case(name, spell, monkeypatch):
    assert config_of(monkeypatch, "--bits", spell(name)) == QuantConfig.preset(name)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        (("--bits", "w3a8"), (3, 8, 16)),
        (("--bits", "W2A5"), (2, 5, 8)),
        (("--bits", "w4a4", "--act-bits", "8"), (4, 8, 16)),
        (("--bits", "w8a8", "--weight-bits", "3", "--act-bits", "6"), (3, 6, 8)),
        (("--bits", "w4a4", "--outlier-bits", "16"), (4, 4, 16)),
    ],
)
def test_any_bits_keep_the_edges_at_eight(options, bits, monkeypatch):
    config = config_of(monkeypatch, *options)
    inside, head = config.resolve("blocks.0.mixer.in_proj"), config.resolve("head.proj")
    assert (inside.weight_bits, inside.act_bits, inside.outlier_bits) == bits
    assert (head.weight_bits, head.act_bits, head.outlier_bits) == (8, 8, 16)


def test_plain_int8_is_plain_everywhere(monkeypatch):
    config = config_of(monkeypatch, "--bits", "w8a8", "--outlier-bits", "8")
    assert {config.resolve(path).outlier_bits for path in ("blocks.0.mixer.in_proj", "head.proj")} == {8}


def test_rules_come_after_those_of_the_presets(monkeypatch):
    rules = ("in_proj:act_bits=8,outlier_bits=16", r"blocks\.(?:0|3)\.:skip", "scan:operands=delta+B", r"^head\.:skip")
    config = config_of(monkeypatch, "--bits", "w4a4", *(f"--rule={rule}" for rule in rules))
    assert config.rules[-4:] == (
        QuantRule("in_proj", act_bits=8, outlier_bits=16),
        QuantRule(r"blocks\.(?:0|3)\.", skip=True),
        QuantRule("scan", operands=("delta", "B")),
        QuantRule(r"^head\.", skip=True),
    )
    assert config.rules[:-4] == QuantConfig.preset("w4a4").rules
    assert config.resolve("blocks.1.mixer.in_proj").act_bits == 8
    assert config.resolve("blocks.3.mixer.out_proj") is None
    assert config.resolve("head.proj") is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bits", "4"), "--bits 4 means nothing; give the bits of weights and activations, e.g. --bits w4a4."),
        (("--bits", "w4a4x"), "--bits w4a4x means nothing"),
        (("--bits", "w9a4"), "weight_bits must be 2 to 8, not 9"),
        (("--bits", "w4a9"), "activations cannot have 9 bits; give 2 to 8, or 16"),
        (("--bits", "w4a4", "--rule", "in_proj"), "'in_proj' in the rule 'in_proj' sets nothing; write PATTERN:FIELD="),
        (("--bits", "w4a4", "--rule", "in_proj:bits=8"), "'bits=8' in the rule"),
        (("--bits", "w4a4", "--rule", "in_proj:act_bits=many"), "'act_bits=many' in the rule"),
        (("--bits", "w4a4", "--rule", "in_proj:act_bits"), "'act_bits' in the rule"),
        (("--bits", "w4a4", "--rule", "in_proj:skip=perhaps"), "'skip=perhaps' in the rule"),
        (("--bits", "w4a4", "--rule", ":act_bits=8"), "sets nothing; write PATTERN:FIELD=VALUE"),
        (("--bits", "w4a4", "--rule", "(:act_bits=8"), "the rule pattern '(' is not a regular expression"),
    ],
)
def test_what_means_nothing_is_one_sentence(options, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*CALL, *options]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


def test_a_rule_sets_every_field():
    text = (
        "a:b:weight_bits=3,act_bits=0,outlier_bits=16,weight_group=0,operands=u+B,sigma=2.5,n_refresh=7,detection=none"
    )
    assert quantize.parse_rule(text) == QuantRule("a:b", 3, 0, 16, 0, ("u", "B"), 2.5, 7, "none")
    assert quantize.parse_rule("a:skip=false,weight_bits=3") == QuantRule("a", weight_bits=3, skip=False)
