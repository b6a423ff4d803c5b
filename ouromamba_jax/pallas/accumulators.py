"""How outliers of a tile are added to its inliers: in one accumulator, or in two where a shift is too large for one."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from ouromamba_jax.ops.fixed_order import guard_product

COLUMNS = 32
"""Of a tile at a time: two accumulators of a whole one, 128 x 128 in 128 threads, are 256 registers."""


def shifted(outliers: Int32[Array, "M N"], power: Int32[Array, " M"]) -> Int32[Array, "M N"]:
    """2^power * outliers; 0 for rows with power 0, whose outliers were not written."""
    has_outliers, power = (lax.broadcast_in_dim(x, outliers.shape, [0]) for x in (power > 0, power))
    return jnp.where(has_outliers, lax.shift_left(outliers, power), 0)


def add(
    outliers: Int32[Array, "M N"],
    inliers: Int32[Array, "M N"],
    power: Int32[Array, " M"],
    row_scale: Float32[Array, " M"],
    limit: int,
) -> Float32[Array, "M N"]:
    """row_scale * (2^power * outliers + inliers), to the bit as one accumulator gives it where int32 holds the sum.

    Elsewhere in floats, in units of the outliers, as the reference does. `power` 0 as for `shifted`.
    """
    beyond = power > limit

    def across(x):
        return lax.broadcast_in_dim(x, outliers.shape, [0])

    exact = shifted(outliers, jnp.where(beyond, 0, power)) + inliers
    rounded = outliers.astype(jnp.float32) + inliers.astype(jnp.float32) * across(_power_of_two(-power))
    scale = jnp.where(beyond, row_scale * _power_of_two(power), row_scale)
    return jnp.where(across(beyond), rounded, exact.astype(jnp.float32)) * across(scale)


def scaled(
    y: Float32[Array, "M N"], column_scale: Float32[Array, " N"], bias: Float[Array, " N"] | None = None
) -> Float32[Array, "M N"]:
    """y * column_scale + bias, rounded twice, as XLA does it."""

    def down(x):
        return lax.broadcast_in_dim(x.astype(jnp.float32), y.shape, [1])

    y = y * down(column_scale)
    return y if bias is None else guard_product(y) + down(bias)


def _power_of_two(exponent: Int32[Array, " M"]) -> Float32[Array, " M"]:
    """2^exponent for exponents from -126 to 127."""
    return lax.bitcast_convert_type(lax.shift_left(exponent + 127, 23), jnp.float32)
