"""Calibration: what every site sees, and the static scales that follow from it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ouromamba_jax.models.layers import SelectiveScan, as_tokens
from ouromamba_jax.ops.qtensor import MIN_SCALE, max_level, search_weight_scale
from ouromamba_jax.ops.released import search_ranges
from ouromamba_jax.ops.scan_types import ScanOutput
from ouromamba_jax.ops.split_calibration import calibrate_channels, calibrate_theta, search_token_scales
from ouromamba_jax.quantize.config import ACTIVATION_OPERANDS, PARAMETER_OPERANDS, QuantConfig
from ouromamba_jax.quantize.modules import SiteSpec, is_asymmetric
from ouromamba_jax.quantize.rounding import scan_parameter, search_parameter_scale
from ouromamba_jax.quantize.sites import iter_sites, set_module

Captured = dict[str, dict[str, Array]]
"""{site: {name: activation}}: "act" (B, L, C) of a linear layer or marked tensor, (B, L, G, C) per scan operand."""


class _Recorder:
    """Calls the site it stands for and keeps what went in."""

    def __init__(self, site: Any, seen: dict[str, Array], with_states: bool):
        self.site, self.seen, self.with_states = site, seen, with_states

    def __call__(self, *args: Array, **kwargs: Any) -> Any:
        if not isinstance(self.site, SelectiveScan):
            self.seen["act"] = as_tokens(args[0])
            return self.site(*args, **kwargs)
        self.seen.update(zip(("u", "delta", "B", "C"), args, strict=True))
        groups = self.site.directions

        def largest(h: Array) -> Array:  # (B, G): what a scale per direction and step must cover
            return jnp.max(jnp.abs(h.reshape(h.shape[0], groups, -1)), axis=-1)

        out: ScanOutput = self.site(*args, collect=largest if self.with_states else None)
        self.seen["y"] = out.y
        if self.with_states:
            self.seen["h"] = out.states
        return out


@partial(jax.jit, static_argnums=(0, 1))
def _capture_batch(graphdef: Any, sites: tuple[tuple[str, bool], ...], state: nnx.State, x: Array):
    stage = nnx.merge(graphdef, state)
    modules = dict(iter_sites(stage))
    captured: Captured = {path: {} for path, _ in sites}
    for path, with_states in sites:
        set_module(stage, path, _Recorder(modules[path], captured[path], with_states))
    return stage(x), captured


def capture(stage: nnx.Module, x: Array, configs: dict[str, QuantConfig], batch_size: int) -> tuple[Array, Captured]:
    """The stage's output on x (N, ...), and what entered every site of `configs`, in batches."""
    graphdef, state = nnx.split(stage)
    sites = tuple((path, "h" in config.operands) for path, config in configs.items())
    parts = [_capture_batch(graphdef, sites, state, x[i : i + batch_size]) for i in range(0, len(x), batch_size)]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def find_scales(
    site: Any, seen: dict[str, Array], config: QuantConfig
) -> tuple[SiteSpec, dict[str, Array], dict[str, Any]]:
    """(spec, scales, fixed) of one site: static scales, and thresholds or channel lists if asked for."""
    if isinstance(site, SelectiveScan):
        return _scan_scales(site, seen, config)
    x = seen["act"]
    scale, fixed = _activation_scale(x, config)
    scales = {"act": scale}
    if isinstance(site, nnx.Linear):
        kernel = site.kernel[...].astype(jnp.float32)
        scales["weight"] = search_weight_scale(
            kernel, config.weight_bits, group=config.weight_group, search=config.scale_search == "norm"
        )
    return SiteSpec(config, tokens=x.shape[1], channels=x.shape[2]), scales, {"act": fixed}


def _scan_scales(
    site: SelectiveScan, seen: dict[str, Array], config: QuantConfig
) -> tuple[SiteSpec, dict[str, Array], dict[str, Any]]:
    spec = SiteSpec(config, tokens=seen["u"].shape[1], channels=seen["u"].shape[3])
    scales: dict[str, Array] = {}
    fixed: dict[str, list[dict[str, Array]]] = {}
    for name in ACTIVATION_OPERANDS:
        if name in config.operands:
            x, settings = seen[name], spec.operand_config(name)
            if is_asymmetric(name, config):
                bias = site.delta_bias(x)
                ranges = [search_ranges(x[:, :, g] + bias[:, :, g], settings.splitting) for g in range(site.directions)]
                found = [(scale, {"zero": zero}) for scale, zero in ranges]
            else:
                found = [_activation_scale(x[:, :, g], settings) for g in range(site.directions)]
            scales[name] = jnp.stack([scale for scale, _ in found])
            fixed[name] = [values for _, values in found]
    for name in PARAMETER_OPERANDS:
        if name in config.operands:
            scales[name] = search_parameter_scale(scan_parameter(site, name), site.directions, config)
    if "h" in config.operands:
        largest = jnp.max(seen["h"], axis=0).T  # a state may be 0 on all images
        scales["h"] = jnp.maximum(largest / max_level(8), MIN_SCALE)
    return spec, scales, fixed


def _activation_scale(x: Array, config: QuantConfig) -> tuple[Array, dict[str, Array]]:
    fixed = {}
    if config.detection == "static":
        fixed["channels"] = calibrate_channels(x, config.splitting)
    if config.needs_theta:
        fixed["theta"] = calibrate_theta(x, config.splitting)
    tokens, channels = x.shape[1:]
    if config.spec == "paper" and channels - 1 <= config.sigma * channels**0.5:
        # No channel can lie sigma deviations above the mean of so few (a single one always reaches its own mean, and is
        # an outlier as soon as it does not fit): what does not fit is clipped. A scale per token from so few values
        # would not cover images that calibration has not seen; one for all tokens does.
        x = x.reshape(-1, 1, channels)
    scale = search_token_scales(
        x, config.splitting, channels=fixed.get("channels"), search=config.scale_search == "norm"
    )
    return jnp.broadcast_to(scale, (tokens,)), fixed
