"""Algorithm 2 of OuroMamba on one grid: outlier channels, found while the tokens pass, have more levels than inliers.

For x (B, L, C), q and Q the largest levels of inliers and outliers, limit[t] = max(theta[t], q * S[t]):

    for each window of n_refresh tokens of each sample:  listed = {}
      for t in the window, in order:
        listed = listed + {c : |x[t, c]| > limit[t]}
        v[t, c] = clip(round(x[t, c] / S[t]), -Q, Q)  for c in listed,  clip(round(x[t, c] / S[t]), -q, q)  otherwise

Every channel decides for itself and no sample sees another. theta comes from calibration (`split_calibration`).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32

from ouromamba_jax.fields import check_types
from ouromamba_jax.ops.cpu_barrier import cpu_barrier
from ouromamba_jax.ops.dispatch import Backend, choose
from ouromamba_jax.ops.meshes import by_samples
from ouromamba_jax.ops.qtensor import divide, max_level
from ouromamba_jax.ops.straight_through import straight_through
from ouromamba_jax.pallas import outlier_split as kernel

Detection = Literal["dynamic", "static", "none"]
StaticList = Literal["mean", "max"]

LARGEST_TWO_BYTES = 127 * 256 + 127
"""What `low + 256 * high` holds with both bytes within +-127."""
LARGEST_SHIFT = 8
"""Largest j at which 127 * 2^j fits two bytes."""


@dataclass(frozen=True)
class OutlierConfig:
    """How activations are split (see `split_outliers`).

    Attributes:
      act_bits: bits of inliers, 2..8.
      outlier_bits: bits of outliers, act_bits..8, or 16.
      n_refresh: tokens per window.
      sigma: standard deviations above the mean magnitude at which calibration sets the threshold theta.
      detection: "dynamic" is Algorithm 2; "static" a fixed list of channels; "none" has inliers only.
      static_list: statistic of the magnitude by which calibration picks the channels of detection="static".

    Examples:
      >>> import ouromamba_jax as om
      >>> config = om.OutlierConfig(act_bits=4, outlier_bits=8)
      >>> config.largest_inlier, config.largest_outlier
      (7, 127)
    """

    act_bits: int = 4
    outlier_bits: int = 8
    n_refresh: int = 10
    sigma: float = 3.7
    detection: Detection = "dynamic"
    static_list: StaticList = "mean"

    def __post_init__(self):
        check_types(self)
        if not 2 <= self.act_bits <= 8:
            raise ValueError(f"act_bits must lie in 2..8, not {self.act_bits} (bits, not a number of levels)")
        if self.outlier_bits != 16 and not self.act_bits <= self.outlier_bits <= 8:
            raise ValueError(f"outlier_bits must be 16 or lie in act_bits..8, not {self.outlier_bits}")
        if self.n_refresh < 1:
            raise ValueError(f"n_refresh must be at least 1 token, not {self.n_refresh}")
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, not {self.sigma}")

    @property
    def largest_inlier(self) -> int:
        """q, the largest level of an inlier."""
        return max_level(self.act_bits)

    @property
    def largest_outlier(self) -> int:
        """Q, the largest level of an outlier (before a second byte's shift)."""
        return LARGEST_TWO_BYTES if self.outlier_bits == 16 else max_level(self.outlier_bits)


@partial(jax.tree_util.register_dataclass, data_fields=["low", "high", "scale", "first"], meta_fields=["n_refresh"])
@dataclass(frozen=True)
class Split:
    """An activation (B, L, C) as integers: x is close to (low + 256 * high) * scale.

    Attributes:
      low: int8 (B, L, C), the levels, or their low bytes.
      high: int8 (B, L, C), the levels' high bytes; None where they fit one byte, a static fact of the site.
      scale: float32 (L,), the step S of every token.
      first: (B, windows, C), the token of each window, counted from 0, from which on a channel is listed as an outlier;
        the window's length where it never is. int8, or int32 where windows have more than 127 tokens. None where only
        a product reads the split (`producers.split_after`).
      n_refresh: tokens per window.

    Examples:
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> x = jnp.asarray([[[0.5, -1.5], [25.0, 0.5], [1.0, 1.0]]])  # three tokens of two channels
      >>> split = om.split_outliers(x, jnp.full(3, 0.5), om.OutlierConfig(), theta=jnp.full(3, 10.0))
      >>> bool((split.merge() == x).all())
      True
    """

    low: Int8[Array, "B L C"]
    high: Int8[Array, "B L C"] | None
    scale: Float32[Array, " L"]
    first: Int8[Array, "B windows C"] | None
    n_refresh: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, L, C)."""
        return self.low.shape

    def levels(self) -> Int32[Array, "B L C"]:
        """The levels v."""
        low = self.low.astype(jnp.int32)
        return low if self.high is None else low + 256 * self.high.astype(jnp.int32)

    def merge(self) -> Float32[Array, "B L C"]:
        """v * S, the activation that the split stands for."""
        return self.levels().astype(jnp.float32) * self.scale[None, :, None]

    def listed(self) -> Bool[Array, "B L C"]:
        """Which entries are treated as outliers.

        Raises:
          ValueError: if the split does not say it.
        """
        if self.first is None:
            raise ValueError("this split was made for a product and does not say what is listed; use split_outliers.")
        return _listed(self.first, self.shape[1], self.n_refresh)


def window_length(tokens: int, n_refresh: int) -> int:
    """Tokens per window, at most those that there are."""
    return min(n_refresh, tokens)


def _counter(window: int) -> Any:
    """The narrowest type that counts a window's tokens."""
    return jnp.int8 if window <= 127 else jnp.int32


@partial(jax.jit, static_argnames=("config", "implementation"))
def split_outliers(
    x: Float[Array, "B L C"],
    scale: Float32[Array, " L"],
    config: OutlierConfig,
    *,
    theta: Float[Array, " L"] | None = None,
    shift: Int8[Array, " L"] | None = None,
    channels: Bool[Array, " C"] | None = None,
    implementation: str | None = None,
) -> Split:
    """Algorithm 2 on one grid (see above): levels of an activation, each sample on its own.

    Levels are rounded half to even. NaN becomes level 0. Gradients reach `scale`, the levels held fixed, but not
    x: those of a quantised model do (see `models.pure`).

    Args:
      x: (B, L, C) float, tokens in their own scan order.
      scale: (L,) positive steps S.
      theta: (L,) thresholds; without them a channel is listed as soon as an entry does not fit the inliers' levels.
      shift: (L,) j in 0..8: outliers of 8 bits or fewer become multiples of 2^j, so that they reach further; their
        levels need two bytes. Ignored with outlier_bits=16, whose levels have two bytes anyway.
      channels: (C,) outlier channels, needed by detection="static".
      implementation: a backend's name; None takes the first that supports the call.

    Raises:
      ValueError: shapes that do not agree, channels missing where the config needs them, an unknown implementation, or
        a named one that does not support the call.

    Examples:
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> x = jnp.asarray([[[0.5, -1.5], [25.0, 0.5], [1.0, 1.0]]])  # three tokens of two channels
      >>> split = om.split_outliers(x, jnp.full(3, 0.5), om.OutlierConfig(), theta=jnp.full(3, 10.0))
      >>> split.levels()[0].tolist()
      [[1, -3], [50, 1], [2, 2]]
      >>> split.listed()[0].tolist()  # the first channel from its outlier on
      [[False, False], [True, False], [True, False]]
    """
    check_split(x, scale, config, theta, shift, channels)
    shift = None if config.outlier_bits == 16 else shift
    call = dict(theta=theta, shift=shift, channels=channels)
    run = choose("split", BACKENDS, implementation, x, config, **call).run
    split = by_samples(
        lambda x, scale, call: run(x, scale, config, **call), *lax.stop_gradient((x, scale, call)), shared=("scale",)
    )
    return replace(split, scale=scale)


def check_split(x, scale, config: OutlierConfig, theta, shift, channels) -> None:
    """Raises ValueError for arguments of `split_outliers` that do not agree."""
    if x.ndim != 3 or scale.shape != (x.shape[1],):
        raise ValueError(
            f"x must be (B, L, C) and scale (L,), not {x.shape} and {scale.shape}: a quantised model is tied to the "
            "token count it was calibrated at"
        )
    for name, value in (("theta", theta), ("shift", shift)):
        if value is not None and value.shape != scale.shape:
            raise ValueError(f"{name} must be of scale's shape {scale.shape}, not {value.shape}")
    if config.detection == "static" and (channels is None or channels.shape != x.shape[2:]):
        raise ValueError('detection="static" needs channels of shape (C,): pass Calibration.channels')


def detection_limit(
    scale: Float32[Array, " L"], config: OutlierConfig, theta: Float[Array, " L"] | None
) -> Float32[Array, " L"]:
    """max(theta, q * S): a magnitude above it lists its channel. Infinite where no entry is to be an outlier."""
    if config.detection == "none":
        return jnp.full_like(scale, jnp.inf)
    limit = scale * float(config.largest_inlier)
    return limit if theta is None else jnp.maximum(theta.astype(jnp.float32), limit)


def find_first(
    x: Float[Array, "B L C"], limit: Float32[Array, " L"], config: OutlierConfig, channels: Bool[Array, " C"] | None
) -> Int8[Array, "B windows C"]:
    """`Split.first`: the token of each window from which on a channel is listed."""
    B, L, C = x.shape
    n = window_length(L, config.n_refresh)
    whole = L // n
    if config.detection != "dynamic":
        listed = jnp.zeros((C,), bool) if channels is None or config.detection == "none" else channels
        first = jnp.where(listed, 0, n).astype(_counter(n))
        return jnp.broadcast_to(first, (B, -(-L // n), C))

    def earliest(x: Array, limit: Array) -> Array:
        """Of windows (B, windows, tokens, C): a minimum over the tokens, which needs no order to be walked in."""
        over = jnp.abs(x).astype(jnp.float32) > limit[None, :, :, None]
        token = lax.broadcasted_iota(_counter(n), x.shape, 2)
        return jnp.min(jnp.where(over, token, _counter(n)(n)), axis=2)

    first = earliest(x[:, : whole * n].reshape(B, whole, n, C), limit[: whole * n].reshape(whole, n))
    if whole * n == L:
        return first
    rest = earliest(x[:, None, whole * n :], limit[None, whole * n :])  # the ragged window apart: nothing is padded
    return jnp.concatenate([first, rest], axis=1)


def _listed(first: Int8[Array, "B windows C"], tokens: int, n_refresh: int) -> Bool[Array, "B L C"]:
    B, windows, C = first.shape
    n = window_length(tokens, n_refresh)
    listed = lax.broadcasted_iota(first.dtype, (B, windows, n, C), 2) >= first[:, :, None]
    return listed.reshape(B, windows * n, C)[:, :tokens]


def find_listed(
    x: Float[Array, "B L C"], limit: Float32[Array, " L"], config: OutlierConfig, channels: Bool[Array, " C"] | None
) -> Bool[Array, "B L C"]:
    """Which entries are outliers, given the limits (L,) that list a channel."""
    return _listed(find_first(x, limit, config, channels), x.shape[1], config.n_refresh)


def round_half_even(x: Float32[Array, "..."]) -> Int32[Array, "..."]:
    """Round half to even what lies within +-2^22; NaN becomes a multiple of 2^16.

    Beside 1.5 * 2^23 a float's last bits count ones. XLA's conversion guards against overflow, at twice the cost.
    """
    return lax.bitcast_convert_type(x + 1.5 * 2**23, jnp.int32) - 0x4B400000


def _xla(x, scale, config: OutlierConfig, *, theta, shift, channels) -> Split:
    q, Q = float(config.largest_inlier), float(config.largest_outlier)
    x = cpu_barrier(x)  # which is read twice: fused, what makes it would be computed twice
    first = find_first(x, detection_limit(scale, config, theta), config, channels)
    ratio = divide(x.astype(jnp.float32), scale[None, :, None])
    if q == Q and shift is None:  # what is listed is rounded like the rest
        return Split(round_half_even(_clip(ratio, q)).astype(jnp.int8), None, scale, first, config.n_refresh)
    listed = _listed(first, x.shape[1], config.n_refresh)
    bound = jnp.where(listed, jnp.float32(Q), jnp.float32(q))
    if config.outlier_bits != 16 and shift is None:
        return Split(round_half_even(_clip(ratio, bound)).astype(jnp.int8), None, scale, first, config.n_refresh)
    ratio = jnp.where(jnp.isnan(ratio), 0.0, ratio)
    if shift is None:
        levels = round_half_even(_clip(ratio, bound))
    else:
        unit = jnp.exp2(shift.astype(jnp.float32))[None, :, None]  # powers of two: exact
        ratio = jnp.where(listed, ratio / unit, ratio)
        j = jnp.where(listed, shift.astype(jnp.int32)[None, :, None], 0)
        levels = jnp.left_shift(round_half_even(_clip(ratio, bound)), j)
    high = jnp.right_shift(levels + 128, 8).astype(jnp.int8)
    return Split(levels.astype(jnp.int8), high, scale, first, config.n_refresh)  # int8 wraps to the low byte


def _clip(ratio: Float32[Array, "..."], bound: Any) -> Float32[Array, "..."]:
    return jnp.minimum(jnp.maximum(ratio, -bound), bound)


def _mosaic_gpu(x, scale, config: OutlierConfig, *, theta, shift, channels, **options) -> Split:
    limit = detection_limit(scale, config, theta)
    low, high, first = kernel.split(x, scale, limit, config, shift=shift, **options)
    return Split(low, high, scale, first, config.n_refresh)


# In order of preference. "xla" is the reference and supports every call.
BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": Backend(kernel.supports, _mosaic_gpu),
    "xla": Backend(lambda x, config, **call: None, _xla),
}


@jax.custom_jvp
def _levels(ratio: Float[Array, "..."], bound: Float[Array, "..."]) -> Float[Array, "..."]:
    """Round half to even, clip to [-bound, bound]; the derivative is taken as 1 where nothing is clipped, else as 0."""
    return jnp.clip(jnp.round(ratio), -bound, bound)


@_levels.defjvp
def _levels_jvp(primals, tangents):
    (ratio, bound), (tangent, _) = primals, tangents
    inside = jnp.abs(jnp.round(ratio)) <= bound
    return _levels(ratio, bound), jnp.where(inside, tangent, jnp.zeros_like(tangent))


@partial(jax.jit, static_argnames="config")
def fake_quant(
    x: Float[Array, "B L C"],
    scale: Float32[Array, " L"],
    config: OutlierConfig,
    *,
    theta: Float[Array, " L"] | None = None,
    shift: Int8[Array, " L"] | None = None,
    channels: Bool[Array, " C"] | None = None,
) -> Float32[Array, "B L C"]:
    """`split_outliers(...).merge()`, bit for bit, with straight-through gradients to x and to scale.

    As in LSQ (Esser et al. 2020): d/dx is 1 where nothing is clipped, else 0; d/dscale is round(x/s) - x/s there, else
    plus or minus the largest level. Which entries are outliers is held fixed.
    """
    check_split(x, scale, config, theta, shift, channels)
    x32 = x.astype(jnp.float32)
    limit = detection_limit(lax.stop_gradient(scale), config, theta)
    listed = find_listed(lax.stop_gradient(x), limit, config, channels)
    step = scale[None, :, None]
    if shift is not None and config.outlier_bits != 16:
        step = jnp.where(listed, step * jnp.exp2(shift.astype(jnp.float32))[None, :, None], step)
    bound = jnp.where(listed, jnp.float32(config.largest_outlier), jnp.float32(config.largest_inlier))
    return step * _levels(divide(x32, jnp.broadcast_to(step, x32.shape)), bound)


def rounded(
    x: Float[Array, "B L C"], scale: Float32[Array, " L"], config: OutlierConfig, **calibrated: Array | None
) -> Float32[Array, "B L C"]:
    """`split_outliers(...).merge()`, with the gradients of `fake_quant`."""

    def run(x: Array, scale: Array, calibrated: Any) -> Array:
        return split_outliers(x, scale, config, **calibrated).merge()

    def smooth(x: Array, scale: Array, calibrated: Any) -> Array:
        return fake_quant(x, scale, config, **calibrated)

    return straight_through(run, smooth)(x, scale, calibrated)
