"""Bytes that a model's operations read and write on a GPU, from its compiled program; no GPU is needed.

    pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION    # VERSION of the installed jax, 150 MB
    python scripts/gpu_traffic.py --model vim_base --depth 1 --bits bf16 w8a8 w4a4

Takes a minute on two CPU cores, ten for VMamba-T. Every kernel, and every fusion of XLA's, is a pass over its operands
and results. Those are counted whole, also where only a slice is read or a cache holds them; XLA may fuse otherwise with
a GPU at hand, by whose times it then chooses. Apart stand those that kernels leave alone while no token's outliers need
a larger step than its inliers (0.0 % do: scripts/outlier_columns.py). For Vim-B as above: 707 MB in bf16, 863 at W8A8,
751 at W4A4. So a quantised model multiplies faster but moves more: finding outliers is a pass of its own over what
every layer reads. "limit" is what the bytes alone take at the datasheet's bandwidth; nothing here was timed.

Weights are Gaussian. `--depth` leaves so many blocks (per stage), beside stem and head.
"""

import argparse
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

# JAX reads them when it is imported.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from bench_model import FLOAT, gpu_models, shortened
from compile_kernels import DEVICES, compiling_for

from ouromamba_jax.data.preprocessing import height_width
from ouromamba_jax.evaluation.bench import write_results
from ouromamba_jax.models import VisionModel, pure
from ouromamba_jax.quantize.modules import prepare_weights
from ouromamba_jax.report.tables import print_table

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
SHAPE = re.compile(rf"\b({'|'.join(WIDTHS)})\[([\d,]*)\]")
ALIAS = re.compile(r"^\s+%(\S+) = \S+ (get-tuple-element|bitcast)\(%([\w.-]+)\)(?:, index=(\d))?")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) (fusion|custom-call|copy|convolution)\((.*?)\)")
HEADERS = ("bits", "MB", "in kernels, MB", "kernels", "other operations", "limit, ms", "if all tokens shift, MB")


class Operation(NamedTuple):
    """One pass over memory; `if_shifted` are bytes of outliers on larger steps, beside the others."""

    name: str
    bytes: int
    if_shifted: int
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
    found, splits, far = [], set(), set()
    for line in entry.splitlines():
        if match := ALIAS.match(line):
            name, _, of, index = match.groups()
            if of in far or (of in splits and index == "1"):
                far.add(name)
        elif match := INSTRUCTION.match(line):
            name, result, _, operands = match.groups()
            read = re.findall(r"%([\w.-]+)", operands)
            total = shape_bytes(result) + sum(shape_bytes(shapes.get(operand, "")) for operand in read)
            kernel, rare = 'custom_call_target="mosaic_gpu' in line, 0
            if kernel:
                rare = sum(shape_bytes(shapes[operand]) for operand in read if operand in far)
            if kernel and "outlier_split_planes" in line:
                splits.add(name)
                rare += shape_bytes([shape.group() for shape in SHAPE.finditer(result)][1])
            found.append(Operation(name, total - rare, rare, kernel, result))
    return found


def compiled(model: VisionModel, target: str, batch: int) -> str:
    """The program of `model` on `target`, in HLO text."""
    capability = "{}.{}".format(*DEVICES[target].capability)
    gpu = SimpleNamespace(platform="gpu", compute_capability=capability)
    with mock.patch("ouromamba_jax.pallas.device.default_device", return_value=gpu):
        prepare_weights(model)  # here: what is computed within `compiling_for` would run on that GPU
    function, state = pure(model)
    images = jax.ShapeDtypeStruct((batch, *height_width(model.config.img_size), 3), "float32")
    with compiling_for(target) as sharding:
        specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (state, images))
        return jax.jit(function).lower(*specs).compile().as_text()


def row(bits: str, found: list[Operation], bandwidth: float) -> list:
    """A row under HEADERS; the limit is that of memory alone."""
    total = sum(operation.bytes for operation in found)
    kernels = [operation for operation in found if operation.is_kernel]
    inside = sum(operation.bytes for operation in kernels)
    counts = len(kernels), len(found) - len(kernels)
    shifted = total + sum(operation.if_shifted for operation in found)
    return [bits, total / 1e6, inside / 1e6, *counts, 1e3 * total / bandwidth, shifted / 1e6]


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
    parser.add_argument("--bits", nargs="+", default=[FLOAT, "w8a8", "w4a4"], help=f"{FLOAT}, or presets")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--target", choices=DEVICES, default="h100")
    parser.add_argument("--top", type=int, default=0, help="also print the largest operations")
    parser.add_argument("--json", type=Path, help="also write the numbers and the command to this file")
    arguments = parser.parse_args()
    presets = [bits for bits in arguments.bits if bits != FLOAT]
    models = gpu_models(arguments.model, presets, **shortened(arguments.model, arguments.depth))
    rows = []
    for bits in arguments.bits:
        found = operations(compiled(models[bits], arguments.target, arguments.batch))
        rows.append(row(bits, found, DEVICES[arguments.target].bandwidth))
        if arguments.top:
            print_table(largest(found, arguments.top), ("operation", "MB", "times"), title=f"{bits}: the largest")
    title = f"{arguments.model}, depth {arguments.depth or 'whole'}, batch {arguments.batch}, {arguments.target}"
    print_table(rows, HEADERS, title=title)
    if arguments.json:
        facts = dict(model=arguments.model, depth=arguments.depth, batch=arguments.batch, target=arguments.target)
        write_results(arguments.json, dict(**facts, headers=HEADERS, rows=rows))


if __name__ == "__main__":
    main()
