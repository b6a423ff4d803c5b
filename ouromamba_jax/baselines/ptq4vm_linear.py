"""PTQ4VM's linear layers: a smoothed weight, a scale and a zero point per token; in integers, and to learn with."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32

from ouromamba_jax.baselines.base import add_bias, from_tokens
from ouromamba_jax.baselines.released import search_ranges
from ouromamba_jax.models.layers import as_tokens
from ouromamba_jax.ops.qtensor import MIN_SCALE, QTensor, divide, max_level, quantize_with_scale, search_weight_scale
from ouromamba_jax.quantize.activation import Calibrated, Levels, check_tokens
from ouromamba_jax.quantize.rounding import straight_through_round

SMALLEST = {"weight": MIN_SCALE, "act": MIN_SCALE, "smooth": 1e-5}
"""What learning may shrink a parameter to."""

Params = dict[str, Array]
"""Of one linear layer: "weight" (1, O) and "act" (L,), the scales, and "smooth" (K,)."""


@jax.jit
def smoothing(x: Float[Array, "B L K"], kernel: Float[Array, "K O"], alpha: float) -> Float32[Array, " K"]:
    """max|x_k|^alpha / max|W_k|^(1 - alpha) of every input channel."""
    act = jnp.maximum(jnp.max(jnp.abs(x), axis=(0, 1)).astype(jnp.float32), 1e-3)
    weight = jnp.maximum(jnp.max(jnp.abs(kernel), axis=1), 1e-5)
    return jnp.maximum(act**alpha / weight ** (1 - alpha), SMALLEST["smooth"])


def find_parameters(
    x: Float[Array, "B L K"], kernel: Float[Array, "K O"], weight_bits: int, act_bits: int, alpha: float
) -> tuple[Params, Float32[Array, " L"]]:
    """(scales and smoothing factors, zero points) before learning.

    Both ends of every token's range are shrunk in 100 steps, for the smallest 2.4 norm of the error; the range then
    holds 0, and the zero point is a level.
    """
    smooth = smoothing(x, kernel, alpha)
    scale, zero = search_ranges(x / smooth[None, None], act_bits)
    weight = search_weight_scale(kernel * smooth[:, None], weight_bits)
    return {"weight": weight, "act": scale, "smooth": smooth}, jnp.clip(zero, 0, 2**act_bits - 1)


def centred_levels(x: Float[Array, "B L K"], params: Params, zero: Float[Array, " L"], bits: int) -> Array:
    """Levels minus zero points, as floats: round(clip(x / (s * smooth) + z, 0, 2^bits - 1) - z)."""
    step = params["act"][:, None] * params["smooth"][None]
    offset = zero[None, :, None]
    return straight_through_round(jnp.clip(divide(x, step[None]) + offset, 0.0, 2.0**bits - 1) - offset)


class FakeAsymmetricLinear:
    """`AsymmetricLinear` in float, with straight-through gradients to scales and smoothing factors."""

    def __init__(self, linear: nnx.Linear, params: Params, zero: Array, weight_bits: int, act_bits: int):
        self.linear, self.params, self.zero = linear, params, zero
        self.weight_bits, self.act_bits = weight_bits, act_bits

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... O"]:
        levels = centred_levels(as_tokens(x).astype(jnp.float32), self.params, self.zero, self.act_bits)
        limit, scale = max_level(self.weight_bits), self.params["weight"]
        kernel = self.linear.kernel[...].astype(jnp.float32) * self.params["smooth"][:, None]
        kernel = straight_through_round(jnp.clip(kernel / scale, -limit, limit)) * scale
        y = add_bias((levels * self.params["act"][None, :, None]) @ kernel, self.linear.bias)
        return from_tokens(y, x, self.linear.dtype)


class AsymmetricLinear(nnx.Module):
    """A linear layer in integers whose inputs have a zero point per token.

    Levels enter the int8 product minus 2^(bits - 1), so that eight bits fit; the exact correction, (2^(bits - 1) - z)
    times the sum of the weight's column, is added to the int32 accumulator.
    """

    def __init__(self, linear: nnx.Linear, params: Params, zero: Array, weight_bits: int, act_bits: int):
        self.act_bits = act_bits
        self.dtype = linear.dtype
        kernel = linear.kernel[...].astype(jnp.float32) * params["smooth"][:, None]
        self.levels = Levels(quantize_with_scale(kernel, params["weight"], weight_bits).values, bits=weight_bits)
        self.weight_scale = Calibrated(params["weight"])
        self.act_scale = Calibrated(params["act"])
        self.smooth = Calibrated(params["smooth"])
        self.zero = Calibrated(zero)
        self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])

    @property
    def weight(self) -> QTensor:
        """The smoothed weight."""
        return QTensor(self.levels[...], self.weight_scale[...], bits=self.levels.bits)

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... O"]:
        tokens = as_tokens(x).astype(jnp.float32)
        check_tokens(tokens, self.act_scale.shape[0])
        params = {"act": self.act_scale[...], "smooth": self.smooth[...]}
        centred, zero = centred_levels(tokens, params, self.zero[...], self.act_bits), self.zero[...]
        shift = 2.0 ** (self.act_bits - 1)
        signed = (centred + zero[None, :, None] - shift).astype(jnp.int8)
        weight = self.levels[...]
        contraction = (((2,), (0,)), ((), ()))
        products = lax.dot_general(signed, weight, contraction, preferred_element_type=jnp.int32)
        columns = jnp.sum(weight.astype(jnp.int32), axis=0)
        total = products + (shift - zero).astype(jnp.int32)[None, :, None] * columns[None, None]
        finite = jnp.all(jnp.isfinite(tokens), axis=-1, keepdims=True)  # no silent clip of what is not
        rows = jnp.where(finite, params["act"][None, :, None], jnp.nan)
        y = rows * total.astype(jnp.float32) * self.weight_scale[...][None]
        return from_tokens(add_bias(y, self.bias), x, self.dtype)
