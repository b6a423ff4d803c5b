"""The breakdown of a block: how its input is made."""

import jax
import numpy as np
from flax import nnx
from tiny_models import TINY

from ouromamba_jax.evaluation import breakdown
from ouromamba_jax.evaluation.bench import random_images
from ouromamba_jax.models import create_model


def test_no_weight_becomes_a_constant_of_a_program(monkeypatch):
    """Compiled into a program, weights would be there twice; JAX warns of constants, and warnings are errors."""
    model = create_model("vim_micro", rngs=nnx.Rngs(0), **{**TINY, "depth": 3})
    seen = []
    part_inputs = breakdown._part_inputs
    monkeypatch.setattr(
        breakdown, "_part_inputs", lambda block, x, kinds: seen.append(x) or part_inputs(block, x, kinds)
    )
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", 1000)
    try:
        breakdown.block_breakdown(model, 2, repeats=1)
    finally:
        jax.config.update("jax_captured_constants_warn_bytes", before)
    expected = random_images(model, 2)
    for _, stage in model.stages[:2]:
        expected = stage(expected)
    np.testing.assert_allclose(seen[0], expected, rtol=1e-5, atol=1e-5)
