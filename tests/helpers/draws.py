"""Random arrays. Drawn by NumPy: what JAX draws, it compiles first, for every shape anew."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def student_t(seed: int, shape: tuple[int, ...], freedom: float, limit: float) -> jax.Array:
    """Heavy tails, cut at +-limit; `freedom` is the degrees of freedom."""
    return jnp.asarray(np.random.default_rng(seed).standard_t(freedom, shape).clip(-limit, limit), jnp.float32)


def heavy_tailed(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Normal values, and rare ones far outside."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) + 0.3 * rng.standard_t(1.5, shape).clip(-20, 20)
    return jnp.asarray(values, jnp.float32)
