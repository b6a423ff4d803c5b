"""Rounding of weights, of the scan's parameters A and D, and of its states."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ouromamba_jax.ops.qtensor import FULL_RANGE_FRACTIONS, QTensor, max_level, search_scale
from ouromamba_jax.quantize.config import QuantConfig


@jax.custom_jvp
def straight_through_round(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds half to even; its derivative is taken as 1."""
    return jnp.round(x)


@straight_through_round.defjvp
def _straight_through_round_jvp(primals, tangents):
    return straight_through_round(*primals), tangents[0]


def round_states(scale: Float[Array, "G L"], channels: int) -> Callable[[Array, Array], Array]:
    """Rounds h (B, D, N) after step t to 8 bits, one scale per direction and time step; straight-through gradients."""
    per_channel = jnp.repeat(scale, channels, axis=0)  # (D, L)
    limit = float(max_level(8))

    def transform(h: Float[Array, "B D N"], t: Array) -> Array:
        s = jax.lax.dynamic_index_in_dim(per_channel, t, axis=1)[None]  # (1, D, 1)
        return s * jnp.clip(straight_through_round(h / s), -limit, limit)

    return transform


def fake_weight(kernel: Float[Array, "K O"], scale: Float[Array, "g O"], config: QuantConfig) -> Float[Array, "K O"]:
    """Weight after symmetric rounding; gradients reach kernel and scale (Esser et al. 2020, LSQ)."""
    return _fake(kernel, scale, max_level(config.weight_bits))


def scan_parameter(scan: Any, name: str) -> Float[Array, "D N"]:
    """A (D, N) or D (D, 1) of a float scan."""
    if name == "A":
        return scan.decay_rates()
    return scan.D[...].astype(jnp.float32)[:, None]


def fake_parameter(x: Float[Array, "D N"], scale: Float[Array, "G N"], config: QuantConfig) -> Float[Array, "D N"]:
    """A or D after rounding, in float."""
    return _fake(x, scale, _parameter_limits(jax.lax.stop_gradient(x), scale.shape[0], config))


def _fake(x: Float[Array, "rows N"], scale: Float[Array, "groups N"], limit: Any) -> Float[Array, "rows N"]:
    s = jnp.repeat(scale, x.shape[0] // scale.shape[0], axis=0)
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
    if config.splitting.detection == "none":
        return jnp.zeros(grouped.shape, bool)
    magnitude = jnp.abs(grouped)
    spread = magnitude.std(axis=1, keepdims=True, ddof=1)
    return magnitude > magnitude.mean(axis=1, keepdims=True) + config.sigma * spread


def _parameter_limits(x: Float[Array, "D N"], groups: int, config: QuantConfig) -> Float[Array, "D N"]:
    grouped = x.reshape(groups, -1, x.shape[1])
    outlier_limit, inlier_limit = float(max_level(8)), float(max_level(config.act_bits))
    return jnp.where(_parameter_outliers(grouped, config), outlier_limit, inlier_limit).reshape(x.shape)
