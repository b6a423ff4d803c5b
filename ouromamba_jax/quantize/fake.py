"""Trainable stand-ins for quantised sites: the same roundings in float, with straight-through gradients to every scale.

Scales are a plain pytree, {site: {name: array}}: "act" (L,) and "weight" (groups, O) of a linear layer; (G, L) per
operand of a scan, (G, N) for A, (G, 1) for D and (G, L) for the states h; "act" (L,) of a marked tensor.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.models.layers import SelectiveScan, as_tokens
from ouromamba_jax.outlier_types import OutlierConfig
from ouromamba_jax.outliers import fake_quant
from ouromamba_jax.qtensor import FULL_RANGE_FRACTIONS, QTensor, max_level, search_scale
from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.modules import (
    RoundedOperands,
    SiteSpec,
    iter_sites,
    round_states,
    set_module,
    straight_through_round,
)
from ouromamba_jax.released import quantize_asymmetric

Scales = dict[str, dict[str, Array]]


class FakeLinear:
    """`QuantLinear` in float."""

    def __init__(self, linear: nnx.Linear, spec: SiteSpec, scales: dict[str, Array], fixed: dict[str, Any]):
        self.linear, self.spec, self.scales, self.fixed = linear, spec, scales, fixed

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... O"]:
        config = self.spec.config
        tokens = fake_quant(as_tokens(x), self.scales["act"], config, **self.fixed.get("act", {}))
        kernel = fake_weight(self.linear.kernel[...].astype(jnp.float32), self.scales["weight"], config)
        y = tokens.astype(jnp.float32) @ kernel
        if self.linear.bias is not None:
            y = y + self.linear.bias[...].astype(y.dtype)[None, None]
        return y.reshape(*x.shape[:-1], -1).astype(self.linear.dtype)


class FakeSelectiveScan(RoundedOperands):
    """`QuantSelectiveScan` in float."""

    def __init__(self, scan: SelectiveScan, spec: SiteSpec, scales: dict[str, Array], fixed: dict[str, Any]):
        self.spec, self.scales, self.fixed = spec, scales, fixed
        self.directions, self.A_log, self.D, self.dt_bias = scan.directions, scan.A_log, scan.D, scan.dt_bias
        self.delta_bias = scan.delta_bias

    def _round(self, name: str, x: Float[Array, "B L G C"]) -> Array:
        if name not in self.scales:
            return x
        config, fixed = self.spec.operand_config(name), self.fixed.get(name, [{}] * self.directions)
        scales = self.scales[name]
        groups = [_fake_activation(x[:, :, g], scales[g], config, **fixed[g]) for g in range(self.directions)]
        return jnp.stack(groups, axis=2).astype(x.dtype)

    def parameter(self, name: str) -> Array | None:
        if name not in self.scales:
            return None
        return fake_parameter(scan_parameter(self, name), self.scales[name], self.spec.config)

    def state_transform(self, u: Array):
        return None if "h" not in self.scales else round_states(self.scales["h"], u.shape[3])


def _fake_activation(x: Array, scale: Array, config: OutlierConfig, *, zero: Array | None = None, **fixed: Any):
    if zero is not None:
        return quantize_asymmetric(x, scale, zero, config)[0]
    return fake_quant(x, scale, config, **fixed)


class FakePoint:
    """`QuantizedPoint` in float."""

    def __init__(self, point: Any, spec: SiteSpec, scales: dict[str, Array], fixed: dict[str, Any]):
        del point
        self.spec, self.scales, self.fixed = spec, scales, fixed

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        y = fake_quant(as_tokens(x), self.scales["act"], self.spec.config, **self.fixed.get("act", {}))
        return y.reshape(x.shape).astype(x.dtype)


def install_fakes(stage: nnx.Module, specs: dict[str, SiteSpec], scales: Scales, fixed: dict[str, Any]) -> nnx.Module:
    """Replaces the sites of a float stage by their stand-ins, in place. Only for use inside a traced function."""
    for path, site in list(iter_sites(stage)):
        if path in specs:
            kind: Any = next(fake for base, fake in _FAKES if isinstance(site, base))
            set_module(stage, path, kind(site, specs[path], scales[path], fixed.get(path, {})))
    return stage


def fake_weight(kernel: Float[Array, "K O"], scale: Float[Array, "g O"], config: QuantConfig) -> Float[Array, "K O"]:
    """Weight after symmetric rounding; gradients reach kernel and scale (Esser et al. 2020, LSQ)."""
    limit = max_level(config.weight_bits)
    s = jnp.repeat(scale, kernel.shape[0] // scale.shape[0], axis=0)
    return straight_through_round(jnp.clip(kernel / s, -limit, limit)) * s


def fake_parameter(x: Float[Array, "D N"], scale: Float[Array, "G N"], config: QuantConfig) -> Float[Array, "D N"]:
    """A or D after rounding, in float."""
    s = jnp.repeat(scale, x.shape[0] // scale.shape[0], axis=0)
    limit = _parameter_limits(jax.lax.stop_gradient(x), scale.shape[0], config)
    return straight_through_round(jnp.clip(x / s, -limit, limit)) * s


@partial(jax.jit, static_argnames="config")
def quantize_parameter(x: Float[Array, "D N"], scale: Float[Array, "G N"], config: QuantConfig) -> QTensor:
    """A or D as int8 levels: entries beyond the outlier threshold may use all eight bits, the others `act_bits`."""
    s = jnp.repeat(scale, x.shape[0] // scale.shape[0], axis=0)
    limit = _parameter_limits(x, scale.shape[0], config)
    levels = jnp.round(jnp.clip(x / s, -limit, limit)).astype(jnp.int8)
    return QTensor(levels, scale, bits=8, group=x.shape[0] // scale.shape[0])


@partial(jax.jit, static_argnames=("groups", "config"))
def search_parameter_scale(x: Float[Array, "D N"], groups: int, config: QuantConfig) -> Float[Array, "G N"]:
    """One scale per direction and state: A's columns grow with the state index, so they share no range."""
    grouped = x.reshape(groups, -1, x.shape[1])
    inliers = jnp.where(_parameter_outliers(grouped, config), 0.0, grouped)
    fractions = FULL_RANGE_FRACTIONS if config.scale_search == "norm" else (1.0,)
    return search_scale(inliers, max_level(config.act_bits), axes=(1,), fractions=fractions)[:, 0]


def _parameter_outliers(grouped: Float[Array, "G E N"], config: QuantConfig) -> Array:
    """Entries beyond mean + sigma * std of their direction and state."""
    if config.detection == "none":
        return jnp.zeros(grouped.shape, bool)
    magnitude = jnp.abs(grouped)
    spread = magnitude.std(axis=1, keepdims=True, ddof=1)
    return magnitude > magnitude.mean(axis=1, keepdims=True) + config.sigma * spread


def _parameter_limits(x: Float[Array, "D N"], groups: int, config: QuantConfig) -> Float[Array, "D N"]:
    grouped = x.reshape(groups, -1, x.shape[1])
    inlier_limit = float(max_level(config.act_bits))
    return jnp.where(_parameter_outliers(grouped, config), 127.0, inlier_limit).reshape(x.shape)


def scan_parameter(scan: Any, name: str) -> Float[Array, "D N"]:
    """A (D, N) or D (D, 1) of a float scan."""
    if name == "A":
        return -jnp.exp(scan.A_log[...].astype(jnp.float32))
    return scan.D[...].astype(jnp.float32)[:, None]


_FAKES = ((nnx.Linear, FakeLinear), (SelectiveScan, FakeSelectiveScan), (nnx.Module, FakePoint))
