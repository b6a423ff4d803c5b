"""OuroMamba as its authors' code does it, which is not what their paper says: outliers found by a threshold taken from
each token, in a grid of their own; step sizes with zero points.

Linear layers and the scan's delta, B, C, A and D are rounded, A and D like activations of one token; stem, head,
convolutions, gates and hidden states stay float, as published. Scales are static, one per token; what a token's
outliers need is found as it passes.

- A sample's result depends on its batch: one token anywhere that does not fit its scale lets the tokens at that place
  of every window, of every sample, extend their lists of outliers.
- One set of quantisers serves all directions of a scan, and calibration overwrites it: the last direction's scales
  round all of them.
- The published tuning of scales is left out. The code rounds inside a function whose backward pass returns no gradient
  for x_proj, dt_proj and the scan, and without straight-through roundings of activations, so nearly nothing learns.
- For VMamba and MambaVision nothing is published; they are treated as Vim is. Attention's own products stay float.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from ouromamba_jax.baselines.base import (
    BaselineConfig,
    add_bias,
    from_tokens,
    linear_sites,
    scan_sites,
    site_reports,
)
from ouromamba_jax.baselines.released_detection import DELTA_SIGMA, detect, inliers
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.models.layers import SelectiveScan, as_tokens
from ouromamba_jax.ops.qtensor import (
    MIN_SCALE,
    SEARCH_NORM,
    divide,
    max_level,
    quantize_with_scale,
    search_scale,
    search_weight_scale,
)
from ouromamba_jax.quantize.activation import Calibrated, Levels, check_tokens
from ouromamba_jax.quantize.config import QuantRule
from ouromamba_jax.quantize.report import QuantReport
from ouromamba_jax.quantize.stages import Fitted, Progress, StageInputs, quantize_stages

FRACTIONS = tuple(1 - i / 100 for i in range(1, 101))
"""Parts of the range that a search tries as the largest level: the whole of it is not among them."""


@dataclass(frozen=True)
class ReleasedConfig(BaselineConfig):
    """The published code's quantiser; outliers have 8 bits, beside inliers of 8 bits they stay float.

    The default `rules` are what the published code leaves in float.
    """

    rules: tuple[QuantRule, ...] = (QuantRule(r"^(stem|head)\.", skip=True),)


def quantize_released(
    model: VisionModel,
    images: Float[Array, "N H W I"],
    config: ReleasedConfig,
    *,
    progress: Progress | None = None,
) -> tuple[VisionModel, QuantReport]:
    """`model` quantised as the published code does it, and the account of it.

    Raises:
      ValueError: as `quantize_stages`.
    """

    def fit(stage: nnx.Module, inputs: StageInputs) -> Fitted:
        modules: dict[str, ReleasedLinear | ReleasedScan] = {}
        granularity = {}
        for path, linear in linear_sites(stage, inputs.configs).items():
            settings = inputs.configs[path]
            x = inputs.captured[path]["input"]
            modules[path] = ReleasedLinear(linear, x, settings.weight_bits, settings.act_bits)
            granularity[path] = "weight: output channel; input: token"
        for path, scan in scan_sites(stage, inputs.configs).items():
            modules[path] = ReleasedScan(scan, inputs.captured[path], inputs.configs[path].act_bits)
            granularity[path] = "delta, B, C: token; A, D: tensor"
        reports = []
        for report in site_reports(stage, dict(modules), inputs, granularity):
            module, bits = modules[report.path], bits_of_outliers(inputs.configs[report.path].act_bits)
            rate = module.outlier_rate(inputs.captured[report.path])
            reports.append(replace(report, outlier_bits=bits, outlier_rate=rate))
        return Fitted(dict(modules), tuple(reports))

    return quantize_stages(model, images, config.settings(), fit, progress=progress)


def bits_of_outliers(act_bits: int) -> int:
    """Bits of the outliers beside inliers of `act_bits`; 16 stands for floats."""
    return 16 if act_bits == 8 else 8


# --- symmetric: everything but delta


@partial(jax.jit, static_argnames="bits")
def search_scales(x: Float[Array, "B L C"], bits: int) -> Float32[Array, " L"]:
    """Scales of token positions that minimise the 2.4 norm of the error, out of 99 % .. 0 % of the inliers' range."""
    return search_scale(inliers(x), max_level(bits), axes=(0, 2), fractions=FRACTIONS)[0, :, 0]


@partial(jax.jit, static_argnames=("bits", "outlier_bits"))
def round_symmetric(
    x: Float[Array, "B L C"], scale: Float32[Array, " L"], bits: int, outlier_bits: int
) -> tuple[Float32[Array, "B L C"], Bool[Array, "B L C"]]:
    """(x after rounding, where its outliers are): inliers in steps of `scale`, outliers in steps of their token's own.

    Raises:
      ValueError: if x has another number of tokens than `scale`.
    """
    check_tokens(x, len(scale))
    x = x.astype(jnp.float32)
    limit = max_level(bits)
    listed = detect(x, scale, limit, span=lambda free: jnp.max(jnp.abs(free), axis=-1))
    rounded, outlier = _symmetric(x, scale[None, :, None], limit), jnp.where(listed, x, 0.0)
    if outlier_bits < 16:
        top = max_level(outlier_bits)
        largest = jnp.max(jnp.abs(outlier), axis=-1, keepdims=True)
        outlier = _symmetric(outlier, divide(jnp.maximum(largest, MIN_SCALE), top), top)
    return jnp.where(listed, outlier, rounded), listed


def _symmetric(x: Array, step: Array, limit: int) -> Array:
    return step * jnp.clip(jnp.round(divide(x, step)), -limit, limit)


# --- asymmetric: delta


@partial(jax.jit, static_argnames="bits")
def search_ranges(x: Float[Array, "B L C"], bits: int) -> tuple[Float32[Array, " L"], Float32[Array, " L"]]:
    """(scale, zero point) of token positions: both ends of the range shrink in 100 steps; the 2.4 norm decides.

    Levels run from 0 to 2^bits - 1. The best range is widened to hold 0; the zero point is not clipped.
    """
    x = x.astype(jnp.float32)
    limit = 2**bits - 1
    least, largest = jnp.min(x, axis=(0, 2)), jnp.max(x, axis=(0, 2))
    shares = jnp.asarray(np.arange(1, 101, dtype=np.float32) / np.float32(100))

    def step(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low = least * (1 - shares[i]) + largest * shares[i]
        high = least * shares[i] + largest * (1 - shares[i])
        scale, zero = _scale_and_zero(low, high, limit)
        error = jnp.abs(x - _asymmetric(x, scale[None, :, None], zero[None, :, None], limit))
        score = jnp.mean(jnp.exp(SEARCH_NORM * jnp.log(error)), axis=(0, 2))  # a power is slower; log(0) gives 0 again
        better = score < best[0]
        return jnp.where(better, score, best[0]), jnp.where(better, low, best[1]), jnp.where(better, high, best[2])

    _, low, high = lax.fori_loop(0, 100, step, (jnp.full(least.shape, jnp.inf), least, largest))
    return _scale_and_zero(jnp.minimum(low, 0), jnp.maximum(high, 0), limit)


@partial(jax.jit, static_argnames=("bits", "outlier_bits"))
def round_asymmetric(
    x: Float[Array, "B L C"], scale: Float32[Array, " L"], zero: Float32[Array, " L"], bits: int, outlier_bits: int
) -> tuple[Float32[Array, "B L C"], Bool[Array, "B L C"]]:
    """(x after rounding, where its outliers are): as `round_symmetric`, from 0 to 2^bits - 1 with zero points.

    Raises:
      ValueError: if x has another number of tokens than `scale`.
    """
    check_tokens(x, len(scale))
    x = x.astype(jnp.float32)
    limit = 2**bits - 1
    listed = detect(x, scale, limit, sigma=DELTA_SIGMA, span=lambda free: jnp.max(free, -1) - jnp.min(free, -1))
    rounded = _asymmetric(x, scale[None, :, None], zero[None, :, None], limit)
    outlier = jnp.where(listed, x, 0.0)
    if outlier_bits < 16:
        top = 2**outlier_bits - 1
        low, high = jnp.min(outlier, axis=-1, keepdims=True), jnp.max(outlier, axis=-1, keepdims=True)
        outlier = _asymmetric(outlier, *_scale_and_zero(low, high, top), top)
    return jnp.where(listed, outlier, rounded), listed


def _scale_and_zero(low: Array, high: Array, limit: int) -> tuple[Array, Array]:
    scale = jnp.maximum(divide(high - low, limit), MIN_SCALE)
    return scale, -jnp.round(divide(low, scale))


def _asymmetric(x: Array, scale: Array, zero: Array, limit: int) -> Array:
    return (jnp.clip(jnp.round(divide(x, scale)) + zero, 0, limit) - zero) * scale


# --- what stands in a model


class ReleasedLinear(nnx.Module):
    """A linear layer that multiplies rounded activations by rounded weights, in float.

    Args:
      linear: the float layer.
      x: (B, L, K), what entered it in calibration.
    """

    def __init__(self, linear: nnx.Linear, x: Float[Array, "B L K"], weight_bits: int, act_bits: int):
        kernel = linear.kernel[...].astype(jnp.float32)
        weight = quantize_with_scale(kernel, search_weight_scale(kernel, weight_bits), weight_bits)
        self.bits, self.dtype = (act_bits, bits_of_outliers(act_bits)), linear.dtype
        self.levels, self.weight_scale = Levels(weight.values, bits=weight_bits), Calibrated(weight.scale)
        self.act_scale = Calibrated(search_scales(x, act_bits))
        self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... O"]:
        rounded, _ = round_symmetric(as_tokens(x), self.act_scale[...], *self.bits)
        kernel = self.levels[...].astype(jnp.float32) * self.weight_scale[...]
        return from_tokens(add_bias(rounded @ kernel, self.bias), x, self.dtype)

    def outlier_rate(self, seen: dict[str, Array]) -> float:
        """Share of outliers among the activations of calibration."""
        _, listed = round_symmetric(seen["input"], self.act_scale[...], *self.bits)
        return float(jnp.mean(listed))


class ReleasedScan(SelectiveScan):
    """A selective scan on rounded delta, B, C, A and D. Delta is rounded with its bias on, before softplus.

    Args:
      scan: the float scan.
      seen: what entered it in calibration, delta (B, L, G, E) and B, C (B, L, G, N).
    """

    def __init__(self, scan: SelectiveScan, seen: dict[str, Array], bits: int):
        self.bits = bits, bits_of_outliers(bits)
        self.directions, self.dtype, self.dt_bias = scan.directions, scan.dtype, scan.dt_bias
        delta = seen["delta"] + scan.delta_bias(seen["delta"])
        scale, zero = search_ranges(inliers(delta[:, :, -1], DELTA_SIGMA), bits)
        self.delta_scale, self.delta_zero = Calibrated(scale), Calibrated(zero)
        self.B_scale, self.C_scale = (Calibrated(search_scales(seen[name][:, :, -1], bits)) for name in "BC")
        self.A = Calibrated(self._as_one_token(scan.decay_rates()))
        self.D: Any = Calibrated(self._as_one_token(scan.D[...].astype(jnp.float32)))

    def _as_one_token(self, parameter: Float32[Array, "*D"]) -> Float32[Array, "*D"]:
        """A or D of every direction, rounded like an activation of one token."""
        tokens = parameter.reshape(self.directions, 1, 1, -1)
        scale = search_scales(tokens[-1], self.bits[0])
        return jax.vmap(lambda x: round_symmetric(x, scale, *self.bits)[0])(tokens).reshape(parameter.shape)

    def rounded(self, delta: Array, B: Array, C: Array) -> tuple[tuple[Array, Array], ...]:
        """(values, outliers) of delta, which still needs its bias, of B and of C; every direction by itself."""

        def of_directions(rounding: Callable[..., tuple[Array, Array]], x: Array, *found: Calibrated):
            scales = [scale[...] for scale in found]
            values, listed = jax.vmap(lambda x: rounding(x, *scales, *self.bits), in_axes=2, out_axes=2)(x)
            return values.astype(x.dtype), listed

        bias = self.delta_bias(delta)
        steps, listed = of_directions(round_asymmetric, delta + bias, self.delta_scale, self.delta_zero)
        return (
            (steps - bias, listed),
            of_directions(round_symmetric, B, self.B_scale),
            of_directions(round_symmetric, C, self.C_scale),
        )

    def decay_rates(self) -> Float[Array, "GE N"]:
        return self.A[...]

    def operands(self, u: Array, delta: Array, B: Array, C: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
        (delta, _), (B, _), (C, _) = self.rounded(delta, B, C)
        return super().operands(u, delta, B, C)

    def outlier_rate(self, seen: dict[str, Array]) -> float:
        """Share of outliers among delta, B and C of calibration."""
        listed = [mask for _, mask in self.rounded(seen["delta"], seen["B"], seen["C"])]
        return float(sum(jnp.sum(mask) for mask in listed) / sum(mask.size for mask in listed))
