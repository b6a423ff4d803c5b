"""Layers of kSQ-VMM: linear ones, convolutions and norms, with rounded weights and rounded outputs."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from ouromamba_jax.baselines.base import add_bias, from_tokens
from ouromamba_jax.baselines.ksq_grids import (
    WIDE,
    Axis,
    Grid,
    best_fraction,
    cosine,
    find_clusters,
    interval,
    levels_of,
    output_scale,
    round_to,
    search_output_scale,
)
from ouromamba_jax.models.layers import as_tokens
from ouromamba_jax.quantize.activation import Calibrated, Levels, check_tokens

ROUNDS = 3
"""How often a linear layer's scales are searched in turn: weights, then outputs."""


@dataclass(frozen=True)
class LinearGrids:
    """How a linear layer is rounded.

    Args:
      weight_bits: 2 to 8, one scale for the whole weight.
      act_bits: 2 to 8, of the output.
      axis: whether the output has one scale or one per cluster of channels or tokens.
      clusters: how many.
      search_weight: whether the weight's scale is searched; if not, it covers the range.
    """

    weight_bits: int
    act_bits: int
    axis: Axis = "tensor"
    clusters: int = 4
    search_weight: bool = True


class RoundedLinear(nnx.Module):
    """A linear layer with one scale for its weights and a rounded output. The product is of floats: see `ksq_vmm.py`.

    Args:
      linear: the float layer.
      weight_scale: (1, 1).
      out_scale: (1, 1), (1, O) or (L, 1).
      grids: with the bits of the two.
      entering: of the scan's u, if that is the input: silu's output is rounded once, for both of its readers.
    """

    def __init__(
        self,
        linear: nnx.Linear,
        weight_scale: Float[Array, "1 1"],
        out_scale: Float[Array, "l o"],
        grids: LinearGrids,
        entering: Grid | None,
    ):
        self.grids = grids
        self.dtype = linear.dtype
        kernel = linear.kernel[...].astype(jnp.float32)
        levels = levels_of(kernel, weight_scale, grids.weight_bits)
        self.levels = Levels(levels.astype(jnp.int8), bits=grids.weight_bits)
        self.weight_scale = Calibrated(weight_scale)
        self.out_scale = Calibrated(out_scale)
        self.in_scale = None if entering is None else Calibrated(entering.scale)
        self.in_bits = grids.act_bits if entering is None else entering.bits
        self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... O"]:
        tokens = as_tokens(x).astype(jnp.float32)
        if self.out_scale.shape[0] > 1:
            check_tokens(tokens, self.out_scale.shape[0])
        if self.in_scale is not None:
            tokens = round_to(tokens, self.in_scale[...], self.in_bits)
        y = add_bias(tokens @ (self.levels[...].astype(jnp.float32) * self.weight_scale[...]), self.bias)
        return from_tokens(round_to(y, self.out_scale[...], self.grids.act_bits), x, self.dtype)


def calibrate_linear(
    linear: nnx.Linear, x: Float[Array, "B L K"], grids: LinearGrids, entering: Grid | None
) -> RoundedLinear:
    """The quantised layer: scales by the cosine to the float output on x, weights and outputs in turn."""
    kernel = linear.kernel[...].astype(jnp.float32)
    bias = jnp.zeros(kernel.shape[1:]) if linear.bias is None else linear.bias[...].astype(jnp.float32)
    exact = as_tokens(x).astype(jnp.float32) @ kernel + bias[None, None]
    weight_scale = interval(jnp.max(jnp.abs(kernel)), grids.weight_bits)[None, None]
    member = find_clusters(exact, grids.axis, grids.clusters)
    found, pow2 = int(member.max()) + 1, grids.axis == "token"
    out_scale = interval(jnp.max(jnp.abs(exact)), grids.act_bits)[None, None]
    for _ in range(ROUNDS):
        if grids.search_weight:
            weight_scale = _search_weight(x, kernel, bias, exact, out_scale, grids)
        produced = _product(x, kernel, bias, weight_scale, grids.weight_bits)
        out_scale = search_output_scale(exact, produced, member, k=found, bits=grids.act_bits, pow2=pow2)
    return RoundedLinear(linear, weight_scale, out_scale, grids, entering)


@partial(jax.jit, static_argnames="bits")
def _product(x, kernel, bias, scale, bits) -> Float32[Array, "B L O"]:
    return x.astype(jnp.float32) @ (levels_of(kernel, scale, bits) * scale) + bias[None, None]


@partial(jax.jit, static_argnames="grids")
def _search_weight(x, kernel, bias, exact, out_scale, grids: LinearGrids) -> Float32[Array, "1 1"]:
    largest = interval(jnp.max(jnp.abs(kernel)), grids.weight_bits)[None, None]

    def similarity(fraction: Array) -> Array:
        produced = _product(x, kernel, bias, largest * fraction, grids.weight_bits)
        return jnp.mean(cosine(exact, round_to(produced, out_scale, grids.act_bits)))

    return largest * best_fraction(similarity)


class RoundedModule(nnx.Module):
    """A convolution along tokens or maps, or a norm, with rounded weights and output.

    A convolution's output has power-of-two clusters of channels, a norm's one scale. Weights: the range, 8 bits.
    """

    def __init__(self, inner: Any, output: Float[Array, "B L C"], *, k: int, bits: int):
        self.bits = bits
        self.inner = nnx.clone(inner)
        is_conv = hasattr(inner, "kernel")
        weight = self.inner.kernel if is_conv else self.inner.scale
        value = weight[...].astype(jnp.float32)
        scale = interval(jnp.max(jnp.abs(value)), WIDE)
        weight.set_value((levels_of(value, jnp.broadcast_to(scale, value.shape), WIDE) * scale).astype(weight.dtype))
        axis: Axis = "channel" if is_conv else "tensor"
        self.out_scale = Calibrated(output_scale(output, axis, k=k, bits=bits, pow2=True))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = self.inner(x)
        return round_to(as_tokens(y), self.out_scale[...], self.bits).reshape(y.shape).astype(y.dtype)
