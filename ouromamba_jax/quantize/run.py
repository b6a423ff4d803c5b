"""`quantize`: OuroMamba-Quant, its scales searched and tuned, fitted to one stage after the other."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.ops.qtensor import QTensor, quantize_with_scale
from ouromamba_jax.quantize.calibrate import Captured, find_scales
from ouromamba_jax.quantize.config import PARAMETER_OPERANDS, QuantConfig
from ouromamba_jax.quantize.fake import Scales
from ouromamba_jax.quantize.measure import measure
from ouromamba_jax.quantize.modules import ActScales, QuantizedPoint, QuantLinear, SiteSpec
from ouromamba_jax.quantize.report import QuantReport
from ouromamba_jax.quantize.rounding import quantize_parameter, scan_parameter
from ouromamba_jax.quantize.scan import QuantSelectiveScan
from ouromamba_jax.quantize.sites import iter_sites
from ouromamba_jax.quantize.stages import Fitted, Progress, StageInputs, quantize_stages, replace_sites
from ouromamba_jax.quantize.tune import tune_scales, update_of


def quantize(
    model: VisionModel,
    images: Float[Array, "N H W 3"],
    config: QuantConfig,
    *,
    progress: Progress | None = None,
) -> tuple[VisionModel, QuantReport]:
    """A low-bit copy of `model`, and the account of what was done; `model` itself is left as it is.

    Every linear layer becomes an integer product and every selective scan runs on rounded operands (OuroMamba,
    Algorithm 2). Static scales are searched on the float model's activations; then, stage by stage, they are tuned so
    that the quantised stage, fed by the quantised stages before it, gives the float stage's output.

    Args:
      model: a float model with `stages`: (name, module) in the order of the forward pass.
      images: normalised calibration images, synthetic or real.
      config: see `QuantConfig`.
      progress: called as progress(done, total, stage name).

    Raises:
      ValueError: if the model is already quantised, the images are no normalised ones, a rule matches nothing, a weight
        group does not divide a layer's inputs, or the model multiplies matrices where no rule and no site covers them.
    """

    def fit(stage: nnx.Module, inputs: StageInputs) -> Fitted:
        specs, scales, fixed = _find_all(stage, inputs.captured, inputs.configs)
        losses: list[float] = []
        if config.tune_epochs and scales:
            target = update_of(inputs.exact_out, inputs.exact)
            scales, losses = tune_scales(stage, specs, scales, fixed, inputs.quantised, target, config)
        modules = quantized_modules(stage, specs, scales, fixed)
        reports = measure(
            stage, replace_sites(stage, modules), specs, inputs.captured, len(inputs.exact), config.batch_size
        )
        return Fitted(modules, tuple(reports), tuple(losses))

    return quantize_stages(model, images, config, fit, progress=progress)


def _find_all(stage: nnx.Module, captured: Captured, configs: dict[str, QuantConfig]):
    sites = dict(iter_sites(stage))
    found = {path: find_scales(sites[path], captured[path], c) for path, c in configs.items()}
    specs = {path: spec for path, (spec, _, _) in found.items()}
    return specs, {p: scales for p, (_, scales, _) in found.items()}, {p: fixed for p, (_, _, fixed) in found.items()}


def quantized_modules(
    stage: nnx.Module, specs: dict[str, SiteSpec], scales: Scales, fixed: dict[str, Any]
) -> dict[str, nnx.Module]:
    """What takes the place of every site in `specs`, by path."""
    sites = dict(iter_sites(stage))
    return {path: quantized_module(sites[path], spec, scales[path], fixed[path]) for path, spec in specs.items()}


def quantized_module(site: Any, spec: SiteSpec, scales: dict[str, Array], fixed: dict[str, Any]) -> nnx.Module:
    config = spec.config
    if isinstance(site, nnx.Linear):
        kernel = site.kernel[...].astype(jnp.float32)
        weight = quantize_with_scale(kernel, scales["weight"], config.weight_bits, group=config.weight_group)
        bias = None if site.bias is None else site.bias[...]
        return QuantLinear(weight, bias, ActScales(scales["act"], **fixed["act"]), spec, site.dtype)
    if isinstance(site, SelectiveScan):
        activations = {
            name: [ActScales(scales[name][g], **groups[g]) for g in range(site.directions)]
            for name, groups in fixed.items()
        }
        parameters: dict[str, QTensor] = {
            name: quantize_parameter(scan_parameter(site, name), scales[name], config)
            for name in PARAMETER_OPERANDS
            if name in scales
        }
        return QuantSelectiveScan(site, activations, parameters, scales.get("h"), spec)
    return QuantizedPoint(ActScales(scales["act"], **fixed["act"]), spec)
