"""Algorithm 2 of OuroMamba: inliers on a static grid, outlier channels found while the tokens pass.

Tokens are walked in windows of `n_refresh`. A window starts with an empty list of outlier channels; a token that does
not fit its static scale adds the channels above a threshold, and a listed channel stays listed until the window ends.
A sample's result has the same bits in any batch and in any surrounding program (see `token_windows`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32

from ouromamba_jax.ops.cpu_barrier import cpu_barrier
from ouromamba_jax.ops.dispatch import Backend, choose
from ouromamba_jax.ops.qtensor import MIN_SCALE, divide, max_level, power_of_two_ratio, power_of_two_shift
from ouromamba_jax.ops.split_detection import find_outliers
from ouromamba_jax.ops.split_types import (
    FRACTION_BITS,
    LARGEST_FIXED_POINT,
    Form,
    OutlierConfig,
    OutlierSplit,
    Planes,
)
from ouromamba_jax.pallas import outlier_split as kernel
from ouromamba_jax.pallas import packed_split
from ouromamba_jax.pallas.kernel_weight import pack_halves
from ouromamba_jax.pallas.packed_split import PackedSplit


def _outlier_scale(x, scale, mask, config: OutlierConfig) -> Float32[Array, "B L"]:
    """Scale of each token's outliers; differentiable in x ("free") and scale ("pow2")."""
    # Infinity stands for NaN too: XLA's CPU backend may drop a NaN from a maximum.
    magnitude = jnp.where(jnp.isfinite(x), jnp.where(mask, jnp.abs(x), 0.0), jnp.inf)
    largest = jnp.max(magnitude, axis=-1)
    finite = largest < jnp.inf
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


def _check_arguments(x, scale, config: OutlierConfig, theta) -> None:
    if x.ndim != 3 or scale.shape != (x.shape[1],):
        raise ValueError(
            f"x must be (B, L, C) and scale (L,), not {x.shape} and {scale.shape}: a quantised model is tied to the "
            "token count it was calibrated at"
        )
    if config.needs_theta and (theta is None or theta.shape != scale.shape):
        raise ValueError('threshold="offline" needs theta of shape (L,): pass the result of calibrate_theta')


@partial(jax.jit, static_argnames=("config", "with_mask", "implementation"))
def split_outliers(
    x: Float[Array, "B L C"],
    scale: Float32[Array, " L"],
    config: OutlierConfig,
    *,
    theta: Float32[Array, " L"] | None = None,
    channels: Bool[Array, " C"] | None = None,
    with_mask: bool = True,
    implementation: str | None = None,
) -> OutlierSplit:
    """Algorithm 2: split an activation into inlier levels and outliers, each sample on its own, without gradients.

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
      with_mask: whether to say where the outliers are, which no product asks: a fifth of what a GPU reads and writes.
      implementation: a backend's name; None takes the first that supports the call.

    Raises:
      ValueError: shapes that do not agree, theta or channels missing where the config needs them, an unknown
        implementation, or a named one that does not support the call.
    """
    return _run(x, scale, config, theta, channels, implementation, with_mask=with_mask)


@partial(jax.jit, static_argnames=("config", "packed", "implementation"))
def split_for_product(
    x: Float[Array, "B L C"],
    scale: Float32[Array, " L"],
    config: OutlierConfig,
    *,
    theta: Float32[Array, " L"] | None = None,
    channels: Bool[Array, " C"] | None = None,
    packed: bool = False,
    implementation: str | None = None,
) -> OutlierSplit | Planes | PackedSplit:
    """`for_product(split_outliers(...))`; arguments and errors as there.

    Args:
      packed: for the product on 4-bit tensor cores ("mosaic_gpu_int4" of `outlier_matmul`): inliers two to a byte, and
        lists of the outliers' channels.

    Raises:
      ValueError: packed, but inliers of more than 4 bits, or outliers on scales that are no powers of two apart.
    """
    if packed and (reason := packed_split.unsuitable(config)):
        raise ValueError(f"this activation cannot be packed: {reason}; leave packed=True out.")
    return _run(x, scale, config, theta, channels, implementation, form="packed" if packed else "planes")


@partial(jax.jit, static_argnames=("config", "implementation"))
def round_activation(
    x: Float[Array, "B L C"],
    scale: Float32[Array, " L"],
    config: OutlierConfig,
    *,
    theta: Float32[Array, " L"] | None = None,
    channels: Bool[Array, " C"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L C"]:
    """`merge(split_outliers(...))` in x's type, in one pass on a GPU; arguments and errors as there."""
    return _run(x, scale, config, theta, channels, implementation, form="floats")


def _run(x, scale, config: OutlierConfig, theta, channels, implementation: str | None, **form):
    _check_arguments(x, scale, config, theta)
    x, scale, theta = lax.stop_gradient((x, scale, theta))  # or it would depend on the backend whether there is one
    backend = choose("split", BACKENDS, implementation, x, config)
    return backend.run(x, scale, config, theta=theta, channels=channels, **form)


def for_product(split: OutlierSplit | Planes | PackedSplit) -> OutlierSplit | Planes | PackedSplit:
    """What integer products take: `Planes`, or a split with "free" scales, or a packed one, as it is."""
    if not isinstance(split, OutlierSplit):
        return split
    if split.has_float_outliers:
        return _fixed_point(split)
    if not split.pow2:
        return split
    return Planes(split.near, split.far, *_shift_and_row_scale(split), split.shape[-1])


def _shift_and_row_scale(split: OutlierSplit) -> tuple[Int32[Array, "B L"], Float32[Array, "B L"]]:
    outlier_scale, inlier_scale = split.outlier_scale, split.inlier_scale[None]
    row_scale = jnp.where(jnp.isfinite(outlier_scale), inlier_scale, outlier_scale)
    return power_of_two_shift(outlier_scale, inlier_scale), row_scale


def _packed(split: OutlierSplit, window: int) -> PackedSplit:
    """Of a split with its mask, of at most 4 bits and with pow2 scales."""
    B, L, C = split.shape
    width, windows = C + -C % packed_split.BLOCK, -(-L // window)

    def padded(x, tokens=L):
        return jnp.pad(x, [(0, 0), (0, tokens - L), (0, width - C)])

    inliers = pack_halves(padded(split.inlier_q).reshape(B * L, width), width).reshape(B, L, width // 2)
    mask, levels = (
        padded(x, windows * window).reshape(B, windows, window, width) for x in (split.known_mask, split.outlier_q)
    )
    tokens = jnp.sum(mask, axis=2)  # of a window that have the channel listed: the more, the earlier it was
    order = jnp.argsort(-tokens, axis=-1, stable=True)
    places = jnp.where(tokens > 0, jnp.argsort(order, axis=-1) + 1, 0).astype(jnp.int16)
    outliers = jnp.take_along_axis(levels, order[:, :, None], axis=-1).reshape(B, -1, width)[:, :L]
    counts = jnp.sum(split.known_mask, axis=-1, dtype=jnp.int32)
    return PackedSplit(inliers, outliers, places, counts, *_shift_and_row_scale(split), C, window)


def _fixed_point(split: OutlierSplit) -> Planes:
    """16-bit outliers, and the inliers beside them, as bytes."""
    S, far = split.inlier_scale[None, :, None], split.far.astype(jnp.float32)
    largest = jnp.frexp(jnp.maximum(_largest(far), _largest(split.near).astype(jnp.float32) * S))
    limit = jnp.frexp(S * (LARGEST_FIXED_POINT / 2**15))
    k = largest[1] - limit[1] - 15 + (largest[0] > limit[0]).astype(jnp.int32)  # largest <= 32639 S 2^k
    finite = jnp.isfinite(split.outlier_scale)[:, :, None]
    step = jnp.ldexp(jnp.broadcast_to(S, k.shape), jnp.maximum(k, -FRACTION_BITS))
    left, right = jnp.clip(-k, 0, FRACTION_BITS).astype(jnp.int16), jnp.clip(k, 0, 14).astype(jnp.int16)
    left, right, step, finite = lax.optimization_barrier((left, right, step, finite))  # not again for every entry
    half = jnp.right_shift(jnp.left_shift(jnp.ones_like(right), right), 1)
    inliers = jnp.right_shift(jnp.left_shift(split.near.astype(jnp.int16), left) + half, right)
    outliers = jnp.where(finite, jnp.round(divide(far, step)), 0.0).astype(jnp.int16)
    value = cpu_barrier(inliers + outliers)
    high, low = jnp.right_shift(value + 128, 8).astype(jnp.int8), value.astype(jnp.int8)  # which wraps to -128..127
    shift = jnp.full(step.shape[:2], 8, jnp.int32)
    return Planes(low, high, shift, jnp.where(finite, step, jnp.nan)[:, :, 0], split.shape[-1], fixed_point=True)


def _largest(x: Array) -> Array:
    """Largest magnitude over the last axis, kept as 1; two reductions take less time than writing |x| for one."""
    return jnp.maximum(jnp.max(x, axis=-1, keepdims=True), -jnp.min(x, axis=-1, keepdims=True))


def _xla(
    x, scale, config: OutlierConfig, *, theta, channels, with_mask=False, form: Form = "split"
) -> OutlierSplit | Planes | PackedSplit | Float[Array, "B L C"]:
    split = _split(x, scale, config, theta, channels, with_mask or form == "packed")
    if form == "packed":
        return _packed(split, min(config.n_refresh, x.shape[1]))
    if form == "planes":
        return for_product(split)
    return merge(split).astype(x.dtype) if form == "floats" else split


def _split(x, scale, config: OutlierConfig, theta, channels, with_mask) -> OutlierSplit:
    x32 = x.astype(jnp.float32)
    mask = find_outliers(x32, scale, config, theta, channels)
    outlier_scale = _outlier_scale(x32, scale, mask, config)
    ratio = divide(x32, scale[None, :, None])
    q = float(max_level(config.act_bits))
    given_mask = mask if with_mask else None
    if config.outlier_bits == 16:
        inlier_q = _round_to_int8(jnp.where(mask, 0.0, jnp.clip(ratio, -q, q)))
        outlier_q = jnp.where(mask, x, jnp.zeros((), x.dtype))
        return OutlierSplit.from_levels(inlier_q, outlier_q, outlier_scale, given_mask, scale, pow2=config.pow2)
    # A product with 2^-j has the quotient's bits, and costs less than a second division per entry.
    shrink = power_of_two_ratio(scale[None], outlier_scale)[:, :, None]
    ratio = jnp.where(mask, ratio * shrink if config.pow2 else divide(x32, outlier_scale[:, :, None]), ratio)
    limit = jnp.where(mask, float(max_level(config.outlier_bits)), q)
    levels = lax.optimization_barrier(_round_to_int8(jnp.clip(ratio, -limit, limit)))  # once, not for near and for far
    inlier_q, outlier_q = jnp.where(mask, 0, levels), jnp.where(mask, levels, 0)
    return OutlierSplit.from_levels(inlier_q, outlier_q, outlier_scale, given_mask, scale, pow2=config.pow2)


def _round_to_int8(ratio: Float32[Array, "..."]) -> Int8[Array, "..."]:
    """Round half to even what lies in -128..127; NaN becomes 0.

    Beside 1.5 * 2^23 a float's last bits count ones. XLA's conversion guards against overflow, at twice the cost.
    """
    return lax.bitcast_convert_type(ratio + 1.5 * 2**23, jnp.int32).astype(jnp.int8)


# In order of preference. "xla" is the reference and supports every call.
BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": Backend(kernel.supports, kernel.split),
    "xla": Backend(lambda x, config: None, _xla),
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
    # One of the two is zero at every entry, unless a NaN outlier scale spoils a token with non-finite values.
    inliers = split.near.astype(jnp.float32) * split.inlier_scale[None, :, None]
    return inliers + split.far.astype(jnp.float32) * split.outlier_scale[:, :, None]


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
    _check_arguments(x, scale, config, theta)
    x32 = x.astype(jnp.float32)
    mask = find_outliers(lax.stop_gradient(x32), lax.stop_gradient(scale), config, theta, channels)
    outlier_scale = _outlier_scale(x32, scale, mask, config)[:, :, None]
    step = jnp.where(mask | jnp.isnan(outlier_scale), outlier_scale, scale[None, :, None])
    inlier = _levels(divide(x32, scale[None, :, None]), config.act_bits)
    outlier = x32 if config.outlier_bits == 16 else _levels(divide(x32, outlier_scale), config.outlier_bits)
    return step * jnp.where(mask, outlier, inlier)


class OutlierStats(NamedTuple):
    """Share of entries that are outliers, and of tokens whose outliers need a larger step than the inliers."""

    rate: Float32[Array, ""]
    shifted_rows: Float32[Array, ""]


def outlier_statistics(split: OutlierSplit) -> OutlierStats:
    """Outlier rate and share of tokens with j > 0 ("pow2"; always 0 for 16-bit outliers, which have no step)."""
    shifted = (split.outlier_scale > split.inlier_scale[None]) & jnp.any(split.known_mask, axis=-1)
    return OutlierStats(jnp.mean(split.known_mask), jnp.zeros(()) if split.has_float_outliers else jnp.mean(shifted))
