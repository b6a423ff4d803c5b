"""Where the outliers are: the channel lists of Algorithm 2, and what stands for them before any scale exists."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from ouromamba_jax.ops.qtensor import divide, max_level
from ouromamba_jax.ops.split_types import OutlierConfig
from ouromamba_jax.ops.token_windows import mean_and_std, walk_windows


def find_outliers(
    x: Float32[Array, "B L C"],
    scale: Float32[Array, " L"],
    config: OutlierConfig,
    theta: Float32[Array, " L"] | None,
    channels: Bool[Array, " C"] | None,
) -> Bool[Array, "B L C"]:
    """Which entries `split_outliers` treats as outliers.

    Raises:
      ValueError: if detection="static" finds no channels, or not as many as x has.
    """
    if config.detection == "none":
        return jnp.isnan(x)  # none; a constant would send XLA folding reductions over it for minutes
    if config.detection == "static":
        return _static_mask(x, channels)
    return _detect(x, scale, config, theta)


def _detect(x: Float32[Array, "B L C"], scale: Float32[Array, " L"], config: OutlierConfig, theta) -> Array:
    """The channel lists of Algorithm 2, as a mask (B, L, C)."""
    q = max_level(config.act_bits)
    online = config.threshold == "online"
    extra = jnp.stack([scale, scale if online else theta], axis=-1)[None]

    def grow(x_t, listed, extra_t, is_token):
        free = jnp.where(listed, 0.0, jnp.abs(x_t))
        if not online:  # or whether a NaN counts would depend on the backend's maximum
            free = jnp.where(jnp.isnan(free), jnp.inf, free)
        overflows = divide(jnp.max(free, axis=-1, keepdims=True), q) > extra_t[..., :1]
        if config.spec == "released":
            overflows = jnp.any(overflows & is_token[..., None])[None, None, None]
        if online:
            mean, std = mean_and_std(free)
            reach, limit = free - mean, config.sigma * std
        else:
            reach, limit = free, extra_t[..., 1:]
        above = reach > limit if config.spec == "released" else reach >= limit
        return listed | (overflows & above), jnp.zeros(x_t.shape[:2], jnp.float32)

    return walk_windows(x, config.n_refresh, grow, extra)[0]


def calibration_mask(
    x: Float32[Array, "B L C"], config: OutlierConfig, channels: Bool[Array, " C"] | None
) -> Bool[Array, "B L C"]:
    """Outliers before any scale exists: magnitudes above mean + sigma*std over all channels, kept for the window."""
    if config.detection == "none":
        return jnp.zeros(x.shape, bool)
    if config.detection == "static":
        return _static_mask(x, channels)
    magnitude = jnp.abs(x)
    mean, std = mean_and_std(magnitude)
    above = (magnitude - mean > config.sigma * std).astype(jnp.int8)
    B, L, C = x.shape
    windows = jnp.pad(above, ((0, 0), (0, -L % config.n_refresh), (0, 0))).reshape(B, -1, config.n_refresh, C)
    return (lax.cummax(windows, axis=2) > 0).reshape(B, -1, C)[:, :L]


def _static_mask(x: Float[Array, "B L C"], channels: Bool[Array, " C"] | None) -> Bool[Array, "B L C"]:
    if channels is None or channels.shape != x.shape[2:]:
        raise ValueError('detection="static" needs channels of shape (C,): pass the result of calibrate_channels')
    return jnp.broadcast_to(channels[None, None, :], x.shape)
