"""What every site of a stage sees on the calibration images."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.kinds import kind_of
from ouromamba_jax.quantize.sites import iter_sites, set_module

Captured = dict[str, dict[str, Array]]
"""{site: {name: activation}}: "input" (B, L, C) of a linear layer or marked tensor, (B, L, G, C) per scan operand."""


class _Recorder:
    """Calls the site it stands for and keeps what went in."""

    def __init__(self, site: Any, config: QuantConfig, seen: dict[str, Array]):
        self.site, self.config, self.seen = site, config, seen

    def __call__(self, *args: Array) -> Any:
        out, seen = kind_of(self.site).record(self.site, self.config, *args)
        self.seen.update(seen)
        return out


@partial(jax.jit, static_argnums=(0, 1))
def _capture_batch(graphdef: Any, configs: tuple[tuple[str, QuantConfig], ...], state: nnx.State, x: Array):
    stage = nnx.merge(graphdef, state)
    modules = dict(iter_sites(stage))
    captured: Captured = {path: {} for path, _ in configs}
    for path, config in configs:
        set_module(stage, path, _Recorder(modules[path], config, captured[path]))
    return stage(x), captured


def capture(stage: nnx.Module, x: Array, configs: dict[str, QuantConfig], batch_size: int) -> tuple[Array, Captured]:
    """The stage's output on x (N, ...), and what entered every site of `configs`, in batches."""
    graphdef, state = nnx.split(stage)
    sites = tuple((path, _what_to_record(config)) for path, config in configs.items())
    parts = [_capture_batch(graphdef, sites, state, x[i : i + batch_size]) for i in range(0, len(x), batch_size)]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _what_to_record(config: QuantConfig) -> QuantConfig:
    """A config that agrees with this one in its operands alone: one compilation serves all bits."""
    return QuantConfig(operands=config.operands)
