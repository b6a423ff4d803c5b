"""`quantize`: OuroMamba-Quant, its scales searched and tuned, fitted to one stage after the other."""

import dataclasses
import os
from collections import Counter
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ouromamba_jax.files import local_path
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.ops.passes import Ask, Asking, gather, together
from ouromamba_jax.ops.split_calibration import Calibration, quiet_tokens
from ouromamba_jax.quantize.activation import SiteSpec
from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.finite import check_finite
from ouromamba_jax.quantize.gptq import with_levels
from ouromamba_jax.quantize.kinds import StageCalibration, kind_of
from ouromamba_jax.quantize.measure import measure
from ouromamba_jax.quantize.report import QuantReport
from ouromamba_jax.quantize.resume import keep_stage, kept_stage, run_identity
from ouromamba_jax.quantize.sites import iter_sites
from ouromamba_jax.quantize.stages import Fitted, Progress, StageInputs, quantize_stages, replace_sites
from ouromamba_jax.quantize.tune import tune_scales, update_of


def quantize(
    model: VisionModel,
    images: Float[Array, "N H W I"],
    config: QuantConfig,
    *,
    progress: Progress | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> tuple[VisionModel, QuantReport]:
    """`data_free.quantize` of a model and images, which says what the arguments are and what is raised."""
    folder = None if resume is None else local_path(resume)
    identity = {} if folder is None else run_identity(model, model.config.preprocessing.checked(images), config)

    def fit(stage: nnx.Module, inputs: StageInputs) -> Fitted:
        if folder is None:
            return fit_anew(stage, inputs)
        found = kept_stage(folder, inputs.name, stage, identity)
        if found is None:
            found = fit_anew(stage, inputs)
            keep_stage(folder, inputs.name, found, identity)
        return found

    def fit_anew(stage: nnx.Module, inputs: StageInputs) -> Fitted:
        specs, calibrated = calibrate_sites(stage, inputs)
        sees_images = inputs.name == model.stages[0][0]
        quiet = count_quiet(calibrated, constant_tokens(inputs) if sees_images else {})
        if config.weight_rounding == "gptq":
            calibrated = with_levels(stage, specs, calibrated, inputs.quantised, config.batch_size)
        losses: list[float] = []
        if config.tune_epochs and calibrated:
            target = update_of(inputs.exact_out, inputs.exact)
            calibrated, losses = tune_scales(stage, specs, calibrated, inputs.quantised, target, config)
        found = fitted(stage, inputs, specs, calibrated, losses)
        reports = (dataclasses.replace(report, quiet_tokens=quiet[report.path]) for report in found.reports)
        return found._replace(reports=tuple(reports))

    return quantize_stages(model, images, config, fit, progress=progress)


def calibrate_sites(stage: nnx.Module, inputs: StageInputs) -> tuple[dict[str, SiteSpec], StageCalibration]:
    """What every site of a float stage is calibrated to, by path.

    Raises:
      ValueError: naming the site whose activations are not finite.
    """
    sites = dict(iter_sites(stage))
    asked = together({path: _calibrating(sites[path], path, inputs) for path in inputs.configs})
    try:
        found = gather(asked, inputs.batches)
    except ValueError:  # of the first site by name, which need not be the first of the forward pass
        check_finite(inputs.name, stage, inputs.exact, inputs.batch_size)
        raise
    return {path: spec for path, (spec, _) in found.items()}, {path: made for path, (_, made) in found.items()}


def _calibrating(site: Any, path: str, inputs: StageInputs) -> Asking[tuple[SiteSpec, dict[str, Any]]]:
    try:
        return (yield from kind_of(site).calibrate(site, inputs.configs[path], itemgetter(path)))
    except ValueError as error:
        raise ValueError(f"{inputs.name}.{path} cannot be calibrated: {error}") from error


def constant_tokens(inputs: StageInputs) -> dict[str, Bool[Array, " L"]]:
    """Tokens that are the same in all of several images, by the linear layer that they enter."""
    if len(inputs.exact) == 1:
        return {}

    def ask(path: str) -> tuple[Ask, Ask]:
        reductions = ((jnp.min, jnp.minimum), (jnp.max, jnp.maximum))
        low, high = (Ask(lambda seen, f=f: f(seen[path]["input"], axis=0), join) for f, join in reductions)
        return low, high

    def asking() -> Asking[dict[str, tuple[Array, Array]]]:
        sites = iter_sites(inputs.stage)
        return (yield {p: ask(p) for p, site in sites if p in inputs.configs and isinstance(site, nnx.Linear)})

    return {path: (low == high).all(axis=-1) for path, (low, high) in gather(asking(), inputs.batches).items()}


def count_quiet(calibrated: StageCalibration, constant: dict[str, Bool[Array, " L"]]) -> Counter[str]:
    """Tokens that calibration hardly excites, or by one value, by the path that a report gives to the activation."""
    found: Counter[str] = Counter()
    for path, of_site in calibrated.items():
        for name, calibrations in of_site.items():
            for c in jax.tree.leaves(calibrations, is_leaf=lambda leaf: isinstance(leaf, Calibration)):
                if isinstance(c, Calibration):
                    if name == "input":
                        found[path] += int((quiet_tokens(c.scale) | constant.get(path, False)).sum())
                    else:
                        found[f"{path}.{name}"] += int(quiet_tokens(c.scale).sum())
    return found


def fitted(
    stage: nnx.Module,
    inputs: StageInputs,
    specs: dict[str, SiteSpec],
    calibrated: StageCalibration,
    losses: list[float] | None = None,
) -> Fitted:
    """The quantised modules of a stage, and what each costs."""
    sites = dict(iter_sites(stage))
    modules = {path: kind_of(sites[path]).make(sites[path], spec, calibrated[path]) for path, spec in specs.items()}
    low = replace_sites(stage, modules)
    return Fitted(modules, tuple(measure(stage, low, specs, inputs.batches())), tuple(losses or ()))
