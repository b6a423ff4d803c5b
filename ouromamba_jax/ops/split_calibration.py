"""What Algorithm 2 takes from calibration: steps and thresholds of every token, fixed lists of channels."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Float32, Int8

from ouromamba_jax.ops.passes import Ask, Asking, gather
from ouromamba_jax.ops.qtensor import FULL_RANGE_FRACTIONS, MIN_SCALE, SEARCH_NORM, divide
from ouromamba_jax.ops.split import (
    LARGEST_SHIFT,
    OutlierConfig,
    Split,
    StaticList,
    detection_limit,
    fake_quant,
    find_listed,
    split_outliers,
    window_length,
)

WORTH_A_BYTE = 2.0
"""By how much the loss of a token must shrink for a second product: a huge outlier would take all levels of inliers."""

NOT_FINITE = "its calibration activations hold NaN or infinity; check the images and the float model."
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
    """Steps, thresholds and lists from calibration samples: `calibrating`, all of them in one batch.

    Args:
      x: (B, L, C), tokens in scan order.
      search: False takes the inliers' range as it is.

    Raises:
      ValueError: if x holds a NaN or an infinity.
    """
    return gather(calibrating(config, search=search), lambda: [x])


def calibrating(
    config: OutlierConfig, *, search: bool = True, of: Callable[[Any], Array] = lambda batch: batch
) -> Asking[Calibration]:
    """Steps, thresholds and lists from batches of calibration samples, (B, L, C) each, in at most six passes.

    theta is the mean over samples of mean + sigma * std (ddof=1) of a token's magnitudes, listed channels counted as
    zero. The step is searched (100 candidates, 2.4 norm over samples and channels) with what exceeds theta set to zero.
    Where outliers have no more levels than inliers, nothing is set apart and the search sees every entry.
    Where an outlier exceeds Q * S, S is raised until it fits, if that loses less than saturating it. If at some token
    the better of the two loses more than twice what outliers in multiples of 2^j would, the activation gets a second
    byte.

    No step is below an eighth of the median of those of tokens that are not all zeros: a token that calibration hardly
    excites, such as one in the black bars of a film, would else have no levels for what it meets later.

    Activations of so few channels that none can lie sigma deviations above their mean have one step for all tokens: a
    step per token from so few values would not cover samples that calibration has not seen.

    With detection="static", the channels are those of the largest magnitude over samples and tokens; `static_list` says
    which magnitude: the mean, the statistic of the published code's channel list, or the largest. There are as many as
    dynamic detection lists on average beyond theta: both detections have one budget and spend it differently.

    Args:
      search: as in `calibrate`.
      of: finds the activation in a batch.
    """

    def ask(function: Callable[..., Any], *args: Any, join: Any = jnp.add) -> Ask:
        return Ask(lambda batch: function(of(batch), *args), join)

    equal = config.largest_outlier == config.largest_inlier
    plain = config.detection == "none" or (equal and config.detection == "dynamic")
    dynamic = replace(config, detection="dynamic")
    first = yield {
        "finite": ask(lambda x: jnp.isfinite(x).all(), join=jnp.logical_and),
        "samples": ask(len),
        "channels": ask(lambda x: x.shape[2], join=jnp.maximum),
        "theta": {} if plain else ask(theta_sum, _any_bits(dynamic)),
    }
    if not bool(first["finite"]):
        raise ValueError(NOT_FINITE)
    found: dict[str, Array] = {}
    if not plain:
        theta = first["theta"] / jnp.float32(first["samples"])
        if config.detection == "dynamic":
            found["theta"] = theta.astype(jnp.bfloat16)
        else:
            magnitudes, listed = yield (
                ask(_magnitudes, config.static_list, join=jnp.add if config.static_list == "mean" else jnp.maximum),
                ask(_count_listed, theta, _any_bits(dynamic)),
            )
            budget = jnp.ceil(listed / jnp.float32(first["samples"] * len(theta)))
            rank = jnp.argsort(jnp.argsort(-magnitudes, stable=True), stable=True)
            found["channels"] = rank.astype(jnp.float32) < budget
    few = _too_few(config, int(first["channels"]))
    apart = {} if few else found  # what the search does not see
    largest = yield ask(_largest, _any_bits(config), apart, join=jnp.maximum)
    if few:
        largest = jnp.full_like(largest, largest.max())
    table = None
    if search:
        table = yield ask(_losses, _any_bits(config), apart, largest, float(config.largest_inlier))
    scale = _step(largest, float(config.largest_inlier), table, few)
    calibration = Calibration(_floored(scale), **found)
    if plain or few:
        return calibration
    reached = yield ask(_largest_listed, calibration, config, join=jnp.maximum)
    fitting, shift, beyond = _fitting(calibration.scale, reached, float(config.largest_outlier))
    if not bool(beyond.any()):
        return calibration
    wide = config.outlier_bits == 16
    raised = replace(calibration, scale=fitting)
    shifted = () if wide else (replace(calibration, shift=shift),)
    saturating, raising, *shifting = yield tuple(ask(_loss, c, config) for c in (calibration, raised, *shifted))
    if shifting and bool(jnp.any(beyond & (jnp.minimum(saturating, raising) > WORTH_A_BYTE * shifting[0]))):
        return shifted[0]
    return replace(calibration, scale=jnp.where(raising < saturating, fitting, calibration.scale))


def _floored(scale: Float32[Array, " L"]) -> Float32[Array, " L"]:
    """Steps raised to `QUIETEST` of their median, silent tokens left out of it; all as they are if all are silent."""
    heard = jnp.nanmedian(jnp.where(scale > MIN_SCALE, scale, jnp.nan))
    return jnp.maximum(scale, jnp.where(jnp.isnan(heard), 0.0, QUIETEST * heard))


def quiet_tokens(scale: Float32[Array, " L"]) -> Bool[Array, " L"]:
    """Tokens whose step `calibrate` raised to the smallest that it allows, or would have; those that are all zeros."""
    others = scale[scale > scale.min()]
    smallest = (1 + 1e-6) * QUIETEST * jnp.median(others) if others.size else 0.0
    return scale <= jnp.maximum(smallest, MIN_SCALE)


def _too_few(config: OutlierConfig, channels: int) -> bool:
    """Whether none of so few values can lie sigma (ddof=1) standard deviations above their mean."""
    return channels - 1 <= config.sigma * channels**0.5


def _any_bits(config: OutlierConfig) -> OutlierConfig:
    """A config that differs from none in its bits: where these enter as numbers, one compilation serves all."""
    return replace(config, act_bits=8, outlier_bits=8)


def _inliers(x: Float[Array, "B L C"], config: OutlierConfig, apart: dict[str, Array]) -> Float32[Array, "B L C"]:
    """x with zeros for what is set apart: entries that exceed "theta", or "channels"."""
    x = x.astype(jnp.float32)
    if not apart:
        return x
    limit = apart.get("theta", jnp.zeros(x.shape[1])).astype(jnp.float32)
    return jnp.where(find_listed(x, limit, config, apart.get("channels")), 0.0, x)


@partial(jax.jit, static_argnames="config")
def _largest(x: Float[Array, "B L C"], config: OutlierConfig, apart: dict[str, Array]) -> Float32[Array, " L"]:
    return jnp.max(jnp.abs(_inliers(x, config, apart)), axis=(0, 2))


@partial(jax.jit, static_argnames="config")
def _losses(
    x: Float[Array, "B L C"], config: OutlierConfig, apart: dict[str, Array], largest: Float32[Array, " L"], limit: Any
) -> Float32[Array, "candidates L"]:
    """What every candidate for the step loses. One pass over x each, never a broadcast over them."""
    x = _inliers(x, config, apart)

    def loss(step: Float32[Array, " L"]) -> Float32[Array, " L"]:
        step = step[None, :, None]
        return _summed(x - step * jnp.clip(jnp.round(divide(x, step)), -limit, limit))

    return lax.map(loss, _candidates(largest, limit))


def _candidates(largest: Float32[Array, " L"], limit: Any) -> Float32[Array, "candidates L"]:
    fractions = jnp.asarray(FULL_RANGE_FRACTIONS, jnp.float32)
    return jnp.maximum(divide(largest[None] * fractions[:, None], jnp.asarray(limit, jnp.float32)), MIN_SCALE)


@partial(jax.jit, static_argnames="few")
def _step(
    largest: Float32[Array, " L"], limit: Any, table: Float32[Array, "candidates L"] | None, few: bool
) -> Float32[Array, " L"]:
    """The first candidate of the smallest loss, one for all tokens if `few`; the last one where there are no losses."""
    candidates = _candidates(largest, limit)
    if table is None:
        return candidates[-1]
    table = jnp.broadcast_to(table.sum(axis=1, keepdims=True), table.shape) if few else table
    return jnp.take_along_axis(candidates, jnp.argmin(table, axis=0)[None], axis=0)[0]


@partial(jax.jit, static_argnames="config")
def _largest_listed(x: Float[Array, "B L C"], calibration: Calibration, config: OutlierConfig) -> Float32[Array, " L"]:
    x = x.astype(jnp.float32)
    limit = detection_limit(calibration.scale, config, calibration.theta)
    listed = find_listed(x, limit, config, calibration.channels)
    return jnp.max(jnp.where(listed, jnp.abs(x), 0.0), axis=(0, 2))


@jax.jit
def _fitting(
    scale: Float32[Array, " L"], largest: Float32[Array, " L"], largest_outlier: Any
) -> tuple[Float32[Array, " L"], Int8[Array, " L"], Bool[Array, " L"]]:
    """(steps at which outliers fit, shifts at which they do, tokens that need either)."""
    reach = scale * largest_outlier
    beyond = largest > reach
    fitting = jnp.where(beyond, largest / largest_outlier, scale)
    shift = jnp.where(beyond, jnp.clip(jnp.ceil(jnp.log2(largest / reach)), 0, LARGEST_SHIFT), 0).astype(jnp.int8)
    return fitting, shift, beyond


@partial(jax.jit, static_argnames="config")
def _loss(x: Float[Array, "B L C"], calibration: Calibration, config: OutlierConfig) -> Float32[Array, " L"]:
    x = x.astype(jnp.float32)
    return _summed(x - calibration.fake(x, config))


def _summed(error: Float32[Array, "B L C"]) -> Float32[Array, " L"]:
    """|error|^2.4, summed. exp and log are vectorised on CPU, a power is not; log(0) = -inf gives 0 again."""
    return jnp.sum(jnp.exp(SEARCH_NORM * jnp.log(jnp.abs(error))), axis=(0, 2))


@partial(jax.jit, static_argnames="config")
def theta_sum(x: Float[Array, "B L C"], config: OutlierConfig) -> Float32[Array, " L"]:
    """Sum over samples of mean + sigma * std (ddof=1) of |x|, channels listed before counted as zero."""
    B, L, C = x.shape
    n = window_length(L, config.n_refresh)
    magnitude = jnp.pad(jnp.abs(x.astype(jnp.float32)), ((0, 0), (0, -L % n), (0, 0))).reshape(B, -1, n, C)

    def token(listed, magnitude):
        free = jnp.where(listed, 0.0, magnitude)
        theta = jnp.mean(free, -1) + config.sigma * jnp.std(free, -1, ddof=min(1, C - 1))
        return listed | (free > theta[..., None]), theta

    nothing = jnp.zeros((B, magnitude.shape[1], C), bool)
    _, theta = lax.scan(token, nothing, jnp.moveaxis(magnitude, 2, 0))
    return jnp.sum(theta, axis=1).T.reshape(-1)[:L]


@partial(jax.jit, static_argnames="static_list")
def _magnitudes(x: Float[Array, "B L C"], static_list: StaticList) -> Float32[Array, " C"]:
    return (jnp.sum if static_list == "mean" else jnp.max)(jnp.abs(x.astype(jnp.float32)), axis=(0, 1))


@partial(jax.jit, static_argnames="config")
def _count_listed(x: Float[Array, "B L C"], theta: Float32[Array, " L"], config: OutlierConfig) -> Float32[Array, ""]:
    return jnp.sum(find_listed(x.astype(jnp.float32), theta, config, None), dtype=jnp.float32)
