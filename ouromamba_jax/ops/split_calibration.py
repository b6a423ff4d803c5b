"""What Algorithm 2 takes from calibration: static scales per token, offline thresholds, fixed lists of channels."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from ouromamba_jax.ops.qtensor import FULL_RANGE_FRACTIONS, max_level, search_scale
from ouromamba_jax.ops.split_detection import calibration_mask
from ouromamba_jax.ops.split_types import OutlierConfig
from ouromamba_jax.ops.token_windows import mean_and_std, walk_windows


def search_token_scales(
    x: Float[Array, "B L C"], config: OutlierConfig, *, channels: Bool[Array, " C"] | None = None, search: bool = True
) -> Float32[Array, " L"]:
    """Static inlier scale of every token position, from calibration samples.

    Outliers are set to zero and the 100-step search of the 2.4 norm runs over samples and channels of a position.
    spec="paper" tries 1 % .. 100 % of the inlier range; "released" 99 % .. 0 %, so never the full range.

    Args:
      x: (B, L, C) calibration activations, tokens in scan order.
      channels: (C,) outlier channels, needed by detection="static".
      search: False takes the inliers' range as it is.

    Raises:
      ValueError: if detection="static" finds no channels, or not as many as x has.
    """
    # The bits enter as a number, not as a constant: one compilation serves all of them.
    shared = replace(config, act_bits=8, outlier_bits=8)
    return _search_token_scales(x, jnp.float32(max_level(config.act_bits)), shared, channels, search)


@partial(jax.jit, static_argnames=("config", "search"))
def _search_token_scales(x, limit, config, channels, search):
    x = x.astype(jnp.float32)
    inliers = jnp.where(calibration_mask(x, config, channels), 0.0, x)
    released = tuple(1 - i / 100 for i in range(1, 101))
    fractions = released if config.spec == "released" else FULL_RANGE_FRACTIONS
    fractions = fractions if search else (1.0,)
    return search_scale(inliers, limit, axes=(0, 2), fractions=fractions)[0, :, 0]


@partial(jax.jit, static_argnames="config")
def calibrate_theta(x: Float[Array, "B L C"], config: OutlierConfig) -> Float32[Array, " L"]:
    """Thresholds for threshold="offline": the online statistic of each position, averaged over samples.

    No scale exists yet, so every token counts as overflowing (with searched scales 95-100 % do).
    """

    def grow(x_t, listed, _extra, _is_token):
        free = jnp.where(listed, 0.0, jnp.abs(x_t))
        mean, std = mean_and_std(free)
        # Compared as in `split_outliers`; the strict sign keeps an all-zero token from listing everything.
        return listed | (free - mean > config.sigma * std), (mean + config.sigma * std)[..., 0]

    x = x.astype(jnp.float32)
    _, thetas = walk_windows(x, config.n_refresh, grow, jnp.ones((1, x.shape[1]), jnp.float32))
    return jnp.mean(thetas, axis=0)


@partial(jax.jit, static_argnames="config")
def calibrate_channels(x: Float[Array, "B L C"], config: OutlierConfig) -> Bool[Array, " C"]:
    """Channels for detection="static": those of the largest magnitude over samples and tokens.

    `static_list` says which magnitude: the mean, the statistic of the published code's channel list, or the largest.
    There are as many channels as the dynamic algorithm lists on average: both detections have one budget and spend it
    differently. No scale exists yet, so every token counts as overflowing.
    """
    x = x.astype(jnp.float32)
    listed = calibration_mask(x, replace(config, detection="dynamic"), None)
    budget = jnp.ceil(jnp.mean(jnp.sum(listed.astype(jnp.float32), axis=-1)))
    statistic = jnp.mean if config.static_list == "mean" else jnp.max
    rank = jnp.argsort(jnp.argsort(-statistic(jnp.abs(x), axis=(0, 1)), stable=True), stable=True)
    return rank.astype(jnp.float32) < budget
