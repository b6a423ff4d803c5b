"""What every site of a stage sees on the calibration images."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.kinds import kind_of
from ouromamba_jax.quantize.sites import iter_sites, set_module
from ouromamba_jax.sharding import data_mesh, on_one_device, replicate, split_samples

Captured = dict[str, dict[str, Array]]
"""{site: {name: activation}}: "input" (B, L, C) of a linear layer or marked tensor, (B, L, G, C) per scan operand."""


class _Recorder:
    """Calls the site it stands for and keeps what went in, of several calls as more samples."""

    def __init__(self, path: str, site: Any, config: QuantConfig, seen: dict[str, Array]):
        self.path, self.site, self.config, self.seen = path, site, config, seen

    def __call__(self, *args: Array) -> Any:
        out, entered = kind_of(self.site).record(self.site, self.config, *args)
        for name, x in entered.items():
            before = self.seen.get(name)
            if before is not None and before.shape[1] != x.shape[1]:
                raise ValueError(
                    f"{self.path} is used at {before.shape[1]} and at {x.shape[1]} tokens per sample, and a token has "
                    "one scale: give each use a copy of its own (nnx.clone), or leave it in float by a rule."
                )
            self.seen[name] = x if before is None else jnp.concatenate([before, x])
        return out


@partial(jax.jit, static_argnums=(0, 1))
def _capture_batch(graphdef: Any, configs: tuple[tuple[str, QuantConfig], ...], state: nnx.State, x: Array):
    stage = nnx.merge(graphdef, state)
    modules = dict(iter_sites(stage))
    captured: Captured = {path: {} for path, _ in configs}
    for path, config in configs:
        set_module(stage, path, _Recorder(path, modules[path], config, captured[path]))
    out = stage(x)
    if unused := [path for path, seen in captured.items() if not seen]:
        raise ValueError(f"no forward pass uses {unused[0]}: remove it, or leave it in float by a rule.")
    return out, captured


def captured_batches(
    stage: nnx.Module, x: Array, configs: dict[str, QuantConfig], batch_size: int
) -> Iterator[tuple[Array, Captured]]:
    """(the stage's output, what entered every site of `configs`) of one batch of x (N, ...) after the other."""
    graphdef, state = nnx.split(stage)
    sites = tuple((path, _what_to_record(config)) for path, config in configs.items())
    return each_batch(partial(_capture_batch, graphdef, sites), state, x, batch_size)


def capture(stage: nnx.Module, x: Array, configs: dict[str, QuantConfig], batch_size: int) -> tuple[Array, Captured]:
    """The stage's output on x (N, ...), and what entered every site of `configs`, of all batches."""
    return _joined(captured_batches(stage, x, configs, batch_size))


def each_batch(function: Callable[[Any, Array], Any], state: Any, x: Array, batch_size: int) -> Iterator[Any]:
    """function(state, x) of one batch of x (N, ...) after the other, each spread over all devices; its arrays on one.

    A batch is finished before the next begins, so that no more than one takes memory.
    """
    mesh = data_mesh(min(batch_size, len(x)))
    state = replicate(mesh, state) if mesh.size > 1 else state
    for i in range(0, len(x), batch_size):
        part = x[i : i + batch_size]
        if mesh.size > 1:
            part = split_samples(mesh, part) if len(part) % mesh.size == 0 else replicate(mesh, part)
        made = function(state, part)
        yield jax.block_until_ready(on_one_device(mesh, made) if mesh.size > 1 else made)


def in_batches(function: Callable[[nnx.State, Array], Any], state: nnx.State, x: Array, batch_size: int) -> Any:
    """function(state, x) of x (N, ...), as `each_batch` makes it."""
    return _joined(each_batch(function, state, x, batch_size))


def _joined(parts: Iterable[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _what_to_record(config: QuantConfig) -> QuantConfig:
    """A config that agrees with this one in its operands alone: one compilation serves all bits."""
    return QuantConfig(operands=config.operands)
