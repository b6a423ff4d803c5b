"""`quantize`: calibrate, tune and replace, one stage of the model after the other."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.models.base import VisionModel, apply_stage
from ouromamba_jax.models.layers import QuantPoint, SelectiveScan
from ouromamba_jax.qtensor import QTensor, quantize_with_scale
from ouromamba_jax.quantize.calibrate import Captured, capture, check_coverage, find_scales
from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.fake import Scales, quantize_parameter, scan_parameter
from ouromamba_jax.quantize.measure import measure
from ouromamba_jax.quantize.modules import (
    ActScales,
    QuantizedPoint,
    QuantLinear,
    QuantSelectiveScan,
    SiteSpec,
    iter_sites,
    set_module,
)
from ouromamba_jax.quantize.report import QuantReport, SiteReport
from ouromamba_jax.quantize.tune import tune_scales, update_of


def quantize(
    model: VisionModel,
    images: Float[Array, "N H W 3"],
    config: QuantConfig,
    *,
    progress: Callable[[int, int, str], None] | None = None,
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
      ValueError: if the model is already quantised, the images are not finite, a rule matches nothing, or the model
        multiplies matrices where no rule and no site covers them.
    """
    if any(isinstance(m, QuantLinear | QuantSelectiveScan) for _, m in nnx.iter_modules(model)):
        raise ValueError("the model is already quantised; quantise the float model it came from.")
    images = jnp.asarray(images)
    if images.ndim != 4 or not len(images) or not bool(jnp.isfinite(images).all()):
        raise ValueError(f"images must be finite and of shape (N, H, W, 3) with N > 0, not {images.shape}.")
    configs = resolve_sites(model, config)
    shape = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    for name, stage in model.stages:
        shape = check_coverage(stage, shape, name)
    quantised = nnx.clone(model)
    exact = x = images
    reports: list[SiteReport] = []
    kept: list[tuple[str, int, str]] = []
    tuning: dict[str, tuple[float, ...]] = {}
    names = [name for name, _ in model.stages]
    for done, (name, stage) in enumerate(model.stages):
        if progress is not None:
            progress(done, len(names), name)
        prefix = name + "."
        local = {path.removeprefix(prefix): c for path, c in configs.items() if path.startswith(prefix)}
        exact_out, captured = capture(stage, exact, local, config.batch_size)
        specs, scales, fixed = _find_all(stage, captured, local)
        if config.tune_epochs and scales:
            target = update_of(exact_out, exact)
            scales, losses = tune_scales(stage, specs, scales, fixed, x, target, config)
            tuning[name] = tuple(losses)
        low = nnx.clone(stage)
        _replace(low, specs, scales, fixed)
        measured = measure(stage, low, specs, captured, len(images), config.batch_size)
        reports += [dataclasses.replace(report, path=prefix + report.path) for report in measured]
        kept += store_floats(low, jnp.dtype(config.float_dtype), configs, prefix)
        set_module(quantised, name, low)
        exact, x = exact_out, apply_in_batches(low, x, config.batch_size)
    if progress is not None:
        progress(len(names), len(names), "done")
    return quantised, QuantReport(tuple(reports), tuple(kept), tuning)


def resolve_sites(model: nnx.Module, config: QuantConfig) -> dict[str, QuantConfig]:
    """Settings by site. A marked tensor is a site only if the config names it among its operands."""
    resolved = {path: (site, config.resolve(path)) for path, site in iter_sites(model)}
    active = {
        path: c
        for path, (site, c) in resolved.items()
        if c is None or not isinstance(site, QuantPoint) or path.rsplit(".", 1)[-1] in c.operands
    }
    unused = [rule.pattern for rule in config.rules if not any(rule.matches(path) for path in active)]
    if unused:
        known = ", ".join(list(active)[:4])
        raise ValueError(f"the rule {unused[0]!r} matches no site of the model; paths look like {known}.")
    return {path: c for path, c in active.items() if c is not None}


def _find_all(stage: nnx.Module, captured: Captured, configs: dict[str, QuantConfig]):
    sites = dict(iter_sites(stage))
    found = {path: find_scales(sites[path], captured[path], c) for path, c in configs.items()}
    specs = {path: spec for path, (spec, _, _) in found.items()}
    return specs, {p: scales for p, (_, scales, _) in found.items()}, {p: fixed for p, (_, _, fixed) in found.items()}


def _replace(stage: nnx.Module, specs: dict[str, SiteSpec], scales: Scales, fixed: dict[str, Any]) -> None:
    """Puts the quantised modules in place of the float ones."""
    for path, site in list(iter_sites(stage)):
        if path in specs:
            set_module(stage, path, quantized_module(site, specs[path], scales[path], fixed[path]))


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
            for name in ("A", "D")
            if name in scales
        }
        return QuantSelectiveScan(site, activations, parameters, scales.get("h"), spec)
    return QuantizedPoint(ActScales(scales["act"], **fixed["act"]), spec)


def apply_in_batches(stage: nnx.Module, x: Array, batch_size: int) -> Array:
    graphdef, state = nnx.split(stage)
    return jnp.concatenate([apply_stage(graphdef, state, x[i : i + batch_size]) for i in range(0, len(x), batch_size)])


def store_floats(
    stage: nnx.Module, dtype: Any, configs: dict[str, QuantConfig], prefix: str
) -> list[tuple[str, int, str]]:
    """Keeps what stayed float in `dtype`; returns (path, entries, reason) of each.

    Raises:
      ValueError: if a value is beyond the range of `dtype`.
    """
    kept = []
    for path, module in nnx.iter_modules(stage):
        site = prefix + ".".join(map(str, path))
        for name, leaf in vars(module).items():
            if isinstance(leaf, nnx.Param):
                exact, rounded = leaf[...], leaf[...].astype(dtype)
                dotted = f"{site.removesuffix('.')}.{name}"
                if bool((jnp.isfinite(exact) & ~jnp.isfinite(rounded)).any()):
                    raise ValueError(
                        f"{dotted} has values beyond the range of {dtype}; quantise with float_dtype='float32' or "
                        "'bfloat16'."
                    )
                leaf.set_value(rounded)
                is_site = isinstance(module, nnx.Linear | SelectiveScan) and site not in configs
                reason = "a rule or the operand list leaves it out" if is_site else "not a matmul"
                kept.append((dotted, leaf.size, reason))
    return kept
