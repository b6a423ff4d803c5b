"""Rounding of a weight in turn: what one input's rounding changes, the inputs after it make up for."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8

from ouromamba_jax.ops.qtensor import divide, max_level

DAMPING = 0.01
"""Of the mean of the moments' diagonal, added to it (Frantar et al. 2023)."""


@partial(jax.jit, static_argnames="bits")
def round_in_turn(
    kernel: Float[Array, "K O"], scale: Float32[Array, "groups O"], moments: Float32[Array, "K K"], *, bits: int
) -> Int8[Array, "K O"]:
    """Levels of a linear layer's weight that keep its outputs: GPTQ (Frantar et al. 2023), in activation order.

    The input of the largest second moment is rounded first. The weights of the inputs that are left then change so that
    the outputs' squared error becomes as small as it can. Scales stay as they are.

    Args:
      kernel: inputs by outputs.
      scale: one step per output and group of inputs.
      moments: sum of x x^T over the tokens x that enter the layer.
      bits: 2 to 8.
    """
    diagonal = jnp.diagonal(moments)
    order = jnp.argsort(-diagonal)
    damped = moments[order][:, order] + (DAMPING * jnp.mean(diagonal) + 1e-12) * jnp.eye(len(moments))
    inverse = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(damped, lower=True), jnp.eye(len(moments)))
    change = jnp.linalg.cholesky(inverse).T
    step = jnp.repeat(scale, len(kernel) // len(scale), axis=0)[order]
    limit = max_level(bits)

    def turn(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, levels = carry
        level = jnp.clip(jnp.round(divide(left[i], step[i])), -limit, limit)
        error = (left[i] - level * step[i]) / change[i, i]
        return left - change[i][:, None] * error[None], levels.at[i].set(level.astype(jnp.int8))

    kernel = kernel.astype(jnp.float32)[order]
    _, levels = lax.fori_loop(0, len(kernel), turn, (kernel, jnp.zeros(kernel.shape, jnp.int8)))
    return jnp.zeros_like(levels).at[order].set(levels)
