"""Bytes that a model's blocks read and write on a GPU, from their compiled program; no GPU is needed.

    pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION    # VERSION of the installed jax, 150 MB
    python scripts/gpu_traffic.py --model vim_base --bits bf16 w8a8 w8a8o8 w4a4

Takes one to ten minutes on two CPU cores. Our kernels are compiled without their bodies, which change none of their
operands and results (`compile_kernels.py` compiles those). Every kernel, and every fusion of XLA's, is a pass over its
operands and results. Those are counted whole, also where only a slice is read or a cache holds them; XLA may fuse
otherwise with a GPU at hand, by whose times it then chooses. Stem and head are left out. "limit" is what the bytes
alone take at the datasheet's bandwidth; nothing here was timed.

"w8a8o8" is w8a8 with 8-bit outliers; no activation is given a second byte for 8-bit outliers, as calibration may do.
`--depth` leaves so many blocks (per stage).
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

# JAX reads them when it is imported.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from bench_model import FLOAT, gpu_models, shortened
from compile_kernels import DEVICES, compiling_for
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from ouromamba_jax.data.preprocessing import image_shape
from ouromamba_jax.evaluation.bench import random_images, write_results
from ouromamba_jax.models import VisionModel
from ouromamba_jax.ops.qtensor import quantize_with_scale, search_weight_scale
from ouromamba_jax.quantize import QuantConfig, QuantLinear, quantize
from ouromamba_jax.quantize.activation import SiteSpec
from ouromamba_jax.quantize.kinds import apply_specs, prepare_weights, quantized_specs
from ouromamba_jax.quantize.sites import iter_sites
from ouromamba_jax.report.tables import print_table

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
SHAPE = re.compile(rf"\b({'|'.join(WIDTHS)})\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) (fusion|custom-call|copy|convolution)\((.*?)\)")
HEADERS = ("bits", "MB", "of bf16", "in kernels, MB", "kernels", "other operations", "limit, ms")


class Operation(NamedTuple):
    """One pass over memory."""

    name: str
    bytes: int
    is_kernel: bool
    result: str


def shape_bytes(text: str) -> int:
    """Of all arrays whose shapes the text names: "f32[2,3]{1,0}", or a tuple of such."""
    total = 0
    for kind, sizes in SHAPE.findall(text):
        count = WIDTHS[kind]
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += count
    return total


def operations(program: str) -> list[Operation]:
    """The passes over memory of a compiled program in HLO text, its entry computation's alone."""
    entry = program[program.index("\nENTRY ") :]
    shapes = dict(re.findall(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) [\w-]+\(", entry, re.MULTILINE))
    found = []
    for line in entry.splitlines():
        if match := INSTRUCTION.match(line):
            name, result, _, operands = match.groups()
            read = sum(shape_bytes(shapes.get(operand, "")) for operand in re.findall(r"%([\w.-]+)", operands))
            kernel = 'custom_call_target="mosaic_gpu' in line
            if kernel and (title := re.search(r'op_name="[^"]*/(\w+)/\w+"', line)):
                result = f"{title.group(1)} {result}"
            found.append(Operation(name, shape_bytes(result) + read, kernel, result))
    return found


def without_body(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`plgpu.kernel`, which then makes kernels of the same names, operands and results that do nothing."""

    def make(body: Callable[..., None], *, scratch_types: Any = (), **options: Any) -> Any:
        def nothing(*refs: Any) -> None:
            pass

        nothing.__name__ = body.__name__
        return kernel(nothing, **options)

    return make


def compiled(model: VisionModel, target: str, batch: int) -> str:
    """The program of the blocks of `model` on `target`, in HLO text."""
    capability = "{}.{}".format(*DEVICES[target].capability)
    gpu = SimpleNamespace(platform="gpu", compute_capability=capability)
    with mock.patch("ouromamba_jax.pallas.device.default_device", return_value=gpu):
        prepare_weights(model)  # here: what is computed within `compiling_for` would run on that GPU
    (_, stem), *blocks, _ = model.stages
    images = jax.ShapeDtypeStruct((batch, *image_shape(model.config)), "float32")
    x = jax.eval_shape(lambda images: stem(images), images)
    definitions, states = zip(*(nnx.split(block) for _, block in blocks), strict=True)

    def run(states, x):
        for definition, state in zip(definitions, states, strict=True):
            x = nnx.merge(definition, state)(x)
        return x

    bodiless = mock.patch.object(plgpu, "kernel", without_body(plgpu.kernel))
    with bodiless, compiling_for(target) as sharding:
        specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (states, x))
        return jax.jit(run).lower(*specs).compile().as_text()


def quantised(model: VisionModel, bits: str, like: dict[str, SiteSpec]) -> VisionModel:
    """A copy at "w8a8" or "w8a8o8" with the sites of `like` and the model's weights; what is calibrated, of zeros."""
    preset, *outliers = bits.split("o")
    config = QuantConfig.preset(preset, **({"outlier_bits": int(outliers[0])} if outliers else {}))
    config = replace(config, float_dtype="bfloat16")
    settings = {path: config.resolve(path) for path in like}
    specs = {path: replace(spec, config=settings[path], two_bytes=()) for path, spec in like.items()}
    low, kernels = apply_specs(nnx.clone(model), specs), dict(iter_sites(model))
    for path, module in nnx.iter_modules(low):
        if isinstance(module, QuantLinear):  # whose levels decide whether one accumulator holds two bytes
            kernel, bits = kernels[".".join(map(str, path))].kernel[...], module.spec.config.weight_bits
            weight = quantize_with_scale(kernel, search_weight_scale(kernel, bits, search=False), bits)
            module.levels.set_value(weight.values)
    return low


def sites(model: VisionModel) -> dict[str, SiteSpec]:
    """What is quantised of the model, calibrated on one Gaussian image."""
    config = QuantConfig.preset("w8a8", outlier_bits=8, tune_epochs=0, scale_search="max")
    return quantized_specs(quantize(model, random_images(model, 1, seed=1), config)[0])


def row(bits: str, found: list[Operation], bandwidth: float, of_float: float | None) -> list:
    """A row under HEADERS; the limit is that of memory alone."""
    total = sum(operation.bytes for operation in found)
    kernels = [operation for operation in found if operation.is_kernel]
    inside = sum(operation.bytes for operation in kernels)
    share = None if of_float is None else total / of_float
    return [bits, total / 1e6, share, inside / 1e6, len(kernels), len(found) - len(kernels), 1e3 * total / bandwidth]


def largest(found: list[Operation], count: int) -> list[list]:
    """[operation, MB, how many], those of equal bytes and results as one row, the largest sum first."""
    sums: Counter[str] = Counter()
    many: Counter[str] = Counter()
    for operation in found:
        kind = "kernel" if operation.is_kernel else re.sub(r"[.\d]+$", "", operation.name)
        text = f"{kind} {operation.result}"[:100]
        sums[text] += operation.bytes
        many[text] += 1
    return [[text, size / 1e6, many[text]] for text, size in sums.most_common(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_base", help="a name of list_models() (default: vim_base)")
    parser.add_argument("--depth", type=int, help="at most so many blocks (per stage); all of them if left out")
    bits = [FLOAT, "w8a8", "w8a8o8", "w4a4"]
    parser.add_argument("--bits", nargs="+", default=bits, help=f"{FLOAT}, or presets, with o8 for 8-bit outliers")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--target", choices=DEVICES, default="h100")
    parser.add_argument("--top", type=int, default=0, help="also print the largest operations")
    parser.add_argument("--json", type=Path, help="also write the numbers and the command to this file")
    arguments = parser.parse_args()
    model = gpu_models(arguments.model, [], **shortened(arguments.model, arguments.depth))[FLOAT]
    rows, of_float, like = [], None, sites(model)
    for bits in arguments.bits:
        made = model if bits == FLOAT else quantised(model, bits, like)
        found = operations(compiled(made, arguments.target, arguments.batch))
        if bits == FLOAT:
            of_float = sum(operation.bytes for operation in found)
        rows.append(row(bits, found, DEVICES[arguments.target].bandwidth, of_float))
        if arguments.top:
            print_table(largest(found, arguments.top), ("operation", "MB", "times"), title=f"{bits}: the largest")
    title = f"{arguments.model}, depth {arguments.depth or 'whole'}, batch {arguments.batch}, {arguments.target}"
    print_table(rows, HEADERS, title=title)
    if arguments.json:
        facts = dict(model=arguments.model, depth=arguments.depth, batch=arguments.batch, target=arguments.target)
        write_results(arguments.json, dict(**facts, headers=HEADERS, rows=rows))


if __name__ == "__main__":
    main()
