"""What becomes of an int32 accumulator."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32


def epilogue(
    total: Int32[Array, "M N"] | Float32[Array, "M N"],
    row_scale: Float32[Array, " M"],
    column_scale: Float32[Array, " N"],
    bias: Float[Array, " N"] | None = None,
) -> Float32[Array, "M N"]:
    """total * column_scale * row_scale + bias, in the order of XLA."""

    def across(x, axis):
        return lax.broadcast_in_dim(x.astype(jnp.float32), total.shape, [axis])

    y = total.astype(jnp.float32) * across(column_scale, 1) * across(row_scale, 0)
    return y if bias is None else y + across(bias, 1)
