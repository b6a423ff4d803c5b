"""What Algorithm 2 takes from calibration: steps and thresholds of every token, fixed lists of channels."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Float32, Int8

from ouromamba_jax.ops.qtensor import FULL_RANGE_FRACTIONS, MIN_SCALE, SEARCH_NORM, search_scale
from ouromamba_jax.ops.split import (
    LARGEST_SHIFT,
    OutlierConfig,
    Split,
    detection_limit,
    fake_quant,
    find_listed,
    split_outliers,
    window_length,
)

WORTH_A_BYTE = 2.0
"""By how much the loss of a token must shrink for a second product: a huge outlier would take all levels of inliers."""

QUIETEST = 1 / 8
"""The smallest step of a token, in medians of its activation's: below what tokens that are excited differ by."""


@partial(jax.tree_util.register_dataclass, data_fields=["scale", "theta", "shift", "channels"], meta_fields=[])
@dataclass(frozen=True)
class Calibration:
    """What calibration found for one activation (B, L, C); see `split_outliers`.

    Attributes:
      scale: float32 (L,), the step of every token, positive.
      theta: bfloat16 (L,), thresholds of dynamic detection, whose later digits decide nothing; or None.
      shift: int8 (L,), by how much outliers are shifted, or None where no outlier needs a second byte.
      channels: bool (C,), the outlier channels of static detection, or None.
    """

    scale: Float32[Array, " L"]
    theta: BFloat16[Array, " L"] | None = None
    shift: Int8[Array, " L"] | None = None
    channels: Bool[Array, " C"] | None = None

    def split(self, x: Float[Array, "B L C"], config: OutlierConfig) -> Split:
        """`split_outliers` of x."""
        return split_outliers(x, self.scale, config, theta=self.theta, shift=self.shift, channels=self.channels)

    def fake(self, x: Float[Array, "B L C"], config: OutlierConfig) -> Float32[Array, "B L C"]:
        """`fake_quant` of x."""
        return fake_quant(x, self.scale, config, theta=self.theta, shift=self.shift, channels=self.channels)


def calibrate(x: Float[Array, "B L C"], config: OutlierConfig, *, search: bool = True) -> Calibration:
    """Steps, thresholds and lists from calibration samples.

    theta is the mean over samples of mean + sigma * std (ddof=1) of a token's magnitudes, listed channels counted as
    zero. The step is searched (100 candidates, 2.4 norm over samples and channels) with what exceeds theta set to zero.
    Where outliers have no more levels than inliers, nothing is set apart and the search sees every entry.
    Where an outlier exceeds Q * S, S is raised until it fits, if that loses less than saturating it. If at some token
    either loses more than twice as much as outliers in multiples of 2^j would, this activation gets a second byte.

    No step is below an eighth of the median of those of tokens that are not all zeros: a token that calibration hardly
    excites, such as one in the black bars of a film, would else have no levels for what it meets later.

    Activations of so few channels that none can lie sigma deviations above their mean have one step for all tokens: a
    step per token from so few values would not cover samples that calibration has not seen.

    Args:
      x: (B, L, C), tokens in scan order.
      search: False takes the inliers' range as it is.
    """
    plain = config.detection == "none" or config.largest_outlier == config.largest_inlier
    found = {}
    if not plain and config.detection == "static":
        found["channels"] = calibrate_channels(x, config)
    elif not plain:
        found["theta"] = calibrate_theta(x, config).astype(jnp.bfloat16)
    scale = _search(x, _any_bits(config), float(config.largest_inlier), found, search)
    calibration = Calibration(_floored(jnp.broadcast_to(scale, x.shape[1:2])), **found)
    if plain or _too_few(config, x.shape[2]):
        return calibration
    raised, shift, needs_byte = _reach(x, calibration, config)
    if bool(needs_byte):
        return replace(calibration, shift=shift)
    return replace(calibration, scale=raised)


def _floored(scale: Float32[Array, " L"]) -> Float32[Array, " L"]:
    """Steps raised to `QUIETEST` of their median, silent tokens left out of it; all as they are if all are silent."""
    heard = jnp.nanmedian(jnp.where(scale > MIN_SCALE, scale, jnp.nan))
    return jnp.maximum(scale, jnp.where(jnp.isnan(heard), 0.0, QUIETEST * heard))


def _too_few(config: OutlierConfig, channels: int) -> bool:
    """Whether none of so few values can lie sigma (ddof=1) standard deviations above their mean."""
    return channels - 1 <= config.sigma * channels**0.5


def _any_bits(config: OutlierConfig) -> OutlierConfig:
    """A config that differs from none in its bits: where these enter as numbers, one compilation serves all."""
    return replace(config, act_bits=8, outlier_bits=8)


@partial(jax.jit, static_argnames=("config", "search"))
def _search(x, config: OutlierConfig, largest_inlier, found, search: bool) -> Float32[Array, " L"]:
    x = x.astype(jnp.float32)
    if _too_few(config, x.shape[2]):
        x = x.reshape(-1, 1, x.shape[2])
    elif found:
        limit = found.get("theta", jnp.zeros(x.shape[1])).astype(jnp.float32)
        x = jnp.where(find_listed(x, limit, config, found.get("channels")), 0.0, x)
    return search_scale(x, largest_inlier, axes=(0, 2), fractions=FULL_RANGE_FRACTIONS if search else (1.0,))[0, :, 0]


@partial(jax.jit, static_argnames="config")
def _reach(x, calibration: Calibration, config: OutlierConfig):
    """(steps raised until outliers fit where that loses less than saturating, shifts, whether these are needed)."""
    x = x.astype(jnp.float32)
    limit = detection_limit(calibration.scale, config, calibration.theta)
    listed = find_listed(x, limit, config, calibration.channels)
    largest = jnp.max(jnp.where(listed, jnp.abs(x), 0.0), axis=(0, 2))
    reach = calibration.scale * float(config.largest_outlier)
    beyond = largest > reach

    def loss(**changed):
        error = jnp.abs(x - replace(calibration, **changed).fake(x, config))
        return jnp.sum(jnp.exp(SEARCH_NORM * jnp.log(error)), axis=(0, 2))

    fitting = jnp.where(beyond, largest / float(config.largest_outlier), calibration.scale)
    raised = loss(scale=fitting)
    scale = jnp.where(raised < loss(), fitting, calibration.scale)
    shift = jnp.where(beyond, jnp.clip(jnp.ceil(jnp.log2(largest / reach)), 0, LARGEST_SHIFT), 0).astype(jnp.int8)
    if config.outlier_bits == 16:
        return scale, shift, jnp.zeros((), bool)
    shifted = loss(shift=shift)
    return scale, shift, jnp.any(beyond & (jnp.minimum(raised, loss()) > WORTH_A_BYTE * shifted))


@partial(jax.jit, static_argnames="config")
def calibrate_theta(x: Float[Array, "B L C"], config: OutlierConfig) -> Float32[Array, " L"]:
    """Thresholds: mean over samples of mean + sigma * std (ddof=1) of |x|, channels listed before counted as zero."""
    B, L, C = x.shape
    n = window_length(L, config.n_refresh)
    magnitude = jnp.pad(jnp.abs(x.astype(jnp.float32)), ((0, 0), (0, -L % n), (0, 0))).reshape(B, -1, n, C)

    def token(listed, magnitude):
        free = jnp.where(listed, 0.0, magnitude)
        theta = jnp.mean(free, -1) + config.sigma * jnp.std(free, -1, ddof=min(1, C - 1))
        return listed | (free > theta[..., None]), theta

    nothing = jnp.zeros((B, magnitude.shape[1], C), bool)
    _, theta = lax.scan(token, nothing, jnp.moveaxis(magnitude, 2, 0))
    return jnp.mean(theta, axis=1).T.reshape(-1)[:L]


@partial(jax.jit, static_argnames="config")
def calibrate_channels(x: Float[Array, "B L C"], config: OutlierConfig) -> Bool[Array, " C"]:
    """Channels for detection="static": those of the largest magnitude over samples and tokens.

    `static_list` says which magnitude: the mean, the statistic of the published code's channel list, or the largest.
    There are as many channels as dynamic detection lists on average beyond theta: both detections have one budget and
    spend it differently.
    """
    x = x.astype(jnp.float32)
    dynamic = replace(config, detection="dynamic")
    listed = find_listed(x, calibrate_theta(x, dynamic), dynamic, None)
    budget = jnp.ceil(jnp.mean(jnp.sum(listed.astype(jnp.float32), axis=-1)))
    statistic = jnp.mean if config.static_list == "mean" else jnp.max
    rank = jnp.argsort(jnp.argsort(-statistic(jnp.abs(x), axis=(0, 1)), stable=True), stable=True)
    return rank.astype(jnp.float32) < budget
