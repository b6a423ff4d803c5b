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
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ouromamba_jax.data.preprocessing import height_width
from ouromamba_jax.files import write_json
from ouromamba_jax.models import VisionModel, build_model, pure
from ouromamba_jax.ops import matmul
from ouromamba_jax.ops import scan as scans
from ouromamba_jax.ops import split as outliers
from ouromamba_jax.quantize import QuantConfig, quantize
from ouromamba_jax.quantize.kinds import quantized_specs

Progress = Callable[[str], None]
_VERSIONED = ("jax", "jaxlib", "flax", "optax", "numpy", "ouromamba_jax")
HEADERS = ("model", "ms", "spread %", "CPU ms", "images/s", "speed-up", "CPU speed-up")


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
    """A function of `operation`'s inputs that runs it so often, each run waiting for the last, in one compiled loop.

    The compiler cannot merge them. Launching a program takes a GPU about as long as many a kernel runs.
    """

    def run(inputs: tuple) -> Any:
        def again(_: Any, out: Any) -> Any:
            held, _ = lax.optimization_barrier((inputs, out))
            return operation(*held)

        return lax.fori_loop(1, times, again, operation(*inputs))

    return jax.jit(run)


@contextmanager
def preferring(implementation: str) -> Iterator[None]:
    """While it lasts, calls that name no backend take this one if it supports them: so models run on the kernels.

    It counts when a function is traced. JAX's caches are cleared on entry and exit, since compiled functions keep
    their choice; what `lower().compile()` returned keeps it, too, and stays valid.

    Raises:
      ValueError: if no operation has such a backend.
    """
    tables = (outliers.BACKENDS, matmul.BACKENDS, scans.BACKENDS)
    if not any(implementation in table for table in tables):
        raise ValueError(
            f"no operation has an implementation {implementation!r}; choose one of {', '.join(tables[1])}."
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


def models_to_compare(
    model: VisionModel, bits: tuple[str, ...] = ("w8a8", "w4a4"), *, progress: Progress | None = None
) -> dict[str, VisionModel]:
    """The float model and quantised ones, by name, float first.

    A float model is quantised at `bits`, presets of `QuantConfig` (untuned: speed does not depend on how good scales
    are). A quantised one gets a fresh float model of its config beside it.

    Args:
      progress: called with a short text before each slow step.
    """
    say = progress or (lambda text: None)
    if quantized_specs(model):
        say("building the float model")
        return {"float": build_model(model.config, dtype=model.dtype), "quantised": model}
    models = {"float": model}
    for name in bits:
        say(f"quantising to {name}")
        models[name] = quantize_untuned(model, name)
    return models


def time_models(models: Mapping[str, VisionModel], batch_size: int, *, repeats: int = 10) -> dict[str, Timing]:
    """Interleaved timings under `jax.jit` of models that take the same Gaussian images, by name."""
    images = random_images(next(iter(models.values())), batch_size)

    def call(model: VisionModel) -> Callable[[], Array]:
        fn, state = pure(model)
        return partial(jax.jit(fn), state, images)

    return time_interleaved({name: call(model) for name, model in models.items()}, repeats=repeats)


def speed_rows(timings: Mapping[str, Timing], batch_size: int) -> list[list[str | float]]:
    """Table rows under `HEADERS`; the speed-up is over the first entry."""
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
        ]
        for name, t in timings.items()
    ]


def quantize_untuned(model: VisionModel, preset: str) -> VisionModel:
    """`model` at a preset's bits, calibrated on one Gaussian image: fit to be timed, not to be used."""
    config = QuantConfig.preset(preset, tune_epochs=0, scale_search="max")
    return quantize(model, random_images(model, 1, seed=1), config)[0]


def random_images(model: VisionModel, batch_size: int, *, seed: int = 0) -> Float[Array, "B H W 3"]:
    """Gaussian images of the model's input size."""
    return jax.random.normal(jax.random.key(seed), (batch_size, *height_width(model.config.img_size), 3))
