"""What is stored of a quantisation beside the arrays: the specs of the sites, and the modules they stand for."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.quantize.config import ACTIVATION_OPERANDS, QuantConfig, QuantRule
from ouromamba_jax.quantize.modules import ActScales, QuantizedPoint, QuantLinear, SiteSpec, is_asymmetric
from ouromamba_jax.quantize.scan import QuantSelectiveScan
from ouromamba_jax.quantize.sites import Site, iter_sites, named_modules, set_module


def quantized_specs(model: nnx.Module) -> dict[str, SiteSpec]:
    """The spec of every quantised site by path; empty for a float model."""
    kinds = (QuantLinear, QuantSelectiveScan, QuantizedPoint)
    return {path: module.spec for path, module in named_modules(model) if isinstance(module, kinds)}


def apply_specs(model: nnx.Module, specs: dict[str, SiteSpec]) -> nnx.Module:
    """Puts empty quantised modules at the sites of `specs` into a float model, and returns it.

    Raises:
      ValueError: if the model has no such site.
    """
    sites = dict(iter_sites(model))
    for path, spec in specs.items():
        if path not in sites:
            raise ValueError(f"the model has no site {path!r} to quantise")
        set_module(model, path, _empty(sites[path], spec))
    return model


def _empty(site: Site, spec: SiteSpec) -> nnx.Module:
    """The quantised module of a site, with zeros of the right shapes."""
    if isinstance(site, nnx.Linear):
        return _empty_linear(site, spec)
    if isinstance(site, SelectiveScan):
        return _empty_scan(site, spec)
    return QuantizedPoint(_empty_scales(spec.config, spec.tokens, spec.channels), spec)


def _empty_linear(site: nnx.Linear, spec: SiteSpec) -> QuantLinear:
    config = spec.config
    rows, columns = site.kernel.shape
    weight = _empty_tensor(rows, columns, config.weight_bits, config.weight_group)
    bias = None if site.bias is None else site.bias[...].astype(config.float_dtype)
    return QuantLinear(weight, bias, _empty_scales(config, spec.tokens, rows), spec, site.dtype)


def _empty_scan(site: SelectiveScan, spec: SiteSpec) -> QuantSelectiveScan:
    operands, groups = spec.config.operands, range(site.directions)
    rows, states = site.A_log.shape
    inner = rows // site.directions
    widths = {"u": inner, "delta": inner, "B": states, "C": states, "y": inner}
    activations = {
        name: [_empty_scales(spec.operand_config(name), spec.tokens, widths[name], operand=name) for _ in groups]
        for name in ACTIVATION_OPERANDS
        if name in operands
    }
    parameters = {
        name: _empty_tensor(rows, width, bits=8, group=inner)
        for name, width in (("A", states), ("D", 1))
        if name in operands
    }
    state_scale = jnp.zeros((site.directions, spec.tokens)) if "h" in operands else None
    return QuantSelectiveScan(site, activations, parameters, state_scale, spec)


def _empty_tensor(rows: int, columns: int, bits: int, group: int | None) -> QTensor:
    groups = 1 if group is None else rows // group
    return QTensor(jnp.zeros((rows, columns), jnp.int8), jnp.zeros((groups, columns)), bits=bits, group=group)


def _empty_scales(config: QuantConfig, tokens: int, channels: int, *, operand: str = "") -> ActScales:
    return ActScales(
        scale=jnp.zeros((tokens,)),
        theta=jnp.zeros((tokens,)) if config.needs_theta else None,
        channels=jnp.zeros((channels,), bool) if config.detection == "static" else None,
        zero=jnp.zeros((tokens,)) if is_asymmetric(operand, config) else None,
    )


def spec_to_json(spec: SiteSpec) -> dict[str, Any]:
    """A SiteSpec as plain JSON values."""
    return {"tokens": spec.tokens, "channels": spec.channels, "config": dataclasses.asdict(spec.config)}


def spec_from_json(data: dict[str, Any]) -> SiteSpec:
    """The inverse of `spec_to_json`."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["config"].items()}
    fields["rules"] = tuple(QuantRule(**rule) for rule in fields["rules"])
    return SiteSpec(config=QuantConfig(**fields), tokens=int(data["tokens"]), channels=int(data["channels"]))
