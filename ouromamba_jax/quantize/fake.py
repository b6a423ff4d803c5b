"""Trainable stand-ins for quantised sites: the same roundings in float, with straight-through gradients to every scale.

Scales are a plain pytree, {site: {name: array}}: "act" (L,) and "weight" (groups, O) of a linear layer; (G, L) per
operand of a scan, (G, N) for A, (G, 1) for D and (G, L) for the states h; "act" (L,) of a marked tensor.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.models.layers import SelectiveScan, as_tokens
from ouromamba_jax.ops.released import quantize_asymmetric
from ouromamba_jax.ops.split import fake_quant
from ouromamba_jax.ops.split_types import OutlierConfig
from ouromamba_jax.quantize.modules import SiteSpec
from ouromamba_jax.quantize.rounding import fake_parameter, fake_weight, round_states, scan_parameter
from ouromamba_jax.quantize.scan import RoundedOperands
from ouromamba_jax.quantize.sites import iter_sites, set_module

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
        self.directions, self.D, self.dt_bias = scan.directions, scan.D, scan.dt_bias
        self.decay_rates, self.delta_bias = scan.decay_rates, scan.delta_bias

    def round_operand(self, name: str, x: Float[Array, "B L G C"]) -> Array:
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


_FAKES = ((nnx.Linear, FakeLinear), (SelectiveScan, FakeSelectiveScan), (nnx.Module, FakePoint))
