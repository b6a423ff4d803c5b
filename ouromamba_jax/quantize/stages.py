"""One walk over a model's stages, which every method shares: calibrate, fit, replace, and go on."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.models.base import VisionModel, apply_stage
from ouromamba_jax.ops.cpu_miscompile import warn_if_miscompiled
from ouromamba_jax.quantize.activation import Calibrated, Levels
from ouromamba_jax.quantize.capture import Captured, capture, captured_batches, in_batches
from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.coverage import check_coverage
from ouromamba_jax.quantize.finite import check_finite
from ouromamba_jax.quantize.floats import FloatSites, store_floats
from ouromamba_jax.quantize.kinds import prepare_weights
from ouromamba_jax.quantize.report import QuantReport, SiteReport
from ouromamba_jax.quantize.sites import iter_sites, resolve_sites, rules_at, set_module
from ouromamba_jax.sharding import without_mesh

Progress = Callable[[int, int, str], None]
"""Called with (stages done, stages in all, name of the next)."""


@dataclass(frozen=True)
class StageInputs:
    """What a method sees of one stage.

    Attributes:
      name: its path in the model.
      stage: itself, in float.
      exact: its input in the float model on the calibration images.
      quantised: what the quantised stages before it give instead.
      configs: the settings of its sites, by their paths within it.
      batch_size: images per batch.
    """

    name: str
    stage: nnx.Module
    exact: Array
    quantised: Array
    configs: dict[str, QuantConfig]
    batch_size: int

    def batches(self) -> Iterator[Captured]:
        """What entered every site in the float model, by batches that are computed as they are asked for."""
        made = captured_batches(self.stage, self.exact, self.configs, self.batch_size)
        return (captured for _, captured in made)

    @cached_property
    def captured(self) -> Captured:
        """What entered every site in the float model, of all images at once."""
        return capture(self.stage, self.exact, self.configs, self.batch_size)[1]

    @cached_property
    def exact_out(self) -> Array:
        """The float stage's output on `exact`."""
        made = captured_batches(self.stage, self.exact, self.configs, self.batch_size)
        return jnp.concatenate([out for out, _ in made])


class Fitted(NamedTuple):
    """What a method puts into a stage, by path; one report per site; and its loss, epoch by epoch, if it learns."""

    modules: dict[str, nnx.Module]
    reports: tuple[SiteReport, ...]
    losses: tuple[float, ...] = ()


@without_mesh
def quantize_stages(
    model: VisionModel,
    images: Float[Array, "N H W I"],
    config: QuantConfig,
    fit: Callable[[nnx.Module, StageInputs], Fitted],
    *,
    progress: Progress | None = None,
) -> tuple[VisionModel, QuantReport]:
    """A copy of `model` with the modules that `fit` made for each of its stages, in the order of the forward pass.

    Args:
      model: a float model with `stages`.
      images: normalised calibration images.
      config: of every site, its rules included; batch size and float type.

    Raises:
      ValueError: if the model is already quantised or holds a NaN or an infinity, the images are no normalised ones, a
        rule matches nothing, a weight group does not divide a layer's inputs, or the model multiplies matrices where no
        rule and no site covers them.
    """
    if any(isinstance(leaf, Levels | Calibrated) for _, leaf in nnx.to_flat_state(nnx.state(model))):
        raise ValueError("the model is already quantised; quantise the float model it came from.")
    for leaf_path, leaf in nnx.to_flat_state(nnx.state(model)):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf.get_value()).all()):
            raise ValueError(f"{'.'.join(map(str, leaf_path))} of the model holds NaN or infinity: load whole weights.")
    warn_if_miscompiled()
    images = model.config.preprocessing.checked(images)
    images = jnp.asarray(images, jnp.float32 if images.dtype == jnp.float64 else images.dtype)
    if not len(images):
        raise ValueError("there are no images to calibrate with; give some, or images=None to generate them.")
    configs = resolve_sites(model, config)
    rules = {path: _rules_of(site, path, config) for path, site in iter_sites(model)}
    places = {id(site): path for path, site in iter_sites(model)}
    shape = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    for name, stage in model.stages:
        shape = check_coverage(stage, shape, name, _within(name, configs))
    quantised = nnx.clone(model)
    exact = x = images
    reports: list[SiteReport] = []
    kept: list[tuple[str, int, str]] = []
    operands: list[tuple[str, str]] = []
    tuning: dict[str, tuple[float, ...]] = {}
    stages = model.stages
    for done, (name, stage) in enumerate(stages):
        if progress is not None:
            progress(done, len(stages), name)
        prefix = name + "."
        inputs = StageInputs(name, stage, exact, x, _within(name, configs), config.batch_size)
        if not bool(jnp.isfinite(inputs.exact_out).all()):
            check_finite(name, stage, exact, config.batch_size)
            raise ValueError(
                f"{name} returns NaN or infinity, though what its layers make is finite: check the float model."
            )
        fitted = fit(stage, inputs)
        low = replace_sites(stage, fitted.modules)
        for report in fitted.reports:
            path = prefix + report.path
            site = path if path in configs else path.rpartition(".")[0]  # of an operand of a scan
            reports.append(dataclasses.replace(report, path=path, rules=rules[site]))
        if fitted.losses:
            tuning[name] = fitted.losses
        sites = {path: (places[id(site)], site) for path, site in iter_sites(stage)}
        why = FloatSites(sites, fitted.modules, config)
        kept += store_floats(low, jnp.dtype(config.float_dtype), why, prefix)
        operands += ((prefix + path, reason) for path, reason in why.activations())
        set_module(quantised, name, low)
        exact, x = inputs.exact_out, apply_in_batches(low, x, config.batch_size)
    if progress is not None:
        progress(len(stages), len(stages), "done")
    prepare_weights(quantised)
    return quantised, QuantReport(tuple(reports), tuple(kept), tuning, tuple(operands))


def _within(name: str, configs: dict[str, QuantConfig]) -> dict[str, QuantConfig]:
    """Those of a stage, by their paths within it."""
    prefix = name + "."
    return {path.removeprefix(prefix): c for path, c in configs.items() if path.startswith(prefix)}


def _rules_of(site: Any, path: str, config: QuantConfig) -> tuple[tuple[str, Any, str], ...]:
    """`SiteReport.rules` of a site."""
    return tuple((name, getattr(rule, name), rule.pattern) for name, rule in rules_at(site, path, config).items())


def replace_sites(stage: nnx.Module, modules: dict[str, nnx.Module]) -> nnx.Module:
    """A copy of a float stage, or model, with copies of `modules` at their paths."""
    low = nnx.clone(stage)
    for path, module in modules.items():
        # The modules may hold variables of the stage they were made from, such as its biases.
        set_module(low, path, nnx.clone(module))
    return low


def apply_in_batches(stage: nnx.Module, x: Array, batch_size: int) -> Array:
    """The stage's output on x (N, ...), batches spread over all devices."""
    graphdef, state = nnx.split(stage)
    return in_batches(partial(apply_stage, graphdef), state, x, batch_size)
