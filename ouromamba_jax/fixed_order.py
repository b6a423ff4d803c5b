"""Sums that have the same bits in every program and at every batch size.

XLA picks the order of a reduction by the size of the array, and contracts a product and a sum into a fused multiply-add
in some programs and not in others: a sample's last bit may then depend on the batch, and a rounding makes it a level.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from ouromamba_jax.cpu_barrier import cpu_barrier

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def tree_sum(x: Float32[Array, "*rows C"]) -> Float32[Array, "*rows 1"]:
    """Sum over the last axis in a fixed order: halves are added until one column is left."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 64)])
    while (n := x.shape[-1]) > 1:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n % 2)])
        x = x[..., : (n + 1) // 2] + x[..., (n + 1) // 2 :]
        if n > 64 >= (n + 1) // 2:  # XLA would compute the wide halves twice, for two loops over the narrow ones
            x = cpu_barrier(x)
    return x


def tree_mean(x: Float32[Array, "*rows C"]) -> Float32[Array, "*rows 1"]:
    """Mean over the last axis, by `tree_sum`."""
    total = tree_sum(x)
    return total / jnp.full_like(total, x.shape[-1])


def guard_product(product: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The same value, which the compiler cannot contract with a sum, into a fused multiply-add here but not there."""
    return jnp.minimum(product, _FLOAT32_MAX)
