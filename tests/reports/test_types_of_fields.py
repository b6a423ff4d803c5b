"""Config fields of another type than theirs, such as "4" bits, are refused by one sentence that says what they are."""

import dataclasses
import math
import re

import numpy as np
import pytest

from ouromamba_jax import GenConfig, OutlierConfig, QuantConfig, QuantRule
from ouromamba_jax.baselines.base import BaselineConfig
from ouromamba_jax.baselines.ptq4vm import PTQ4VMConfig

CONFIGS = (OutlierConfig, QuantConfig, GenConfig, BaselineConfig, PTQ4VMConfig)
WRONG = {int: ("4", 4.0, 2.5, True, math.nan, (4,)), float: ("3", True, math.nan, math.inf, (3.0,))}
FIELDS = [
    (config, field.name, kind)
    for config in CONFIGS
    for field in dataclasses.fields(config)
    for kind in (int, float)
    if field.type in (kind, kind | None)
]


@pytest.mark.parametrize(("config", "name", "kind"), FIELDS, ids=lambda v: getattr(v, "__name__", v))
def test_every_number_of_every_config(config, name, kind):
    for value in WRONG[kind]:
        with pytest.raises(ValueError, match=rf"^{name} must be a (whole )?number( or None)?, not .*\.$"):
            config(**{name: value})
    for value in (-1, kind(-1)):
        with pytest.raises(ValueError, match=name):
            config(**{name: value})


def test_the_list_has_them_all():
    found = {(config.__name__, name) for config, name, _ in FIELDS}
    for field in ("QuantConfig weight_bits", "OutlierConfig act_bits", "GenConfig iterations", "PTQ4VMConfig alpha"):
        assert tuple(field.split()) in found


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(weight_bits="w4"), "weight_bits must be a whole number or None, not 'w4'."),
        (dict(weight_bits=4.0), "weight_bits must be a whole number or None, not 4.0."),
        (dict(sigma="3"), "sigma must be a number or None, not '3'."),
        (dict(skip=1), "skip must be True or False or None, not 1."),
        (dict(detection=True), "detection must be 'dynamic', 'static' or 'none' or None, not True."),
        (dict(operands=4), "operands must be a tuple of names, not 4"),
        (dict(operands=("u", 4)), "operands 4 do not exist"),
        (dict(pattern=4, skip=True), "pattern must be a text, not 4."),
    ],
)
def test_rules(fields, says):
    with pytest.raises(ValueError, match=rf"^{re.escape(says)}"):
        QuantRule(**{"pattern": "x", **fields})


@pytest.mark.parametrize(
    "fields", [dict(act_bits="a4"), dict(act_bits=4.0), dict(act_bits=True), dict(act_bits=np.float32(4))]
)
def test_bits_of_activations_which_may_be_none(fields):
    with pytest.raises(ValueError, match=r"^act_bits must be a whole number, not .*\.$"):
        QuantConfig(**fields)
    assert QuantConfig(act_bits=None).act_bits is None
    assert type(QuantConfig(act_bits=np.int8(5)).act_bits) is int
