"""The three kinds of sites: which module says how one is recorded, calibrated, faked, made, emptied and measured."""

from types import ModuleType
from typing import Any

from flax import nnx

from ouromamba_jax.models.layers import Operand, SelectiveScan
from ouromamba_jax.quantize import linear, operand, scan
from ouromamba_jax.quantize.activation import SiteSpec
from ouromamba_jax.quantize.linear import QuantLinear
from ouromamba_jax.quantize.operand import QuantOperand
from ouromamba_jax.quantize.scan import QuantSelectiveScan
from ouromamba_jax.quantize.sites import iter_sites, named_modules, set_module

_KINDS: dict[type, ModuleType] = {nnx.Linear: linear, SelectiveScan: scan, Operand: operand}
_QUANTIZED = (QuantLinear, QuantSelectiveScan, QuantOperand)

StageCalibration = dict[str, dict[str, Any]]
"""What calibration found, {site: {name: ...}}, as a pytree; each kind of site says what it holds."""


def kind_of(site: Any) -> Any:
    """The module with `record`, `calibrate`, `fake`, `make`, `empty`, `measure` and `describe` for a float site."""
    return _KINDS[type(site)]


def install_fakes(stage: nnx.Module, specs: dict[str, SiteSpec], calibrated: StageCalibration) -> nnx.Module:
    """Replaces the sites of a float stage by trainable stand-ins, in place. Only for use inside a traced function."""
    for path, site in list(iter_sites(stage)):
        if path in specs:
            set_module(stage, path, kind_of(site).fake(site, specs[path], calibrated[path]))
    return stage


def quantized_specs(model: nnx.Module) -> dict[str, SiteSpec]:
    """The spec of every quantised site by path; empty for a float model."""
    return {path: module.spec for path, module in named_modules(model) if isinstance(module, _QUANTIZED)}


def apply_specs(model: nnx.Module, specs: dict[str, SiteSpec]) -> nnx.Module:
    """Puts empty quantised modules at the sites of `specs` into a float model, and returns it.

    Raises:
      ValueError: if the model has no such site.
    """
    sites = dict(iter_sites(model))
    for path, spec in specs.items():
        if path not in sites:
            raise ValueError(f"the model has no site {path!r} to quantise")
        site = sites[path]
        module = kind_of(site).make(site, spec, kind_of(site).empty(site, spec))
        bias = getattr(module, "bias", None)
        if bias is not None:
            module.bias = nnx.Param(bias[...].astype(spec.config.float_dtype))
        set_module(model, path, module)
    return model


def prepare_weights(model: nnx.Module) -> None:
    """Lays out the weights of every `QuantLinear` for the backend that will multiply by them, in place.

    `quantize` and `load` end with it. A model that then moves to another device, or to another backend, still gives
    the same results, but undoes the layout in every call until this is called again.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, QuantLinear):
            module.prepare_weight()
