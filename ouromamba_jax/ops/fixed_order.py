"""Sums that have the same bits in every program and at every batch size, everywhere or on a CPU.

XLA picks the order of a reduction by the size of the array, and contracts a product and a sum into a fused multiply-add
in some programs and not in others: a sample's last bit may then depend on the batch, and a rounding makes it a level.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

from ouromamba_jax.ops.cpu_barrier import cpu_barrier

LANES = 128
FLOAT32_MAX = float(np.finfo(np.float32).max)


def tree_sum(x: Float32[Array, "*rows C"]) -> Float32[Array, "*rows 1"]:
    """Sum over the last axis in a fixed order, which is also that of 128 GPU threads.

    Columns that are `LANES` apart are added one after the other, then neighbours in pairs until one is left.
    """
    columns = x.shape[-1]
    lanes = min(LANES, 1 << (columns - 1).bit_length())
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -columns % lanes)])
    total = x[..., :lanes]
    for first in range(lanes, x.shape[-1], lanes):
        total = total + x[..., first : first + lanes]
    if columns > lanes:  # or XLA would compute these sums twice, for both neighbours of a pair
        total = cpu_barrier(total)
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    return total


@jax.custom_jvp
def cpu_tree_sum(x: Float32[Array, "*rows C"]) -> Float32[Array, "*rows 1"]:
    """`tree_sum` on a CPU; elsewhere XLA's own sum, which is fused with its neighbours and saves memory traffic."""
    return lax.platform_dependent(x, cpu=tree_sum, default=partial(jnp.sum, axis=-1, keepdims=True))


@cpu_tree_sum.defjvp
def _cpu_tree_sum_jvp(primals, tangents):
    """Its transpose is a broadcast; that of the pairs would be seven dilations, which take longer than the sum."""
    (x,), (tangent,) = primals, tangents
    return cpu_tree_sum(x), jnp.sum(tangent, axis=-1, keepdims=True)


def cpu_tree_mean(x: Float32[Array, "*rows C"]) -> Float32[Array, "*rows 1"]:
    """Mean over the last axis, by `cpu_tree_sum`."""
    total = cpu_tree_sum(x)
    return total / jnp.full_like(total, x.shape[-1])


def guard_product(product: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The same value, which the compiler cannot contract with a sum, into a fused multiply-add here but not there."""
    return jnp.minimum(product, FLOAT32_MAX)
