"""Levels of a stage's weights by GPTQ, from what enters its quantised layers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.ops.weight_rounding import gptq_round
from ouromamba_jax.quantize.activation import SiteSpec
from ouromamba_jax.quantize.capture import each_batch
from ouromamba_jax.quantize.kinds import StageCalibration, install_fakes
from ouromamba_jax.quantize.linear import FakeLinear
from ouromamba_jax.quantize.sites import iter_sites, set_module

Moments = dict[str, Float32[Array, "K K"]]


def with_levels(
    stage: nnx.Module, specs: dict[str, SiteSpec], calibrated: StageCalibration, x: Array, batch_size: int
) -> StageCalibration:
    """`calibrated` with a `QTensor` for every linear layer's "weight", its levels by `gptq_round`.

    Args:
      stage: in float.
      calibrated: scales as calibration found them.
      x: (N, ...), the stage's input, as the quantised stages before it make it.
    """
    graphdef, state = nnx.split(stage)
    moments: Moments = {}
    for of_batch in each_batch(partial(_moments, graphdef, tuple(specs.items())), (state, calibrated), x, batch_size):
        moments = {path: new + moments.get(path, 0) for path, new in of_batch.items()}
    kernels, made = {path: layer.kernel[...] for path, layer in _linears(stage)}, dict(calibrated)
    for path, summed in moments.items():
        scale, config = calibrated[path]["weight"], specs[path].config
        levels = gptq_round(kernels[path], scale, summed, bits=config.weight_bits)
        weight = QTensor(levels, scale, bits=config.weight_bits, group=config.weight_group)
        made[path] = {**calibrated[path], "weight": weight}
    return made


def _linears(stage: nnx.Module) -> list[tuple[str, nnx.Linear]]:
    return [(path, site) for path, site in iter_sites(stage) if isinstance(site, nnx.Linear)]


class _Recorder:
    """Calls the layer it stands for and sums the second moments of what enters its product."""

    def __init__(self, layer: FakeLinear, path: str, moments: Moments):
        self.layer, self.path, self.moments = layer, path, moments

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... O"]:
        rows = self.layer.rounded(x).astype(jnp.float32).reshape(-1, x.shape[-1])
        moments = jnp.matmul(rows.T, rows, precision="highest")
        self.moments[self.path] = moments + self.moments.get(self.path, 0)
        return self.layer(x)


@partial(jax.jit, static_argnums=(0, 1))
def _moments(graphdef: Any, specs: Any, arrays: tuple[nnx.State, StageCalibration], x: Array) -> Moments:
    """Of one batch, by the paths of the linear layers."""
    state, calibrated = arrays
    stage, found = nnx.merge(graphdef, state), dict(specs)
    fakes = {path: FakeLinear(layer, found[path], calibrated[path]) for path, layer in _linears(stage) if path in found}
    moments: Moments = {}
    stage = install_fakes(stage, found, calibrated)
    for path, fake in fakes.items():
        set_module(stage, path, _Recorder(fake, path, moments))
    stage(x)
    return moments
