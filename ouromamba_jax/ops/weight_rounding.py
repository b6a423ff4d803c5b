"""Rounding of a weight in turn: what one input's rounding changes, the inputs after it make up for."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8

from ouromamba_jax.ops.qtensor import divide, max_level

DAMPING = 0.01
"""Of the mean of the moments' diagonal, added to it (Frantar et al. 2023)."""
BLOCK = 128
"""Inputs rounded before the rest of the weight is changed for all of them at once."""


@partial(jax.jit, static_argnames="bits")
def gptq_round(
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
    blocks = -(-len(kernel) // BLOCK)
    size = -(-len(kernel) // blocks)
    padding = blocks * size - len(kernel)
    left = jnp.pad(kernel.astype(jnp.float32)[order], ((0, padding), (0, 0)))
    step = jnp.pad(step, ((0, padding), (0, 0)), constant_values=1)
    change = jax.scipy.linalg.block_diag(change, jnp.eye(padding))
    limit = max_level(bits)

    def block(b: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, levels = carry
        rows, steps, changes = (lax.dynamic_slice_in_dim(x, b * size, size) for x in (left, step, change))
        within = lax.dynamic_slice_in_dim(changes, b * size, size, axis=1)

        def turn(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            rows, rounded, errors = carry
            level = jnp.clip(jnp.round(divide(rows[i], steps[i])), -limit, limit)
            error = (rows[i] - level * steps[i]) / within[i, i]
            return rows - within[i][:, None] * error[None], rounded.at[i].set(level), errors.at[i].set(error)

        empty = jnp.zeros_like(rows)
        _, rounded, errors = lax.fori_loop(0, size, turn, (rows, empty, empty))
        left = left - jnp.matmul(changes.T, errors, precision="highest")
        return left, lax.dynamic_update_slice_in_dim(levels, rounded.astype(jnp.int8), b * size, axis=0)

    _, levels = lax.fori_loop(0, blocks, block, (left, jnp.zeros(left.shape, jnp.int8)))
    return jnp.zeros(kernel.shape, jnp.int8).at[order].set(levels[: len(kernel)])
