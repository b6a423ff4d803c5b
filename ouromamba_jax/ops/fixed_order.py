"""Sums that have the same bits in every program and at every batch size.

XLA picks the order of a reduction by the size of the array, and contracts a product and a sum into a fused multiply-add
in some programs and not in others: a sample's last bit may then depend on the batch, and a rounding makes it a level.
"""

import jax.numpy as jnp
import numpy as np
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


def guard_product(product: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The same value, which the compiler cannot contract with a sum, into a fused multiply-add here but not there."""
    return jnp.minimum(product, FLOAT32_MAX)
