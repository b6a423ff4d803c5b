"""`quantize`: calibrate, tune and replace, one stage of the model after the other."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.models.layers import QuantPoint, SelectiveScan
from ouromamba_jax.outliers import outlier_statistics
from ouromamba_jax.qtensor import QTensor, quantize_with_scale
from ouromamba_jax.quantize.calibrate import Captured, capture, check_coverage, find_scales
from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.fake import Scales, quantize_parameter, scan_parameter
from ouromamba_jax.quantize.modules import (
    ActQuantizer,
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
from ouromamba_jax.report import sqnr_db


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
    configs = _resolve(model, config)
    quantised = nnx.clone(model)
    exact = x = images
    reports: list[SiteReport] = []
    tuning: dict[str, tuple[float, ...]] = {}
    names = [name for name, _ in model.stages]
    for done, (name, stage) in enumerate(model.stages):
        if progress is not None:
            progress(done, len(names), name)
        prefix = name + "."
        local = {path.removeprefix(prefix): c for path, c in configs.items() if path.startswith(prefix)}
        check_coverage(stage, jax.ShapeDtypeStruct((1, *exact.shape[1:]), exact.dtype), name)
        exact_out, captured = capture(stage, exact, local, config.batch_size)
        specs, scales, fixed = _find_all(stage, captured, local)
        if config.tune_epochs and scales:
            target = update_of(exact_out, exact)
            scales, losses = tune_scales(stage, specs, scales, fixed, x, target, config)
            tuning[name] = tuple(losses)
        low = nnx.clone(stage)
        _replace(low, specs, scales, fixed)
        reports += _report(stage, low, specs, captured, prefix)
        set_module(quantised, name, low)
        exact, x = exact_out, _apply(low, x, config.batch_size)
    if progress is not None:
        progress(len(names), len(names), "done")
    kept = _store_floats(quantised, jnp.dtype(config.float_dtype), configs)
    return quantised, QuantReport(tuple(reports), kept, tuning)


def _resolve(model: nnx.Module, config: QuantConfig) -> dict[str, QuantConfig]:
    """Settings by site. A marked tensor is a site only if the config names it among its operands."""
    sites = list(iter_sites(model))
    unused = [rule.pattern for rule in config.rules if not any(rule.matches(path) for path, _ in sites)]
    if unused:
        known = ", ".join(path for path, _ in sites[:4])
        raise ValueError(f"the rule {unused[0]!r} matches no site of the model; paths look like {known}.")
    resolved = {path: config.resolve(path) for path, _ in sites}
    return {
        path: c
        for (path, site) in sites
        if (c := resolved[path]) is not None
        and (not isinstance(site, QuantPoint) or path.rsplit(".", 1)[-1] in c.operands)
    }


def _find_all(stage: nnx.Module, captured: Captured, configs: dict[str, QuantConfig]):
    sites = dict(iter_sites(stage))
    found = {path: find_scales(sites[path], captured[path], c) for path, c in configs.items()}
    specs = {path: spec for path, (spec, _, _) in found.items()}
    return specs, {p: scales for p, (_, scales, _) in found.items()}, {p: fixed for p, (_, _, fixed) in found.items()}


def _replace(stage: nnx.Module, specs: dict[str, SiteSpec], scales: Scales, fixed: dict[str, Any]) -> None:
    """Puts the quantised modules in place of the float ones."""
    for path, site in list(iter_sites(stage)):
        if path in specs:
            set_module(stage, path, _quantised(site, specs[path], scales[path], fixed[path]))


def _quantised(site: Any, spec: SiteSpec, scales: dict[str, Array], fixed: dict[str, Any]) -> nnx.Module:
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


@partial(jax.jit, static_argnums=0)
def _apply_batch(graphdef: Any, state: nnx.State, x: Array) -> Array:
    return nnx.merge(graphdef, state)(x)


def _apply(stage: nnx.Module, x: Array, batch_size: int) -> Array:
    graphdef, state = nnx.split(stage)
    return jnp.concatenate([_apply_batch(graphdef, state, x[i : i + batch_size]) for i in range(0, len(x), batch_size)])


def _report(stage: nnx.Module, low: nnx.Module, specs: dict[str, SiteSpec], captured: Captured, prefix: str):
    floats, reports = dict(iter_sites(stage)), []
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(low)}
    for path, spec in specs.items():
        module, seen, config = modules[path], captured[path], spec.config
        bits = (config.act_bits, config.outlier_bits)
        if isinstance(module, QuantLinear):
            x = seen["act"]
            stats = outlier_statistics(module.act.split(x))
            exact = x.astype(jnp.float32) @ floats[path].kernel[...].astype(jnp.float32)
            bias = 0.0 if module.bias is None else module.bias[...].astype(jnp.float32)[None, None]
            noise = sqnr_db(exact, module(x).astype(jnp.float32) - bias)
            weights = (
                "output channel" if config.weight_group is None else f"{config.weight_group} inputs x output channel"
            )
            reports.append(
                SiteReport(
                    prefix + path,
                    "matmul",
                    config.weight_bits,
                    *bits,
                    f"weight: {weights}; input: token",
                    stats.rate,
                    stats.shifted_rows,
                    noise,
                )
            )
        elif isinstance(module, QuantSelectiveScan):
            reports += _report_scan(floats[path], module, seen, prefix + path)
        else:
            reports.append(_report_activation(prefix + path, [module.act], seen["act"][:, :, None], "token"))
    return reports


def _report_scan(scan: SelectiveScan, module: QuantSelectiveScan, seen: dict[str, Array], path: str):
    config = module.spec.config
    for name, quantizers in module.act.items():
        yield _report_activation(f"{path}.{name}", list(quantizers), seen[name], "direction x token")
    for name, levels in module.parameter_levels.items():
        exact, rounded = scan_parameter(scan, name), module._parameter(name)
        rate = float(jnp.mean(jnp.abs(levels[...].astype(jnp.int32)) > 2 ** (config.act_bits - 1) - 1))
        granularity = "direction x state" if name == "A" else "direction"
        yield SiteReport(
            f"{path}.{name}", "parameter", None, config.act_bits, 8, granularity, rate, 0.0, sqnr_db(exact, rounded)
        )
    if module.state_scale is not None:
        yield SiteReport(f"{path}.h", "operand", None, 8, None, "direction x token", 0.0, 0.0, float("nan"))


def _report_activation(path: str, quantizers: list[ActQuantizer], x: Array, granularity: str) -> SiteReport:
    """One activation (B, L, G, C), all directions together."""
    config = quantizers[0].config
    splits = [q.split(x[:, :, g]) for g, q in enumerate(quantizers)]
    stats = [outlier_statistics(split) for split in splits]
    rounded = jnp.stack([q(x[:, :, g]) for g, q in enumerate(quantizers)], axis=2)
    return SiteReport(
        path,
        "operand",
        None,
        config.act_bits,
        config.outlier_bits,
        granularity,
        float(np.mean([s.rate for s in stats])),
        float(np.mean([s.shifted_rows for s in stats])),
        sqnr_db(x, rounded),
    )


def _store_floats(model: nnx.Module, dtype: Any, configs: dict[str, QuantConfig]) -> tuple[tuple[str, int, str], ...]:
    """Keeps what stayed float in `dtype`; returns it with the reason."""
    kept = []
    for path, module in nnx.iter_modules(model):
        for name, leaf in vars(module).items():
            if isinstance(leaf, nnx.Param):
                leaf.set_value(leaf[...].astype(dtype))
                dotted = ".".join(map(str, (*path, name)))
                is_site = isinstance(module, nnx.Linear | SelectiveScan) and ".".join(map(str, path)) not in configs
                reason = "a rule or the operand list leaves it out" if is_site else "not a matmul"
                kept.append((dotted, leaf.size, reason))
    return tuple(kept)
