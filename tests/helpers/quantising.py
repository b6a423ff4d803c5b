"""A tiny Vim, its calibration images, and its quantised versions, made once per process."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from draws import heavy_tailed
from flax import nnx
from tiny_models import TINY, natural_model

from ouromamba_jax import QuantConfig, quantize
from ouromamba_jax.ops.split_calibration import Calibration
from ouromamba_jax.quantize.run import calibrate_sites
from ouromamba_jax.quantize.sites import iter_sites, resolve_sites
from ouromamba_jax.quantize.stages import StageInputs


def images(key: int = 0, count: int = 6) -> jax.Array:
    return heavy_tailed(key, (count, 12, 16, 3))


@cache
def float_model() -> nnx.Module:
    return natural_model("vim_micro", **TINY)


@cache
def quantised(name: str, **fields: Any):
    """(model, report) of a preset."""
    return quantize(float_model(), images(), QuantConfig.preset(name, **fields))


def bits_of(model: nnx.Module) -> dict[tuple, bytes]:
    return {path: np.asarray(leaf[...]).tobytes() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def calibrated(module: nnx.Module, x: jax.Array, config: QuantConfig, *, shifted: bool = False):
    """(specs, what calibration found, what entered the sites) of a stage or model, its steps made too small.

    `shifted`: outliers get a second byte at every site, by shifts at random.
    """
    configs = resolve_sites(module, config)
    inputs = StageInputs("", module, x, x, configs, len(x))
    specs, found = calibrate_sites(module, inputs)
    seen = inputs.captured
    rng = np.random.default_rng(0)

    def spoil(leaf):
        if not isinstance(leaf, Calibration):
            return 0.9 * leaf
        shift = jnp.asarray(rng.integers(0, 9, leaf.scale.shape), jnp.int8) if shifted else leaf.shift
        return Calibration(0.6 * leaf.scale, leaf.theta, shift, leaf.channels)

    return specs, jax.tree.map(spoil, found, is_leaf=lambda leaf: isinstance(leaf, Calibration)), seen


@cache
def stage_problem(name: str, operands: tuple[str, ...]):
    """(stage, specs, what calibration found, input, target) of a stage of the tiny Vim."""
    x = images(1)
    for stage_name, stage in float_model().stages:
        out = stage(x)
        if stage_name == name:
            bits = 8 if name in ("stem", "head") else 4
            specs, found, _ = calibrated(stage, x, QuantConfig(operands=operands, act_bits=bits, scale_search="max"))
            return stage, specs, found, x, out
        x = out
    raise KeyError(name)


def module_at(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def linears_of(model: nnx.Module) -> dict[str, nnx.Linear]:
    return {path: site for path, site in iter_sites(model) if isinstance(site, nnx.Linear)}
