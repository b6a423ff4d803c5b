"""The families' convolutions: shifted multiply-adds, or linear layers over patches, which can be quantised."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from ouromamba_jax.models.layers import LayerNorm, after, broadcast_last, uniform
from ouromamba_jax.models.unlisted import unlisted
from ouromamba_jax.ops.producers import conv_silu, conv_taps, depthwise_conv, patches3x3, silu_once


class DepthwiseConv1d(nnx.Module):
    """Depthwise convolution along the tokens, kernel (width, C): causal, or centred ("same")."""

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        causal: bool = True,
        use_bias: bool = True,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.width = width
        self.causal = causal
        self.dtype = dtype
        self.kernel = nnx.Param(uniform(1 / math.sqrt(width))(rngs.params(), (width, dim), param_dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        parameters, options = self.into()
        return depthwise_conv(x, *parameters, **options)

    @unlisted
    def into(self) -> tuple[tuple[Array, Array | None], dict[str, Any]]:
        """(arrays, options) of a producer that begins with this convolution."""
        bias = None if self.bias is None else self.bias[...]
        return (self.kernel[...], bias), {"causal": self.causal, "dtype": self.dtype}


def convolved(
    linear: Any, conv: Any, x: Float[Array, "B L D"], channels: int, *, reverse: bool = False
) -> tuple[Float[Array, "B L O"], Float[Array, "B L C"]]:
    """(linear(u), u), u = silu(conv(the first channels of x)); with `reverse`, of the tokens from last to first.

    A convolution that somebody put in the place of ours is just called.
    """
    if type(conv) is DepthwiseConv1d:
        parameters, options = conv.into()
        return after(linear, conv_silu, x, *parameters, reverse=reverse, keep=True, **options)
    x = x[..., :channels]
    u = silu_once(conv(jnp.flip(x, axis=1) if reverse else x))
    return linear(u), u


class DepthwiseConv2d(nnx.Module):
    """Depthwise 3x3 convolution of maps, zero padding, no bias; kernel (row, column, channel)."""

    def __init__(self, dim: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(uniform(1 / 3)(rngs.params(), (3, 3, dim), param_dtype))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        kernel = self.kernel[...].astype(self.dtype)
        # As in DepthwiseConv1d: shifted multiply-adds fuse, a grouped convolution does not.
        taps = zip(kernel.reshape(9, -1), conv_taps(x.astype(self.dtype), stride=1), strict=True)
        return functools.reduce(jnp.add, (shifted * broadcast_last(tap, shifted) for tap, shifted in taps))


class Conv3x3(nnx.Module):
    """3x3 convolution with zero padding: a linear layer over patches, so that it can be quantised.

    A BatchNorm that follows it in the published model is part of its weights.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stride: int = 1,
        use_bias: bool = True,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.stride = stride
        self.dtype = dtype
        self.proj = nnx.Linear(9 * inputs, outputs, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"], **options: Any) -> Float[Array, "B h w O"]:
        """Of x; `options` of `after` and of `patches3x3`."""
        return after(self.proj, patches3x3, x, stride=self.stride, dtype=self.dtype, **options)


class HalvingConv(nnx.Module):
    """3x3 convolution of stride 2, zero padding, and LayerNorm: maps of half the size, rounded up.

    The convolution is a linear layer over patches flattened as (row, column, channel), so that it can be quantised.
    """

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        init = uniform((9 * inputs) ** -0.5)
        self.proj = nnx.Linear(9 * inputs, outputs, kernel_init=init, bias_init=init, rngs=rngs, **types)
        self.norm = LayerNorm(outputs, **types)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
        return self.norm(after(self.proj, patches3x3, x, stride=2, dtype=self.dtype))


def extract_patches(
    images: Float[Array, "B H W I"], size: int, stride: int
) -> tuple[Float[Array, "B M P"], tuple[int, int]]:
    """Row-major patches, each flattened as (row, column, channel), and the (height, width) of their grid."""
    batch, height, width, channels = images.shape
    height = (height - size) // stride + 1
    width = (width - size) // stride + 1
    if size == stride:
        cropped = images[:, : height * size, : width * size]
        grid = cropped.reshape(batch, height, size, width, size, channels).swapaxes(2, 3)
    else:
        rows = jnp.arange(height)[:, None] * stride + jnp.arange(size)[None]
        columns = jnp.arange(width)[:, None] * stride + jnp.arange(size)[None]
        grid = images[:, rows[:, None, :, None], columns[None, :, None, :]]  # (B, height, width, size, size, I)
    return grid.reshape(batch, height * width, size * size * channels), (height, width)
