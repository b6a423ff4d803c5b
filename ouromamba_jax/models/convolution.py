"""The families' convolutions: shifted multiply-adds, or linear layers over patches, which can be quantised."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from ouromamba_jax.models.layers import LayerNorm, broadcast_last, uniform
from ouromamba_jax.ops.cpu_barrier import cpu_barrier


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
        x = x.astype(self.dtype)
        left = self.width - 1 if self.causal else (self.width - 1) // 2
        length = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (left, self.width - 1 - left), (0, 0)))
        kernel = self.kernel[...].astype(self.dtype)
        # A few shifted multiply-adds fuse into one pass over x; a grouped convolution does not, on any backend.
        y = padded[:, :length] * kernel[0][None, None]
        for k in range(1, self.width):
            y = y + padded[:, k : k + length] * kernel[k][None, None]
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)[None, None]


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


def silu_once(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """SiLU of a convolution, for several readers: XLA's CPU backend would compute both anew for each of them."""
    return cpu_barrier(jax.nn.silu(cpu_barrier(x)))


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

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
        return self.proj(patches3x3(x.astype(self.dtype), self.stride))


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
        return self.norm(self.proj(patches3x3(x.astype(self.dtype), stride=2)))


def patches3x3(x: Float[Array, "B H W C"], stride: int) -> Float[Array, "B h w P"]:
    """P = 9 C entries of each 3x3 patch as (row, column, channel), with a border of zeros.

    They hold an entry of the map up to nine times, so a layer casts the map to its own dtype, not them.
    """
    return jnp.concatenate(conv_taps(x, stride=stride), axis=-1)


def conv_taps(x: Float[Array, "B H W C"], *, stride: int) -> list[Float[Array, "B h w C"]]:
    """The nine inputs of a 3x3 convolution, one border of zeros: at tap (i, j), in row-major order, map 3 * i + j."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]


def extract_patches(
    images: Float[Array, "B H W 3"], size: int, stride: int
) -> tuple[Float[Array, "B M P"], tuple[int, int]]:
    """Row-major patches, each flattened as (row, column, channel), and the (height, width) of their grid."""
    height = (images.shape[1] - size) // stride + 1
    width = (images.shape[2] - size) // stride + 1
    if size == stride:
        cropped = images[:, : height * size, : width * size]
        grid = cropped.reshape(images.shape[0], height, size, width, size, 3).swapaxes(2, 3)
    else:
        rows = jnp.arange(height)[:, None] * stride + jnp.arange(size)[None]
        columns = jnp.arange(width)[:, None] * stride + jnp.arange(size)[None]
        grid = images[:, rows[:, None, :, None], columns[None, :, None, :]]  # (B, height, width, size, size, 3)
    return grid.reshape(images.shape[0], height * width, size * size * 3), (height, width)
