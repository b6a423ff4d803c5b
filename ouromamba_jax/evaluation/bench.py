"""Speed of models: interleaved timing, float beside quantised. Which parts take the time: `breakdown.py`.

Only ratios within one run mean something on a shared machine: the calls under comparison take turns, and a speed-up is
the median over rounds of the ratio of neighbouring calls, so that a slow second hits both sides. Processor time, summed
over threads, is measured beside wall-clock time: other processes hardly touch it.
"""

import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ouromamba_jax.data.preprocessing import image_shape
from ouromamba_jax.evaluation.evaluate import StageRunner
from ouromamba_jax.evaluation.limit import with_bare_products
from ouromamba_jax.evaluation.stand_in import float_stand_in, quantised_stand_in
from ouromamba_jax.files import write_json
from ouromamba_jax.models import VisionModel
from ouromamba_jax.ops import matmul, producers
from ouromamba_jax.ops import scan as scans
from ouromamba_jax.ops import split as outliers
from ouromamba_jax.quantize import QuantConfig
from ouromamba_jax.quantize.kinds import quantized_specs

_VERSIONED = ("jax", "jaxlib", "flax", "optax", "numpy", "ouromamba_jax")
HEADERS = ("model", "ms", "spread %", "CPU ms", "images/s", "speed-up", "CPU speed-up", "of limit")


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one call and the processor's (summed over threads), one entry per round."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(high - low) / self.median


def time_interleaved(calls: Mapping[str, Callable[[], Any]], *, repeats: int = 10) -> dict[str, Timing]:
    """Times functions of no arguments in turns, after one untimed call of each (which compiles).

    Args:
      calls: by name; each returns a pytree of arrays, which is waited for.
      repeats: rounds; in each, every function is called once.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}.")
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            cpu_seconds[name].append(time.process_time() - cpu_start)
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(seconds[name]), tuple(cpu_seconds[name])) for name in calls}


def time_ratio(slow: Timing, fast: Timing, *, cpu: bool = False) -> float:
    """How many times longer `slow` took than `fast`: the median over rounds of one `time_interleaved`.

    Args:
      cpu: compare processor time instead of wall-clock time.
    """
    if cpu:
        return float(np.median(np.divide(slow.cpu_seconds, fast.cpu_seconds)))
    return float(np.median(np.divide(slow.seconds, fast.seconds)))


def repeated(operation: Callable[..., Any], times: int) -> Callable[[Any], Any]:
    """A function of `operation`'s inputs that runs it so often, one run after the other, in one compiled loop.

    Launching a program takes a GPU about as long as many a kernel runs. Every run would change the first entry of each
    input if the last one's result exceeded infinity. No compiler can rule that out, so it merges, hoists or skips none.
    """

    def run(inputs: tuple, infinity: Array) -> Any:
        def again(_: Any, carry: Any) -> Any:
            inputs, seen, _ = carry
            # XLA on CPUs would copy the inputs to fuse the update of one entry into what reads them.
            inputs = lax.optimization_barrier(jax.tree.map(partial(_reset_first, seen > infinity), inputs))
            out = lax.optimization_barrier(operation(*inputs))
            return inputs, _first_entries(out), out

        out = operation(*inputs)
        return lax.fori_loop(1, times, again, (inputs, _first_entries(out), out))[2]

    compiled = jax.jit(run)
    return lambda inputs: compiled(inputs, jnp.float32(jnp.inf))


def _reset_first(condition: Array, x: Array) -> Array:
    """x, its first entry zero where `condition` holds."""
    if not x.size:
        return x
    first = (0,) * x.ndim
    return x.at[first].set(jnp.where(condition, jnp.zeros_like(x[first]), x[first]))


def _first_entries(tree: Any) -> Float[Array, ""]:
    """The sum of the first entries of all arrays."""
    firsts = [x[(0,) * x.ndim].astype(jnp.float32) for x in jax.tree.leaves(tree) if x.size]
    return sum(firsts, jnp.float32(0))


@contextmanager
def preferring(implementation: str) -> Iterator[None]:
    """While it lasts, calls that name no backend take this one if it supports them: so models run on the kernels.

    It counts when a function is traced. JAX's caches are cleared on entry and exit, since compiled functions keep
    their choice; what `lower().compile()` returned keeps it, too, and stays valid.

    Raises:
      ValueError: if no operation has such a backend.
    """
    tables = (outliers.BACKENDS, producers.BACKENDS, matmul.BACKENDS, scans.BACKENDS)
    if not any(implementation in table for table in tables):
        raise ValueError(
            f"no operation has an implementation {implementation!r}; choose one of {', '.join(matmul.BACKENDS)}."
        )
    before = [dict(table) for table in tables]

    def fill(orders: list[dict]) -> None:
        for table, order in zip(tables, orders, strict=True):
            table.clear()
            table.update(order)
        jax.clear_caches()

    fill([dict(sorted(table.items(), key=lambda item: item[0] != implementation)) for table in before])
    try:
        yield
    finally:
        fill(before)


def machine() -> dict[str, str]:
    """What results depend on: processor, JAX devices, versions."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        cpu = next((s.split(":")[1].strip() for s in cpuinfo.read_text().splitlines() if "model name" in s), cpu)
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"cpu": cpu, "devices": devices, "python": platform.python_version(), **versions}


def provenance() -> dict[str, Any]:
    """Where a file of numbers comes from: the command of the running script, and `machine()`. Names no folder of it."""
    script, *arguments = sys.argv
    names = (Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments)
    return {"command": shlex.join(["python", "/".join(Path(script).parts[-2:]), *names]), "machine": machine()}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes JSON: `provenance()` and `results`."""
    write_json(path, {**provenance(), **results})


COMPARED = {
    "w8a8": QuantConfig.preset("w8a8"),
    "w8a8, 8-bit outliers": QuantConfig.preset("w8a8", outlier_bits=8),
    "w4a4": QuantConfig.preset("w4a4"),
}


def models_to_compare(model: VisionModel, configs: Mapping[str, QuantConfig] = COMPARED) -> dict[str, VisionModel]:
    """The float model and quantised ones, by name, float first.

    Beside a float model stand ones of random levels, quantised as `configs` say: speed does not depend on the levels.
    Beside a quantised one stands a float model of its config and of random weights.
    """
    if quantized_specs(model):
        return {"float": float_stand_in(model), "quantised": model}
    return {"float": model, **{name: quantised_stand_in(model, config) for name, config in configs.items()}}


def time_models(models: Mapping[str, VisionModel], batch_size: int, *, repeats: int = 10) -> dict[str, Timing]:
    """Interleaved timings of models that take the same Gaussian images, by name.

    They run as in `evaluate`: stage by stage under `jax.jit`, the samples of a batch spread over the devices.
    """
    images = random_images(next(iter(models.values())), batch_size)
    runners = {name: StageRunner(model, batch_size) for name, model in models.items()}
    calls = {name: partial(runner.run, runner.place(images)) for name, runner in runners.items()}
    return time_interleaved(calls, repeats=repeats)


def compare_speed(
    models: Mapping[str, VisionModel], batch_size: int, *, repeats: int = 10
) -> list[list[str | float | None]]:
    """Table rows under `HEADERS` of models, and how near each quantised one is to its limit (`with_bare_products`)."""
    limits = {name: f"{name}, limit" for name, model in models.items() if quantized_specs(model)}
    bare = {limit: with_bare_products(models[name]) for name, limit in limits.items()}
    return speed_rows(time_models({**models, **bare}, batch_size, repeats=repeats), batch_size, limits=limits)


def speed_rows(
    timings: Mapping[str, Timing], batch_size: int, *, limits: Mapping[str, str] | None = None
) -> list[list[str | float | None]]:
    """Table rows under `HEADERS`; the speed-up is over the first entry.

    Args:
      limits: {name: name of the timing that is its limit}; the limits get no rows of their own.
    """
    limits = limits or {}
    first = next(iter(timings.values()))
    return [
        [
            name,
            1e3 * t.median,
            100 * t.spread,
            1e3 * float(np.median(t.cpu_seconds)),
            batch_size / t.median,
            time_ratio(first, t),
            time_ratio(first, t, cpu=True),
            time_ratio(timings[limits[name]], t) if name in limits else None,
        ]
        for name, t in timings.items()
        if name not in limits.values()
    ]


def random_images(model: VisionModel, batch_size: int, *, seed: int = 0) -> Float[Array, "B H W I"]:
    """Gaussian images of the model's input size."""
    return jax.random.normal(jax.random.key(seed), (batch_size, *image_shape(model.config)))
