"""Algorithm 2 of OuroMamba: inliers on a static grid, outlier channels found while the tokens pass.

Tokens are walked in windows of `n_refresh`. A window starts with an empty list of outlier channels; a token that does
not fit its static scale adds the channels above a threshold, and a listed channel stays listed until the window ends.
Windows and samples are independent, so the code walks the tokens of all windows together.

Every sum is an explicit pairwise tree and no product feeds a sum without a guard: the compiler can then neither
reorder nor contract them, and the result of a sample has the same bits in any batch and in any surrounding program.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int8

from ouromamba_jax.pallas.dispatch import Backend, choose
from ouromamba_jax.qtensor import FULL_RANGE_FRACTIONS, MIN_SCALE, divide, max_level, search_scale

Threshold = Literal["online", "offline"]
Detection = Literal["dynamic", "static", "none"]
OutlierScale = Literal["pow2", "free"]
Spec = Literal["paper", "released"]
StaticList = Literal["mean", "max"]

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class OutlierConfig:
    """How activations are split (see `split_outliers`).

    Attributes:
      act_bits: bits of inliers, 2..8.
      outlier_bits: bits of outliers, act_bits..8; 16 leaves outliers in the activation's own float type.
      n_refresh: tokens per window.
      sigma: standard deviations above the mean magnitude at which a channel is an outlier.
      threshold: "online" takes that statistic from the token itself, "offline" from calibration.
      detection: "dynamic" is Algorithm 2; "static" a fixed list of channels; "none" clips everything.
      static_list: statistic of the magnitude by which calibration picks the channels of detection="static".
      outlier_scale: "pow2" takes the inlier scale times a power of two, "free" the token's own maximum.
      spec: "released" reproduces the published code, whose trigger is shared by the whole batch.
    """

    act_bits: int = 4
    outlier_bits: int = 8
    n_refresh: int = 10
    sigma: float = 3.0
    threshold: Threshold = "online"
    detection: Detection = "dynamic"
    static_list: StaticList = "mean"
    outlier_scale: OutlierScale = "pow2"
    spec: Spec = "paper"

    def __post_init__(self):
        if not 2 <= self.act_bits <= 8:
            raise ValueError(f"act_bits must lie in 2..8, not {self.act_bits} (bits, not a number of levels)")
        if self.outlier_bits != 16 and not self.act_bits <= self.outlier_bits <= 8:
            raise ValueError(f"outlier_bits must be 16 or lie in act_bits..8, not {self.outlier_bits}")
        if self.n_refresh < 1:
            raise ValueError(f"n_refresh must be at least 1 token, not {self.n_refresh}")
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, not {self.sigma}")
        choices = (
            ("threshold", Threshold),
            ("detection", Detection),
            ("static_list", StaticList),
            ("outlier_scale", OutlierScale),
            ("spec", Spec),
        )
        for name, kind in choices:
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")
        published = (self.threshold, self.detection, self.outlier_scale) == ("online", "dynamic", "free")
        if self.spec == "released" and not published:
            raise ValueError(
                'spec="released" is what the published code does: it needs threshold="online", detection="dynamic" '
                'and outlier_scale="free"'
            )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inlier_q", "outlier_q", "outlier_scale", "mask", "inlier_scale"],
    meta_fields=["pow2"],
)
@dataclass(frozen=True)
class OutlierSplit:
    """An activation as inlier levels plus outliers; each is zero at the other's places.

    Attributes:
      inlier_q: int8 (B, L, C), levels within the inlier bits.
      outlier_q: int8 (B, L, C) levels, or with 16-bit outliers the float activations themselves.
      outlier_scale: float32 (B, L); 1 with 16-bit outliers; NaN for a token that holds a NaN or an infinity, so
        that its results are NaN, not a silent clip.
      mask: bool (B, L, C), true at outliers.
      inlier_scale: float32 (L,).
      pow2: outlier_scale is inlier_scale times 2^j, j >= 0 (a static fact, for the integer products).
    """

    inlier_q: Int8[Array, "B L C"]
    outlier_q: Array
    outlier_scale: Float32[Array, "B L"]
    mask: Bool[Array, "B L C"]
    inlier_scale: Float32[Array, " L"]
    pow2: bool


def _tree_sum(x: Float32[Array, "*rows C"]) -> Float32[Array, "*rows 1"]:
    """Sum over the last axis in a fixed order: halves are added until one column is left."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 64)])
    while (n := x.shape[-1]) > 1:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n % 2)])
        x = x[..., : (n + 1) // 2] + x[..., (n + 1) // 2 :]
        if n > 64 >= (n + 1) // 2:  # XLA would compute the wide halves twice, for two loops over the narrow ones
            x = lax.optimization_barrier(x)
    return x


def mean_and_std(magnitude: Float32[Array, "*rows C"]) -> tuple[Float32[Array, "*rows 1"], Float32[Array, "*rows 1"]]:
    """Mean and ddof=1 standard deviation over the last axis, with the same bits in every program."""
    count = magnitude.shape[-1]
    mean = divide(_tree_sum(magnitude), count)
    deviation = magnitude - mean
    # The minimum keeps the compiler from contracting square and sum into a fused multiply-add here but not there.
    square = jnp.minimum(deviation * deviation, _FLOAT32_MAX)
    return mean, jnp.sqrt(divide(_tree_sum(square), max(count - 1, 1)))


def _windows(x: Array, n_refresh: int, fill: float) -> Array:
    """(B, L, ...) -> (B, windows, n_refresh, ...), the last window padded with `fill`."""
    B, L = x.shape[:2]
    windows = -(-L // n_refresh)
    pad = [(0, 0), (0, windows * n_refresh - L)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad, constant_values=fill).reshape(B, windows, n_refresh, *x.shape[2:])


def walk_windows(
    x: Float32[Array, "B L C"], n_refresh: int, grow: Callable[[Array, Array, Array], tuple[Array, Array]], extra: Array
) -> tuple[Bool[Array, "B L C"], Array]:
    """Walk all windows token by token; `grow(x_t, listed, extra_t) -> (listed, per-row output)`.

    `extra` is (1, L, ...). Returns the lists (B, L, C) and the outputs (B, L).
    """
    B, L, C = x.shape
    n = min(n_refresh, L)
    windows = -(-L // n)
    starts = n * jnp.arange(windows, dtype=jnp.int32)
    count = jnp.int8 if n <= 127 else jnp.int32  # the narrower, the less memory crosses the caches

    def step(i, carry):
        unlisted, rows = carry
        tokens = jnp.minimum(starts + i, L - 1)  # past the end the last token comes again, for a list nobody reads
        x_t, extra_t = (values.at[:, tokens].get(mode="promise_in_bounds") for values in (x, extra))
        listed, row = grow(x_t, unlisted < i.astype(count), extra_t)
        return unlisted + (~listed).astype(count), lax.dynamic_update_index_in_dim(rows, row, i, 2)

    # A channel that is listed stays listed, so the number of its tokens before that holds a window's whole mask.
    start = jnp.zeros((B, windows, C), count), jnp.zeros((B, windows, n), jnp.float32)
    unlisted, rows = lax.fori_loop(jnp.int32(0), jnp.int32(n), step, start)
    mask = lax.broadcasted_iota(count, (B, windows, n, C), 2) >= unlisted[:, :, None]
    return mask.reshape(B, -1, C)[:, :L], rows.reshape(B, -1)[:, :L]


def _detect(x: Float32[Array, "B L C"], scale: Float32[Array, " L"], config: OutlierConfig, theta) -> Array:
    """The channel lists of Algorithm 2, as a mask (B, L, C)."""
    q = max_level(config.act_bits)
    online = config.threshold == "online"
    extra = jnp.stack([scale, scale if online else theta], axis=-1)[None]

    def grow(x_t, listed, extra_t):
        free = jnp.where(listed, 0.0, jnp.abs(x_t))
        overflows = divide(jnp.max(free, axis=-1, keepdims=True), q) > extra_t[..., :1]
        if config.spec == "released":
            overflows = jnp.any(overflows)[None, None, None]
        if online:
            mean, std = mean_and_std(free)
            reach, limit = free - mean, config.sigma * std
        else:
            reach, limit = free, extra_t[..., 1:]
        above = reach > limit if config.spec == "released" else reach >= limit
        return listed | (overflows & above), jnp.zeros(x_t.shape[:2], jnp.float32)

    return walk_windows(x, config.n_refresh, grow, extra)[0]


def _mask(x, scale, config, theta, channels) -> Bool[Array, "B L C"]:
    if config.detection == "none":
        return jnp.isnan(x)  # none; a constant would send XLA folding reductions over it for minutes
    if config.detection == "static":
        return jnp.broadcast_to(channels[None, None, :], x.shape)
    return _detect(x, scale, config, theta)


def _outlier_scale(x, scale, mask, config: OutlierConfig) -> Float32[Array, "B L"]:
    """Scale of each token's outliers; differentiable in x ("free") and scale ("pow2")."""
    finite = jnp.all(jnp.isfinite(x), axis=-1)  # not by the maximum: XLA's CPU backend may drop a NaN from one
    largest = jnp.max(jnp.where(mask, jnp.abs(x), 0.0), axis=-1)
    if config.outlier_bits == 16:
        own = jnp.ones(largest.shape, jnp.float32)
    elif config.outlier_scale == "free":
        own = divide(jnp.maximum(largest, MIN_SCALE), max_level(config.outlier_bits))
    else:
        ratio = jnp.where(finite, jnp.minimum(divide(largest, scale[None]), 2.0**126), 0.0)
        own = scale[None] * _power_that_fits(lax.stop_gradient(ratio), config.outlier_bits)
    return jnp.where(finite, own, jnp.nan)


def _power_that_fits(ratio: Float32[Array, "..."], bits: int) -> Float32[Array, "..."]:
    """Smallest 2^j, j >= 0, for which round(ratio / 2^j) fits `bits`; exact, since no logarithm is taken."""
    _, exponent = jnp.frexp(ratio)  # ratio in [2^(exponent-1), 2^exponent)
    shift = jnp.maximum(exponent - (bits - 1), 0)
    rounds_up = jnp.round(jnp.ldexp(ratio, -shift)) > max_level(bits)
    return jnp.ldexp(jnp.ones_like(ratio), shift + rounds_up.astype(shift.dtype))


def _check_arguments(x, scale, config: OutlierConfig, theta, channels) -> None:
    if x.ndim != 3 or scale.shape != (x.shape[1],):
        raise ValueError(
            f"x must be (B, L, C) and scale (L,), not {x.shape} and {scale.shape}: a quantised model is tied to the "
            "token count it was calibrated at"
        )
    if (
        config.detection == "dynamic"
        and config.threshold == "offline"
        and (theta is None or theta.shape != scale.shape)
    ):
        raise ValueError('threshold="offline" needs theta of shape (L,): pass the result of calibrate_theta')
    if config.detection == "static" and (channels is None or channels.shape != x.shape[2:]):
        raise ValueError('detection="static" needs channels of shape (C,): pass the result of calibrate_channels')


@partial(jax.jit, static_argnames=("config", "implementation"))
def split_outliers(
    x: Float[Array, "B L C"],
    scale: Float32[Array, " L"],
    config: OutlierConfig,
    *,
    theta: Float32[Array, " L"] | None = None,
    channels: Bool[Array, " C"] | None = None,
    implementation: str | None = None,
) -> OutlierSplit:
    """Algorithm 2: split an activation into inlier levels and outliers, each sample on its own.

    A token whose largest unlisted magnitude exceeds q * scale[t] adds to its window's list every unlisted channel
    that reaches the threshold: mean + sigma * std (ddof=1) over all channels, listed ones counted as zero ("online"),
    or theta[t] ("offline"). Inliers are rounded half to even onto scale[t] and clipped; outliers take

      "pow2"  scale[t] * 2^j with the smallest j >= 0 at which no level is clipped (at most 126, j = 0 without outliers)
      "free"  max|outlier| / q_O, at least 1e-8 / q_O, which a token without outliers gets

    Args:
      x: (B, L, C) float, tokens in their own scan order.
      scale: (L,) positive inlier scales, from `search_token_scales`.
      theta: (L,) thresholds for threshold="offline".
      channels: (C,) outlier channels for detection="static".
      implementation: a backend's name; None takes the first that supports the call.

    Raises:
      ValueError: shapes that do not agree, theta or channels missing where the config needs them, an unknown
        implementation, or a named one that does not support the call.
    """
    _check_arguments(x, scale, config, theta, channels)
    backend = choose("split", BACKENDS, implementation, x, config)
    return backend.run(x, scale, config, theta=theta, channels=channels)


def _xla(x, scale, config: OutlierConfig, *, theta, channels) -> OutlierSplit:
    x32 = x.astype(jnp.float32)
    mask = _mask(x32, scale, config, theta, channels)
    outlier_scale = _outlier_scale(x32, scale, mask, config)
    pow2 = config.outlier_bits != 16 and config.outlier_scale == "pow2"
    ratio = divide(x32, scale[None, :, None])
    if config.outlier_bits == 16:
        outlier_q = jnp.where(mask, x, jnp.zeros((), x.dtype))
    else:
        # A product with 2^-j has the quotient's bits, and costs less than a second division per entry.
        shrink = divide(jnp.broadcast_to(scale[None], outlier_scale.shape), outlier_scale)[:, :, None]
        outlier = ratio * shrink if pow2 else divide(x32, outlier_scale[:, :, None])
        outlier_q = jnp.where(mask, _levels(outlier, config.outlier_bits), 0.0).astype(jnp.int8)
    inlier_q = jnp.where(mask, 0.0, _levels(ratio, config.act_bits)).astype(jnp.int8)
    return OutlierSplit(inlier_q, outlier_q, outlier_scale, mask, scale, pow2)


def _kernel():
    from ouromamba_jax.pallas import outlier_split  # imports this module; Mosaic, which it needs, takes a while

    return outlier_split


# In order of preference: "xla" supports every call. "mosaic_gpu" compiles for GPUs but has not run on one yet: only its
# name chooses it.
BACKENDS: dict[str, Backend] = {
    "xla": Backend(lambda x, config: None, _xla),
    "mosaic_gpu": Backend(
        lambda *call: _kernel().supports(*call), lambda *call, **rest: _kernel().split(*call, **rest)
    ),
}


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _levels(ratio: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """Round half to even and clip to [-q, q]; straight-through derivative 1 where nothing is clipped, else 0."""
    q = max_level(bits)
    return jnp.clip(jnp.round(ratio), -q, q)


@_levels.defjvp
def _levels_jvp(bits, primals, tangents):
    (ratio,), (tangent,) = primals, tangents
    inside = jnp.abs(jnp.round(ratio)) <= max_level(bits)
    return _levels(ratio, bits), jnp.where(inside, tangent, jnp.zeros_like(tangent))


@jax.jit
def merge(split: OutlierSplit) -> Float32[Array, "B L C"]:
    """The activation that a split stands for, in float32."""
    outlier_scale = split.outlier_scale[:, :, None]
    # A NaN outlier scale marks a token with non-finite values: it spoils the whole token.
    scale = jnp.where(split.mask | jnp.isnan(outlier_scale), outlier_scale, split.inlier_scale[None, :, None])
    value = jnp.where(split.mask, split.outlier_q.astype(jnp.float32), split.inlier_q.astype(jnp.float32))
    return scale * value


@partial(jax.jit, static_argnames="config")
def fake_quant(
    x: Float[Array, "B L C"],
    scale: Float32[Array, " L"],
    config: OutlierConfig,
    *,
    theta: Float32[Array, " L"] | None = None,
    channels: Bool[Array, " C"] | None = None,
) -> Float32[Array, "B L C"]:
    """`merge(split_outliers(...))`, bit for bit, with straight-through gradients to x and to every scale.

    Inliers follow LSQ: d/dx is 1 where nothing is clipped, else 0; d/dscale is round(x/s) - x/s there, else +-q.
    Outliers: 1 to x; "pow2" reaches scale through scale * 2^j with j held, "free" reaches x through the maximum.
    Which entries are outliers, and j, are held fixed.
    """
    _check_arguments(x, scale, config, theta, channels)
    x32 = x.astype(jnp.float32)
    mask = _mask(lax.stop_gradient(x32), lax.stop_gradient(scale), config, theta, channels)
    outlier_scale = _outlier_scale(x32, scale, mask, config)[:, :, None]
    step = jnp.where(mask | jnp.isnan(outlier_scale), outlier_scale, scale[None, :, None])
    inlier = _levels(divide(x32, scale[None, :, None]), config.act_bits)
    outlier = x32 if config.outlier_bits == 16 else _levels(divide(x32, outlier_scale), config.outlier_bits)
    return step * jnp.where(mask, outlier, inlier)


def calibration_mask(x: Float32[Array, "B L C"], config: OutlierConfig, channels) -> Bool[Array, "B L C"]:
    """Outliers before any scale exists: magnitudes above mean + sigma*std over all channels, kept for the window."""
    if config.detection == "none":
        return jnp.zeros(x.shape, bool)
    if config.detection == "static":
        return jnp.broadcast_to(channels[None, None, :], x.shape)
    magnitude = jnp.abs(x)
    mean, std = mean_and_std(magnitude)
    above = _windows((magnitude - mean > config.sigma * std).astype(jnp.int8), config.n_refresh, 0)
    return (lax.cummax(above, axis=2) > 0).reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]


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
    """
    if config.detection == "static" and (channels is None or channels.shape != x.shape[2:]):
        raise ValueError('detection="static" needs channels of shape (C,): pass the result of calibrate_channels')
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

    def grow(x_t, listed, _):
        free = jnp.where(listed, 0.0, jnp.abs(x_t))
        mean, std = mean_and_std(free)
        # Compared as in `_detect`; the strict sign keeps an all-zero token from listing everything.
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


class OutlierStats(NamedTuple):
    """Share of entries that are outliers, and of tokens whose outliers need a larger step than the inliers."""

    rate: Float32[Array, ""]
    shifted_rows: Float32[Array, ""]


def outlier_statistics(split: OutlierSplit) -> OutlierStats:
    """Outlier rate and share of tokens with j > 0 ("pow2"; always 0 for 16-bit outliers, which have no step)."""
    integer = split.outlier_q.dtype == jnp.int8
    shifted = (split.outlier_scale > split.inlier_scale[None]) & jnp.any(split.mask, axis=-1)
    return OutlierStats(jnp.mean(split.mask), jnp.mean(shifted) if integer else jnp.zeros(()))
