"""Levels of 2 to 8 bits: a checkpoint stores as many bytes as `memory_report` counts, and gives every level back."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from quantising import bits_of
from tiny_models import quantised

from ouromamba_jax import QuantConfig, QuantRule, load, memory_report, save
from ouromamba_jax.checkpoint import read_description
from ouromamba_jax.quantize.activation import Levels

BITS = {"stem": 2, "in_proj": 3, r"0\.x_proj": 4, r"1\.x_proj": 5, r"0\.dt_proj": 6, r"1\.dt_proj": 7, "head": 2}


def test_the_file_holds_what_is_counted(tmp_path):
    rules = tuple(QuantRule(pattern, weight_bits=bits) for pattern, bits in BITS.items())
    model = quantised(QuantConfig(weight_bits=8, rules=rules))
    levels = [leaf for _, leaf in nnx.to_flat_state(nnx.state(model)) if isinstance(leaf, Levels)]
    assert {leaf.bits for leaf in levels} == set(range(2, 9))
    report = memory_report(model)
    assert report.levels == sum(math.ceil(leaf.shape[0] * leaf.bits / 8) * leaf.shape[1] for leaf in levels)
    save(tmp_path / "model", model)
    stored = read_description(tmp_path / "model")["arrays"]
    sizes = [math.prod(shape) * jnp.dtype(kind).itemsize for kind, of in stored.items() for shape in of.values()]
    assert sum(sizes) == report.total
    again = load(tmp_path / "model")
    assert bits_of(again) == bits_of(model)
    assert {np.dtype(leaf.dtype) for _, leaf in nnx.to_flat_state(nnx.state(again)) if isinstance(leaf, Levels)} == {
        np.dtype(np.int8)
    }
