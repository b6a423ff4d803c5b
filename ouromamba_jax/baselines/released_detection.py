"""Where the published code of OuroMamba sees outliers: the lists of its calibration and those of its inference."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from ouromamba_jax.ops.qtensor import divide

N_REFRESH = 10
"""Tokens per window."""
SIGMA = 3.0
"""Standard deviations above the mean magnitude at which a channel becomes an outlier."""
DELTA_SIGMA = 4.0
"""The same for delta."""


def _mean_and_std(x: Float[Array, "*rows C"]) -> tuple[Float32[Array, "*rows 1"], Float32[Array, "*rows 1"]]:
    """Over the channels, of magnitudes; the unbiased deviation, and 0 of a single channel."""
    return jnp.mean(x, axis=-1, keepdims=True), jnp.std(x, axis=-1, keepdims=True, ddof=min(1, x.shape[-1] - 1))


def _windows(x: Float[Array, "B L C"]) -> Float[Array, "B windows n C"]:
    """Tokens by window, the last one filled up with zeros."""
    B, L, C = x.shape
    n = min(N_REFRESH, L)
    return jnp.pad(x, ((0, 0), (0, -L % n), (0, 0))).reshape(B, -1, n, C)


def inliers(x: Float[Array, "B L C"], sigma: float = SIGMA) -> Float32[Array, "B L C"]:
    """x with its outliers set to 0, before any scale exists, for calibration.

    An outlier's magnitude exceeds its token's mean + sigma * std, over all channels; the channel stays one until the
    window ends.
    """
    x = x.astype(jnp.float32)
    size = jnp.abs(x)
    mean, std = _mean_and_std(size)
    listed = lax.cummax(_windows((size > mean + sigma * std).astype(jnp.float32)), axis=2) > 0
    return jnp.where(listed.reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]], 0.0, x)


def detect(
    x: Float32[Array, "B L C"],
    scale: Float32[Array, " L"],
    levels: int,
    *,
    sigma: float = SIGMA,
    span: Callable[[Array], Array],
) -> Bool[Array, "B L C"]:
    """Which entries are outliers at inference.

    All windows of the batch step together from token to token, each with a list of channels that starts empty. If
    span(token) / levels exceeds the scale anywhere, listed channels counted as 0, then every token at this place of its
    window lists the channels whose magnitude exceeds its mean + sigma * std.

    Args:
      levels: steps that span a range: 7 for symmetric 4 bits, 15 for asymmetric ones.
      span: the range (..., C) -> (...) of tokens.
    """
    windows = _windows(x)
    fill = windows.shape[1] * windows.shape[2] - x.shape[1]
    scales = jnp.pad(scale, (0, fill), constant_values=1).reshape(windows.shape[1:3])

    def step(listed: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
        x_t, scale_t = token
        free = jnp.where(listed, 0.0, x_t)
        triggered = jnp.any(divide(span(free), levels) > scale_t[None])
        size = jnp.abs(free)
        mean, std = _mean_and_std(size)
        listed = listed | (triggered & (size > mean + sigma * std))
        return listed, listed

    start = jnp.zeros(windows.shape[:2] + windows.shape[3:], bool)
    _, listed = lax.scan(step, start, (jnp.moveaxis(windows, 2, 0), scales.T))
    return jnp.moveaxis(listed, 0, 2).reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]
