"""What every family of models must do, checked on a small one of it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tolerances import BFLOAT16_LOGITS, REORDERED

from ouromamba_jax.checkpoint import load, save
from ouromamba_jax.convert import from_torch
from ouromamba_jax.models import VisionModel


def check_that_samples_do_not_mix(model: VisionModel, run: Any, x: jax.Array) -> None:
    """`run` is the jitted `pure(model)[0]`."""
    state = nnx.state(model)
    logits, other = run(state, x), run(state, x.at[0].multiply(2.0))
    np.testing.assert_allclose(run(state, x[::-1]), logits[::-1], rtol=0, atol=REORDERED)
    np.testing.assert_array_equal(other[1:], logits[1:])
    assert not np.allclose(other[0], logits[0], rtol=0, atol=REORDERED)


def check_other_types(name: str, weights: dict[str, np.ndarray], fields: dict[str, Any], x: jax.Array) -> None:
    """bfloat16 computes nearly the same, and is stored if asked for; logits stay float32."""
    expected = jax.jit(from_torch(name, weights, **fields))(x)
    logits = jax.jit(from_torch(name, weights, dtype=jnp.bfloat16, **fields))(x)
    assert logits.dtype == jnp.float32
    assert float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)) < BFLOAT16_LOGITS
    stored = from_torch(name, weights, param_dtype=jnp.bfloat16, **fields)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(stored))} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(stored, x).dtype == jnp.float32


def check_saved_and_loaded(model: VisionModel, folder: Path) -> None:
    save(folder, model)
    loaded = load(folder)
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))
