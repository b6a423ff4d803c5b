"""Which parts of a model take the time: of its middle block part by part, or of all of it by kind of work."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.evaluation.bench import Progress, random_images, repeated, time_interleaved
from ouromamba_jax.models import VisionModel
from ouromamba_jax.models.base import apply_stage
from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.quantize import QuantLinear, QuantSelectiveScan
from ouromamba_jax.quantize.operand import QuantOperand
from ouromamba_jax.quantize.sites import set_module

BREAKDOWN_HEADERS = ("part", "ms", "% of block", "of it splitting, ms")
KINDS = ("detection + split", "product", "scan", "rest")
_PARTS = (nnx.Linear, QuantLinear, SelectiveScan)


def block_breakdown(model: VisionModel, batch_size: int = 1, *, repeats: int = 10) -> list[list[str | float | None]]:
    """Where the middle block of a model spends its time, as table rows under `BREAKDOWN_HEADERS`.

    Every linear layer and the scan are timed alone on what they receive inside the block, interleaved with the whole
    block. The splitting of outliers is timed alone, too. "rest" is what the block takes beyond its parts; alone, parts
    cannot fuse with their surroundings, so it may come out below zero.
    """
    stages = [stage for _, stage in model.stages]
    *before, block = stages[: len(stages) // 2 + 1]
    x = random_images(model, batch_size)
    for stage in before:
        x = apply_stage(*nnx.split(stage), x)
    parts = _part_inputs(block, x, _PARTS)
    calls: dict[str, Callable[[], Any]] = {"block": _jitted(block, x)}
    for path, (module, args) in parts.items():
        calls[path] = _jitted(module, *args)
        if (splitting := _splitting(module)) is not None:
            calls[path + " splitting"] = _jitted(module, *args, method=splitting)
    milliseconds = {name: 1e3 * t.median for name, t in time_interleaved(calls, repeats=repeats).items()}
    whole = milliseconds["block"]
    rows = [(path, milliseconds[path], milliseconds.get(path + " splitting")) for path in parts]
    splits = [split for _, _, split in rows if split is not None]
    rows.append(("rest", whole - sum(ms for _, ms, _ in rows), None))
    rows.append(("block", whole, sum(splits) if splits else None))
    return [[path, ms, 100 * ms / whole, split] for path, ms, split in rows]


def model_breakdown(
    model: VisionModel, batch_size: int, *, inner: int = 20, repeats: int = 10, progress: Progress | None = None
) -> dict[str, float]:
    """Milliseconds that a whole model spends on each of `KINDS`.

    Stages of equal structure are timed once, each part alone on what it receives there, `inner` times per call. What
    a linear layer, scan or rounded tensor takes beyond its splitting is its product or scan; what a stage takes
    beyond its parts is the rest. Alone, parts cannot fuse with their surroundings, so the rest may be below zero.
    """
    total = dict.fromkeys(KINDS, 0.0)
    for path, stage, x, count in _distinct_stages(model, batch_size):
        if progress is not None:
            progress(f"timing {path}, one of {count}")
        parts = _part_inputs(stage, x, (*_PARTS, QuantOperand))
        operations = {"stage": _functional(stage, x)}
        for name, (module, args) in parts.items():
            operations[name] = _functional(module, *args)
            if (splitting := _splitting(module)) is not None:
                operations[name + " splitting"] = _functional(module, *args, method=splitting)
        calls = {name: partial(repeated(function, inner), inputs) for name, (function, inputs) in operations.items()}
        timings = time_interleaved(calls, repeats=repeats)
        milliseconds = {name: 1e3 * timing.median / inner for name, timing in timings.items()}
        times = dict.fromkeys(KINDS, 0.0)
        for name, (module, _) in parts.items():
            split = milliseconds.get(name + " splitting", 0.0)
            kind = "scan" if isinstance(module, SelectiveScan) else "product"
            kind = "detection + split" if isinstance(module, QuantOperand) else kind
            times["detection + split"] += split
            times[kind] += milliseconds[name] - split
        times["rest"] = milliseconds["stage"] - sum(times.values())
        total = {kind: total[kind] + count * times[kind] for kind in KINDS}
    return total


def _distinct_stages(model: VisionModel, batch_size: int) -> list[tuple[str, nnx.Module, Array, int]]:
    """(path, stage, its input, how many stages are like it), for the first of each structure."""
    found: dict[Any, tuple[str, nnx.Module, Array, int]] = {}
    x = random_images(model, batch_size)
    for path, stage in model.stages:
        graphdef, state = nnx.split(stage)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((state, x)))
        key = (graphdef, shapes)
        first, module, inputs, count = found.get(key, (path, stage, x, 0))
        found[key] = (first, module, inputs, count + 1)
        x = apply_stage(graphdef, state, x)
    return list(found.values())


def _functional(module: nnx.Module, *args: Array, method: Callable = lambda m, *a: m(*a)) -> tuple[Callable, tuple]:
    """A pure function, and its inputs: the module's state, and `args`."""
    graphdef, state = nnx.split(module)
    return lambda state, *args: method(nnx.merge(graphdef, state), *args), (state, *args)


def _jitted(module: nnx.Module, *args: Array, **method: Callable) -> Callable[[], Any]:
    function, inputs = _functional(module, *args, **method)
    return partial(jax.jit(function), *inputs)


def _splitting(module: nnx.Module) -> Callable[..., Any] | None:
    """What finds and splits off the outliers of a part's inputs; None for a float part."""
    if isinstance(module, QuantLinear):
        return lambda m, x: m.split(x)
    if isinstance(module, QuantSelectiveScan):
        return _split_operands
    return None


def _split_operands(scan: QuantSelectiveScan, *operands: Float[Array, "B L G C"]) -> list[Any]:
    named = zip(("u", "delta", "B", "C"), operands, strict=True)
    return [scan.round_operand(name, x) for name, x in named if name in scan.act]


class _Recorder:
    """Calls the module it stands for and keeps what went in."""

    def __init__(self, module: nnx.Module):
        self.module = module
        self.args: tuple[Array, ...] = ()

    def __call__(self, *args: Array) -> Any:
        self.args = args
        return self.module(*args)


def _part_inputs(
    block: nnx.Module, x: Array, kinds: tuple[type, ...]
) -> dict[str, tuple[nnx.Module, tuple[Array, ...]]]:
    """{path: (module, its arguments)} of every module of these kinds that the block calls on x."""
    graphdef, state = nnx.split(block)

    @jax.jit
    def run(state: nnx.State, x: Array) -> dict[str, tuple[Array, ...]]:
        copy = nnx.merge(graphdef, state)
        recorders = {path: _Recorder(module) for path, module in _parts(copy, kinds).items()}
        for path, recorder in recorders.items():
            set_module(copy, path, recorder)
        copy(x)
        return {path: recorder.args for path, recorder in recorders.items() if recorder.args}

    modules = _parts(block, kinds)
    return {path: (modules[path], args) for path, args in run(state, x).items()}


def _parts(block: nnx.Module, kinds: tuple[type, ...]) -> dict[str, nnx.Module]:
    return {".".join(map(str, path)): m for path, m in nnx.iter_modules(block) if isinstance(m, kinds)}
