"""What makes the activations that are split, as plain functions, and each with its split as one operation.

A GPU kernel makes both in one pass; elsewhere it is the function, in the model's type, then `split_outliers`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from ouromamba_jax.ops.cpu_barrier import cpu_barrier
from ouromamba_jax.ops.dispatch import Backend, choose
from ouromamba_jax.ops.split import OutlierConfig, Split, detection_limit, split_outliers
from ouromamba_jax.pallas import producers as kernel


def _last(vector: Float[Array, " C"], like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def rms_norm(
    x: Float[Array, "... C"], scale: Float[Array, " C"], *, eps: float, dtype: DTypeLike
) -> Float[Array, "... C"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (Zhang and Sennrich 2019)."""
    x = x.astype(jnp.float32)
    x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * _last(scale.astype(jnp.float32), x)).astype(dtype)


def layer_norm(
    x: Float[Array, "... C"], scale: Float[Array, " C"], bias: Float[Array, " C"], *, eps: float, dtype: DTypeLike
) -> Float[Array, "... C"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in float32 (Ba et al. 2016)."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * _last(scale.astype(jnp.float32), x) + _last(bias.astype(jnp.float32), x)).astype(dtype)


def gelu(x: Float[Array, "... C"], *, approximate: bool) -> Float[Array, "... C"]:
    """GELU, exact or by tanh."""
    return jax.nn.gelu(x, approximate=True) if approximate else _exact_gelu(x)


@jax.custom_jvp
def _exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.nn.gelu(x, approximate=False)


@_exact_gelu.defjvp
def _exact_gelu_jvp(primals, tangents):
    """Phi(x) + x phi(x): JAX 0.12.0 cannot differentiate erf inside `jax.shard_map`."""
    (x,), (tangent,) = primals, tangents
    slope = 0.5 * jax.lax.erfc(-x * math.sqrt(0.5)) + x * jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return _exact_gelu(x), slope * tangent


def conv_silu(
    x: Float[Array, "B L D"],
    taps: Float[Array, "width C"],
    bias: Float[Array, " C"] | None,
    *,
    start: int = 0,
    causal: bool = True,
    reverse: bool = False,
    dtype: DTypeLike,
) -> Float[Array, "B L C"]:
    """SiLU of `depthwise_conv` of channels start..start + C of x.

    With `reverse`, of the tokens from last to first, and so are the result's.
    """
    x = x[..., start : start + taps.shape[1]]
    x = jnp.flip(x, axis=1) if reverse else x
    return silu_once(depthwise_conv(x, taps, bias, causal=causal, dtype=dtype))


def silu_once(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """SiLU of a convolution, for several readers: XLA's CPU backend would compute both anew for each of them."""
    return cpu_barrier(jax.nn.silu(cpu_barrier(x)))


def depthwise_conv(
    x: Float[Array, "B L C"],
    taps: Float[Array, "width C"],
    bias: Float[Array, " C"] | None = None,
    *,
    causal: bool,
    dtype: DTypeLike,
) -> Float[Array, "B L C"]:
    """Every channel with taps of its own along the tokens, zeros around them: causal, or centred ("same")."""
    width, length = taps.shape[0], x.shape[1]
    left = width - 1 if causal else (width - 1) // 2
    padded = jnp.pad(x.astype(dtype), ((0, 0), (left, width - 1 - left), (0, 0)))
    taps = taps.astype(dtype)
    # A few shifted multiply-adds fuse into one pass over x; a grouped convolution does not, on any backend.
    y = padded[:, :length] * taps[0][None, None]
    for k in range(1, width):
        y = y + padded[:, k : k + length] * taps[k][None, None]
    return y if bias is None else y + bias.astype(dtype)[None, None]


def gated_mean(y: Float[Array, "B L 2 E"], z: Float[Array, "B L D"], *, start: int = 0) -> Float[Array, "B L E"]:
    """Mean of both directions, the second one's tokens from last to first, times silu of z's channels from `start`."""
    mean = (y[:, :, 0] + jnp.flip(y[:, :, 1], axis=1)) * 0.5
    return mean * jax.nn.silu(z[..., start : start + y.shape[3]])


def route(x: Float[Array, "B H W E"], *, transpose: bool, reverse: bool) -> Float[Array, "B L E"]:
    """The tokens of a map row by row or column by column, perhaps from the last one."""
    tokens = (x.swapaxes(1, 2) if transpose else x).reshape(x.shape[0], -1, x.shape[3])
    return jnp.flip(tokens, axis=1) if reverse else tokens


def summed_routes(y: Float[Array, "B L 4 E"], *, grid: tuple[int, int]) -> Float[Array, "B H W E"]:
    """The sum of four routes over a map of H x W tokens: by rows, by columns, and both reversed."""
    (batch, _, _, width), (rows, columns) = y.shape, grid
    y = y[:, :, :2] + jnp.flip(y[:, :, 2:], axis=1)
    by_column = y[:, :, 1].reshape(batch, columns, rows, width).swapaxes(1, 2)
    return y[:, :, 0].reshape(by_column.shape) + by_column


def merged_routes(
    y: Float[Array, "B L 4 E"],
    scale: Float[Array, " E"],
    bias: Float[Array, " E"],
    *,
    grid: tuple[int, int],
    eps: float,
    dtype: DTypeLike,
) -> Float[Array, "B H W E"]:
    """`layer_norm` of `summed_routes`."""
    return layer_norm(summed_routes(y, grid=grid), scale, bias, eps=eps, dtype=dtype)


def beside_conv_silu(
    y: Float[Array, "B L E"],
    z: Float[Array, "B L D"],
    taps: Float[Array, "width E"],
    bias: Float[Array, " E"] | None,
    **options: Any,
) -> Float[Array, "B L F"]:
    """y, and on its right `conv_silu` of z: F = 2 E."""
    return jnp.concatenate([y, conv_silu(z, taps, bias, **options)], axis=-1)


def patches3x3(
    x: Float[Array, "B H W C"], *, stride: int, dtype: DTypeLike, tanh_gelu: bool = False
) -> Float[Array, "B h w P"]:
    """P = 9 C entries of each 3x3 patch as (row, column, channel), with a border of zeros.

    They hold an entry of the map up to nine times, so the map is cast, not they; and before that goes through a GELU
    in its tanh form, if so told.
    """
    x = cpu_barrier(gelu(x, approximate=True)) if tanh_gelu else x
    return jnp.concatenate(conv_taps(x.astype(dtype), stride=stride), axis=-1)


def conv_taps(x: Float[Array, "B H W C"], *, stride: int) -> list[Float[Array, "B h w C"]]:
    """The nine inputs of a 3x3 convolution, one border of zeros: at tap (i, j), in row-major order, map 3 * i + j."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]


Producer = Callable[..., Array]


def split_after(
    producer: Producer,
    arrays: tuple[Array | None, ...],
    options: dict[str, Any],
    scale: Float[Array, " L"],
    config: OutlierConfig,
    *,
    keep: bool = False,
    implementation: str | None = None,
    **calibrated: Any,
) -> tuple[Split, Array | None]:
    """(split_outliers of producer(*arrays, **options), its axes between the first and the last as tokens; that itself).

    The split is for a product: it has no `first`, and its bytes may have more channels, which hold anything and which
    a product leaves out.

    Args:
      producer: a function of this module; others, too, if no backend is named.
      keep: whether the activation is wanted, too; None in its place if not.
      calibrated: theta, shift and channels, as `split_outliers` takes them.
    """
    call = producer, arrays, options, scale, config
    backend = choose("producer", BACKENDS, implementation, *call, keep=keep, **calibrated)
    return backend.run(*call, keep=keep, **calibrated)


def _xla(producer, arrays, options, scale, config, *, keep, **calibrated) -> tuple[Split, Array | None]:
    x = producer(*arrays, **options)
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    split = split_outliers(tokens, scale, config, **calibrated)
    return replace(split, first=None), x if keep else None


def _mosaic_gpu(producer, arrays, options, scale, config, *, keep, theta=None, shift=None, channels=None, **launch):
    shift = None if config.outlier_bits == 16 else shift
    limit = detection_limit(scale, config, theta)
    shape = jax.eval_shape(lambda *x: producer(*x, **options), *arrays)
    made = kernel.run(
        producer.__name__, arrays, options, scale, limit, config, shift=shift, keep=keep, like=shape, **launch
    )
    x = made.pop().reshape(shape.shape) if keep else None
    low, *high = made
    return Split(low, high[0] if high else None, scale, None, config.n_refresh), x


# In order of preference. "xla" is the reference and supports every call.
BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": Backend(kernel.supports, _mosaic_gpu),
    "xla": Backend(lambda *call, **options: None, _xla),
}
