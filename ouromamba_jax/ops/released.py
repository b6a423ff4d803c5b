"""The published code's quantiser for delta: asymmetric, with a zero point per token. For comparison only.

Like all of `spec="released"` its trigger is shared by the whole batch: a sample's result depends on its batch mates.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from ouromamba_jax.ops.qtensor import MIN_SCALE, SEARCH_NORM, divide
from ouromamba_jax.ops.split_detection import calibration_mask
from ouromamba_jax.ops.split_types import OutlierConfig
from ouromamba_jax.ops.token_windows import mean_and_std, walk_windows


@partial(jax.jit, static_argnames="config")
def search_ranges(x: Float[Array, "B L C"], config: OutlierConfig) -> tuple[Float32[Array, " L"], Float32[Array, " L"]]:
    """(scale, zero point) of every token position: the 100-step search of the 2.4 norm shrinks both ends of the range.

    Levels run from 0 to 2^bits - 1. The best range is widened to hold 0; the zero point is not clipped.
    """
    x = jnp.where(calibration_mask(x.astype(jnp.float32), config, None), 0.0, x.astype(jnp.float32))
    limit = jnp.float32(2**config.act_bits - 1)
    low, high = jnp.min(x, axis=(0, 2)), jnp.max(x, axis=(0, 2))
    fractions = jnp.asarray(np.arange(1, 101, dtype=np.float32) / np.float32(100))

    def score(low, high):
        scale = jnp.maximum(divide(high - low, limit), MIN_SCALE)
        rounded = _round(x, scale[None, :, None], -jnp.round(divide(low, scale))[None, :, None], limit)
        return jnp.mean(jnp.exp(SEARCH_NORM * jnp.log(jnp.abs(x - rounded))), axis=(0, 2))

    def step(i, best):
        a = fractions[i]
        shrunk = low * (1 - a) + high * a, low * a + high * (1 - a)
        new = score(*shrunk)
        return tuple(jnp.where(new < best[0], n, b) for n, b in zip((new, *shrunk), best, strict=True))

    _, low, high = lax.fori_loop(0, 100, step, (jnp.full(low.shape, jnp.inf), low, high))
    low = jnp.minimum(low, 0)
    scale = jnp.maximum(divide(jnp.maximum(high, 0) - low, limit), MIN_SCALE)
    return scale, -jnp.round(divide(low, scale))


@partial(jax.jit, static_argnames="config")
def quantize_asymmetric(
    x: Float[Array, "B L C"], scale: Float32[Array, " L"], zero: Float32[Array, " L"], config: OutlierConfig
) -> tuple[Float32[Array, "B L C"], Bool[Array, "B L C"]]:
    """(x after rounding, outlier mask). Roundings pass gradients straight through, to x and to the scales.

    Args:
      scale, zero: of every token position, from `search_ranges`.
    """
    x = x.astype(jnp.float32)
    limit = jnp.float32(2**config.act_bits - 1)
    listed = _detect(lax.stop_gradient(x), lax.stop_gradient(scale), limit, config)
    inlier = _round(jnp.where(listed, 0.0, x), scale[None, :, None], zero[None, :, None], limit)
    outlier = jnp.where(listed, x, 0.0)
    if config.outlier_bits < 16:
        top = jnp.float32(2**config.outlier_bits - 1)
        low, high = jnp.min(outlier, axis=-1, keepdims=True), jnp.max(outlier, axis=-1, keepdims=True)
        step = jnp.maximum(divide(high - low, top), MIN_SCALE)
        outlier = _round(outlier, step, -lax.stop_gradient(jnp.round(divide(low, step))), top)
    return inlier + outlier, listed


def _detect(x: Array, scale: Array, limit: Array, config: OutlierConfig) -> Bool[Array, "B L C"]:
    def grow(x_t, listed, scale_t, is_token):
        free = jnp.where(listed, 0.0, x_t)
        span = jnp.max(free, axis=-1) - jnp.min(free, axis=-1)
        overflows = jnp.any((divide(span, limit) > scale_t) & is_token)
        mean, std = mean_and_std(jnp.abs(free))
        above = jnp.abs(free) - mean > config.sigma * std
        return listed | (overflows & above), jnp.zeros(span.shape, jnp.float32)

    return walk_windows(x, config.n_refresh, grow, scale[None])[0]


def _round(x: Array, scale: Array, zero: Array, limit: Array) -> Array:
    ratio = divide(x, scale)
    ratio = ratio + lax.stop_gradient(jnp.round(ratio) - ratio)
    return (jnp.clip(ratio + zero, 0.0, limit) - zero) * scale
