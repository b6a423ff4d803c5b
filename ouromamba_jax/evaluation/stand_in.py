"""Float and quantised models of random values, ready at once since nothing is compiled: to be timed, not used."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ouromamba_jax.data.preprocessing import image_shape
from ouromamba_jax.models import VisionModel, build_model, create_model
from ouromamba_jax.quantize import QuantConfig
from ouromamba_jax.quantize.activation import SiteSpec
from ouromamba_jax.quantize.capture import capture
from ouromamba_jax.quantize.kinds import apply_specs, prepare_weights
from ouromamba_jax.quantize.sites import resolve_sites


def stand_in(name: str, **overrides: Any) -> VisionModel:
    """`create_model` with Gaussian weights."""
    return with_random_values(nnx.eval_shape(lambda: create_model(name, **overrides)))


def float_stand_in(model: VisionModel) -> VisionModel:
    """A float model of `model`'s config and type, with Gaussian weights."""
    return with_random_values(nnx.eval_shape(lambda: build_model(model.config, dtype=model.dtype)))


def quantised_stand_in(model: VisionModel, config: QuantConfig) -> VisionModel:
    """What `quantize` would make of `model`, by its shapes; its levels are uniform, its scales all the same."""
    specs = find_specs(model, config)
    low: Any = nnx.eval_shape(lambda: apply_specs(build_model(model.config, dtype=model.dtype), specs))
    for _, leaf in nnx.to_flat_state(nnx.state(low, nnx.Param)):
        leaf.set_value(jax.ShapeDtypeStruct(leaf.shape, config.float_dtype))
    low = with_random_values(low)
    prepare_weights(low)
    return low


def find_specs(model: VisionModel, config: QuantConfig) -> dict[str, SiteSpec]:
    """Every site that `config` quantises, with the shape of what enters it; nothing is computed."""
    configs, specs = resolve_sites(model, config), {}
    x = jax.ShapeDtypeStruct((1, *image_shape(model.config)), jnp.float32)
    for name, stage in model.stages:
        prefix = f"{name}."
        local = {path.removeprefix(prefix): c for path, c in configs.items() if path.startswith(prefix)}
        x, seen = jax.eval_shape(partial(capture, stage, configs=local, batch_size=1), x)
        for path, entered in seen.items():
            first = entered["u"] if "u" in entered else entered["input"]
            specs[prefix + path] = SiteSpec(local[path], tokens=first.shape[1], channels=first.shape[-1])
    return specs


def with_random_values[Module: nnx.Module](model: Module) -> Module:
    """`model` with its leaves filled, in place: matrices keep the size of what they multiply, states decay."""
    rng = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        shape, dtype = leaf.shape, leaf.dtype
        if jnp.issubdtype(dtype, jnp.integer):
            limit = 2 ** (leaf.get_metadata("bits", 8) - 1) - 1
            value = rng.integers(-limit, limit, shape, np.int8, endpoint=True)
            value = -np.abs(value) if path[-1] == "A" else value
        elif isinstance(leaf, nnx.Param) and len(shape) > 1:
            value = rng.standard_normal(shape, np.float32) / math.sqrt(math.prod(shape[:-1]))
        else:
            constant = 1.0 if isinstance(leaf, nnx.Param) else 0.1
            value = np.full(shape, 0.0 if jnp.issubdtype(dtype, bool) else constant, np.float32)
        leaf.set_value(jnp.asarray(value, dtype))
    return model
