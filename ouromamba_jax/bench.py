"""Speed of models: interleaved timing, float beside quantised, and which parts of a block take the time.

Only ratios within one run mean something on a shared machine: the calls under comparison take turns, and a speed-up is
the median over rounds of the ratio of neighbouring calls, so that a slow second hits both sides. Processor time, summed
over threads, is measured beside wall-clock time: other processes hardly touch it.
"""

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.models import VisionModel, build_model, pure
from ouromamba_jax.models.config import height_width
from ouromamba_jax.models.layers import SelectiveScan, as_tokens
from ouromamba_jax.quantize import QuantConfig, QuantLinear, QuantSelectiveScan, quantize
from ouromamba_jax.quantize.modules import quantized_specs, set_module

Progress = Callable[[str], None]
HEADERS = ("model", "ms", "spread %", "CPU ms", "images/s", "speed-up", "CPU speed-up")
BREAKDOWN_HEADERS = ("part", "ms", "% of block", "of it splitting, ms")


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


def machine() -> dict[str, str]:
    """What timings depend on: processor, JAX devices, versions."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        cpu = next((s.split(":")[1].strip() for s in cpuinfo.read_text().splitlines() if "model name" in s), cpu)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"cpu": cpu, "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}", **versions}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes JSON: the command of the running script, the machine, and `results`."""
    script = Path(sys.argv[0])
    command = " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "machine": machine(), **results}, indent=1) + "\n")


def bench_model(
    model: VisionModel,
    batch_size: int = 1,
    *,
    bits: tuple[str, ...] = ("w8a8", "w4a4"),
    repeats: int = 10,
    progress: Progress | None = None,
) -> tuple[list[list[str | float]], tuple[str, ...]]:
    """Times a model under `jax.jit` on Gaussian images: float first, quantised beside it.

    A float model is also quantised at `bits` (scales from the range of the weights and from one image, untuned: speed
    does not depend on how good they are). A quantised one is compared with a fresh float model of its config.

    Args:
      model: float or quantised.
      batch_size: images per call.
      bits: presets of `QuantConfig` that a float model is compared at.
      repeats: timed calls of each model.
      progress: called with a short text before each slow step.

    Returns:
      (rows, headers) for `report.print_table`; the speed-up is over the first row.
    """
    say = progress or (lambda text: None)
    if quantized_specs(model):
        say("building the float model")
        models = {"float": build_model(model.config, dtype=model.dtype), "quantised": model}
    else:
        models = {"float": model}
        for name in bits:
            say(f"quantising to {name}")
            models[name] = quantize_untuned(model, name)
    say(f"compiling and timing {', '.join(models)}")
    return speed_rows(time_models(models, batch_size, repeats=repeats), batch_size), HEADERS


def time_models(models: Mapping[str, VisionModel], batch_size: int, *, repeats: int = 10) -> dict[str, Timing]:
    """Interleaved timings of models that take the same images, by name."""
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


def block_breakdown(model: VisionModel, batch_size: int = 1, *, repeats: int = 10) -> list[list[str | float | None]]:
    """Where the middle block of a model spends its time, as table rows under `BREAKDOWN_HEADERS`.

    Every linear layer and the scan are timed alone on what they receive inside the block, interleaved with the whole
    block. The splitting of outliers is timed alone, too. "rest" is what the block takes beyond its parts; alone, parts
    cannot fuse with their surroundings, so it may come out below zero.
    """
    stages = [stage for _, stage in model.stages]
    middle = len(stages) // 2

    @jax.jit
    def until_block(images: Array) -> Array:
        x = images
        for stage in stages[:middle]:
            x = stage(x)
        return x

    block = stages[middle]
    x = until_block(random_images(model, batch_size))
    parts = _part_inputs(block, x)
    calls: dict[str, Callable[[], Any]] = {"block": _jitted(block, x)}
    for path, (module, args) in parts.items():
        calls[path] = _jitted(module, *args)
        if isinstance(module, QuantLinear):
            calls[path + " splitting"] = _jitted(module, *args, method=lambda m, a: m.act.split(as_tokens(a)))
        elif isinstance(module, QuantSelectiveScan):
            calls[path + " splitting"] = _jitted(module, *args, method=lambda m, *a: m.operands(*a))
    milliseconds = {name: 1e3 * t.median for name, t in time_interleaved(calls, repeats=repeats).items()}
    whole = milliseconds["block"]
    rows = [(path, milliseconds[path], milliseconds.get(path + " splitting")) for path in parts]
    splitting = [split for _, _, split in rows if split is not None]
    rows.append(("rest", whole - sum(ms for _, ms, _ in rows), None))
    rows.append(("block", whole, sum(splitting) if splitting else None))
    return [[path, ms, 100 * ms / whole, split] for path, ms, split in rows]


def _jitted(module: nnx.Module, *args: Array, method: Callable = lambda m, *a: m(*a)) -> Callable[[], Any]:
    graphdef, state = nnx.split(module)
    return partial(jax.jit(lambda state, *args: method(nnx.merge(graphdef, state), *args)), state, *args)


class _Recorder:
    """Calls the module it stands for and keeps what went in."""

    def __init__(self, module: nnx.Module):
        self.module = module
        self.args: tuple[Array, ...] = ()

    def __call__(self, *args: Array) -> Any:
        self.args = args
        return self.module(*args)


def _part_inputs(block: nnx.Module, x: Array) -> dict[str, tuple[nnx.Module, tuple[Array, ...]]]:
    """{path: (module, its arguments)} of every linear layer and scan that the block calls on x."""
    graphdef, state = nnx.split(block)

    @jax.jit
    def run(state: nnx.State, x: Array) -> dict[str, tuple[Array, ...]]:
        copy = nnx.merge(graphdef, state)
        recorders = {path: _Recorder(module) for path, module in _parts(copy).items()}
        for path, recorder in recorders.items():
            set_module(copy, path, recorder)
        copy(x)
        return {path: recorder.args for path, recorder in recorders.items() if recorder.args}

    modules = _parts(block)
    return {path: (modules[path], args) for path, args in run(state, x).items()}


def _parts(block: nnx.Module) -> dict[str, nnx.Module]:
    kinds = (nnx.Linear, QuantLinear, SelectiveScan)
    return {".".join(map(str, path)): m for path, m in nnx.iter_modules(block) if isinstance(m, kinds)}
