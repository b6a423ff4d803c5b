"""The GPU kernels at the published models' shapes: against XLA, cuBLAS in bf16, and the device's limits.

    python scripts/bench_kernels.py --json scripts/results/bench_kernels_h100.json     # needs an NVIDIA GPU
    python scripts/bench_kernels.py --only split matmul                                # only these operations
    python scripts/bench_kernels.py --dry-run                                          # shapes and limits, anywhere

Not run on a GPU yet: no time and no number is known. The goals: `linear` at (768, 3072) at least 1.6x cuBLAS and 2x
XLA on an H100; `scan` within 1.4x of its limit and 20x XLA; `scan backward` at most 3x `scan`.

A limit is the longest of what any implementation must do: read its inputs and write its outputs once, multiply on
tensor cores, take exponentials (16 per clock and multiprocessor), all at datasheet peaks. Every operation runs
`--inner` times in one compiled loop, in which each waits for the last; operations take turns, and a ratio is the median
over rounds. "int4" is the published split on 4-bit tensor cores, which Hopper lacks. Activations are bfloat16 and
Gaussian with 1 % of heavy channels, weights have 4 bits.

Before a case is timed, the kernel's results are compared with XLA's: "unequal" counts the integers that differ,
"off by ppm" is the largest difference of floats, in millionths of the largest float of the same array. A case that
fails is recorded with its error and the run goes on; the numbers are written after every case.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ouromamba_jax.evaluation.bench import Timing, repeated, time_interleaved, time_ratio, write_results
from ouromamba_jax.ops.matmul import BACKENDS, outlier_matmul, prepare
from ouromamba_jax.ops.qtensor import quantize_array
from ouromamba_jax.ops.scan import selective_scan
from ouromamba_jax.ops.split import OutlierConfig, split_outliers
from ouromamba_jax.ops.split_calibration import calibrate
from ouromamba_jax.report.tables import print_table

OURS, INT4, XLA, CUBLAS = "mosaic_gpu", "mosaic_gpu_int4", "xla", "cublas bf16"
CONFIG = OutlierConfig(act_bits=4, outlier_bits=8)


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without."""

    bytes: float
    int8: float = 0
    exponentials: float = 0


@dataclass(frozen=True)
class Device:
    """Datasheet peaks per second, `exponentials` at the boost clock, of what JAX calls `kind`."""

    kind: str
    bytes: float
    int8: float
    exponentials: float

    def limit(self, work: Work) -> tuple[float, str]:
        """Shortest possible time in seconds, and what sets it."""
        names = ("bytes", "int8", "exponentials")
        return max((getattr(work, name) / getattr(self, name), name) for name in names)


DEVICES = {
    "H200": Device("NVIDIA H200", 4.8e12, 1979e12, 16 * 132 * 1.98e9),
    "H100": Device("NVIDIA H100 80GB HBM3", 3.35e12, 1979e12, 16 * 132 * 1.98e9),
    "H100 PCIe": Device("NVIDIA H100 PCIe", 2.039e12, 1513e12, 16 * 114 * 1.755e9),
    "A100": Device("NVIDIA A100-SXM4-80GB", 2.039e12, 624e12, 16 * 108 * 1.41e9),
    "L40S": Device("NVIDIA L40S", 0.864e12, 733e12, 16 * 142 * 2.52e9),
}


@dataclass(frozen=True)
class Scan:
    """One call of the scan: all directions of a layer, its channels counted over all of them."""

    model: str
    tokens: int
    channels: int
    states: int
    groups: int
    backward: bool = False
    operation = "scan"

    def shape(self, batch: int) -> str:
        pass_ = "backward " if self.backward else ""
        return f"{pass_}({batch}, {self.tokens}, {self.channels}, {self.states}) in {self.groups}"

    def work(self, batch: int) -> Work:
        """Forward: u, delta and y. Backward: u, delta, dy and two gradients. B, C, and dB, dC besides."""
        tokens, passes = batch * self.tokens, 2 if self.backward else 1
        wide, narrow = (5, 4) if self.backward else (3, 2)
        values = tokens * (wide * self.channels + narrow * self.groups * self.states)
        return Work(2 * values, exponentials=passes * tokens * self.channels * self.states)

    def calls(self, batch: int) -> dict[str, tuple[Callable, tuple]]:
        keys = iter(jax.random.split(jax.random.key(0), 8))

        def normal(*shape, dtype=jnp.float32):
            return jax.random.normal(next(keys), shape, dtype)

        def tokens(*shape):
            return normal(batch, self.tokens, *shape, dtype=jnp.bfloat16)

        A, D = -jnp.exp(0.5 * normal(self.channels, self.states)), normal(self.channels)
        u, delta = tokens(self.channels), tokens(self.channels) - 2
        inputs = (u, delta, A, tokens(self.groups, self.states), tokens(self.groups, self.states), D)

        def forward(implementation):
            return lambda *x: selective_scan(*x, delta_softplus=True, implementation=implementation).y

        calls = {name: (forward(name), inputs) for name in (OURS, XLA)}
        return {name: pull_back(*call) for name, call in calls.items()} if self.backward else calls


@dataclass(frozen=True)
class Layer:
    """A linear layer of K inputs and O outputs, or the splitting of its input, or both in one."""

    model: str
    operation: str
    tokens: int
    K: int
    O: int = 0

    def shape(self, batch: int) -> str:
        return f"({batch * self.tokens}, {self.K})" + (f" x ({self.K}, {self.O})" if self.O else "")

    def work(self, batch: int) -> Work:
        """x and y in bfloat16; a byte for each level."""
        rows = batch * self.tokens
        entries = {"split": 3, "matmul": 1, "linear": 2}[self.operation]
        out = self.K * self.O + 2 * rows * self.O
        return Work(entries * rows * self.K + out, int8=2 * rows * self.K * self.O)

    def calls(self, batch: int) -> dict[str, tuple[Callable, tuple]]:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(batch, self.tokens, self.K)) * np.where(rng.random(self.K) < 0.01, 8, 1)
        x = jnp.asarray(x, jnp.bfloat16)
        found = calibrate(x[:1], CONFIG)

        def levels(name, x, found):
            options = {"theta": found.theta, "shift": found.shift, "implementation": XLA if name == XLA else OURS}
            return split_outliers(x, found.scale, CONFIG, **options)

        if self.operation == "split":
            return {name: (partial(levels, name), (x, found)) for name in (OURS, XLA)}
        float_weight = jnp.asarray(rng.normal(size=(self.K, self.O)), jnp.float32)
        weight = quantize_array(float_weight, 4)

        def matmul(name):
            return lambda split, weight: outlier_matmul(split, weight, dtype=jnp.bfloat16, implementation=name)

        def linear(name):
            return lambda x, found, weight: matmul(name)(levels(name, x, found), weight)

        like = jax.eval_shape(partial(levels, XLA), x, found)
        weights = {OURS: prepare(like, weight, jnp.bfloat16), XLA: weight}  # as models keep them
        if BACKENDS[INT4].supports(like, weight, None, jnp.dtype(jnp.bfloat16)) is None:
            weights[INT4] = weight
        if self.operation == "matmul":
            calls = {name: (matmul(name), (levels(name, x, found), weight)) for name, weight in weights.items()}
        else:
            calls = {name: (linear(name), (x, found, weight)) for name, weight in weights.items()}
        return {**calls, CUBLAS: (jnp.matmul, (x.reshape(-1, self.K), float_weight.astype(jnp.bfloat16)))}


SCANS = [
    ("vim_tiny", 197, 768, 16, 2),
    ("vim_small", 197, 1536, 16, 2),
    ("vim_base", 197, 3072, 16, 2),
    ("vmamba_tiny", 3136, 384, 1, 4),
    ("vmamba_tiny", 784, 768, 1, 4),
    ("vmamba_tiny", 196, 1536, 1, 4),
    ("vmamba_tiny", 49, 3072, 1, 4),
    ("mambavision_t", 196, 160, 8, 1),
]
LAYERS = [
    ("vim_tiny", 197, 192, 768),
    ("vim_small", 197, 384, 1536),
    ("vim_base", 197, 768, 3072),
    ("vim_base", 197, 1536, 768),
    ("vmamba_tiny", 196, 384, 1536),
    ("mambavision_t", 196, 320, 1280),
]
CASES: list[Scan | Layer] = [
    *(Scan(*shape, backward=backward) for backward in (False, True) for shape in SCANS),
    *(Layer(model, "split", tokens, K) for model, tokens, K, _ in LAYERS),
    *(Layer(model, name, tokens, K, O) for name in ("matmul", "linear") for model, tokens, K, O in LAYERS),
]


def pull_back(function: Callable, inputs: tuple) -> tuple[Callable, tuple]:
    """The backward pass alone: what the forward pass leaves is its input."""
    y, back = jax.jit(lambda *x: jax.vjp(function, *x))(*inputs)
    return lambda back, dy: back(dy), (back, y)


def measure(case: Scan | Layer, batch: int, inner: int, repeats: int) -> tuple[dict[str, Timing], int, float]:
    """Timings of `inner` executions by contender, and how far our results are from XLA's (see `difference`)."""

    def call(operation, inputs):
        compiled = repeated(operation, inner)
        return lambda: compiled(inputs)

    calls = {name: call(*operation) for name, operation in case.calls(batch).items()}
    reference = calls[XLA]()
    unequal, off = zip(*(difference(calls[name](), reference) for name in (OURS, INT4) if name in calls), strict=True)
    return time_interleaved(calls, repeats=repeats), max(unequal), max(off)


def difference(ours: Any, reference: Any) -> tuple[int, float]:
    """How many entries are other integers or not finite in one alone; millionths by which floats differ, as above."""
    unequal, off = 0, 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        floating = jnp.issubdtype(b.dtype, jnp.floating)
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        finite = np.isfinite(a) & np.isfinite(b)
        unequal += int(np.sum(np.isfinite(a) != np.isfinite(b) if floating else a != b))
        if floating:
            largest = np.abs(b[finite]).max(initial=np.finfo(np.float32).tiny)
            off = max(off, 1e6 * float(np.abs(a - b)[finite].max(initial=0) / largest))
    return unequal, off


def limits(case: Scan | Layer, batch: int) -> list[Any]:
    work = case.work(batch)
    return [case.model, case.operation, case.shape(batch), work.bytes / 1e6, work.int8 / 1e9, work.exponentials / 1e9]


LIMIT_HEADERS = ("model", "operation", "shape", "MB", "int8 Gop", "G exp")
TIME_HEADERS = (
    "ours us",
    "int4 us",
    "xla us",
    "cublas us",
    "limit us",
    "set by",
    "ours / limit",
    "xla / ours",
    "cublas / ours",
)
HEADERS = (*LIMIT_HEADERS, *TIME_HEADERS, "unequal", "off by ppm")


def dry_run(cases: list[Scan | Layer], batch: int) -> list[list[Any]]:
    """Each case's work, and its limit in microseconds on every device."""
    return [
        limits(case, batch) + [1e6 * device.limit(case.work(batch))[0] for device in DEVICES.values()] for case in cases
    ]


def bench(case: Scan | Layer, batch: int, inner: int, repeats: int) -> list[Any]:
    """A row under HEADERS."""
    kind = jax.devices()[0].device_kind
    device = next((device for device in DEVICES.values() if device.kind == kind), None)
    timings, *apart = measure(case, batch, inner, repeats)
    us = {name: 1e6 * timing.median / inner for name, timing in timings.items()}
    limit, bound = device.limit(case.work(batch)) if device else (None, None)
    ratios = [time_ratio(timings[name], timings[OURS]) if name in timings else None for name in (XLA, CUBLAS)]
    times = [*(us.get(name) for name in (OURS, INT4, XLA, CUBLAS)), limit and 1e6 * limit, bound]
    return limits(case, batch) + times + [limit and us[OURS] / (1e6 * limit), *ratios, *apart]


def run(cases: list[Scan | Layer], arguments: argparse.Namespace) -> int:
    """Measures case by case; whatever fails, the others' numbers are printed and written."""
    rows, failed = [], []
    for case in cases:
        name = f"{case.model} {case.operation} {case.shape(arguments.batch)}"
        try:
            rows.append(bench(case, arguments.batch, arguments.inner, arguments.repeats))
            print(f"{name}: {rows[-1][len(LIMIT_HEADERS)]:.1f} us", file=sys.stderr, flush=True)
        except Exception as error:
            failed.append({"case": name, "error": f"{type(error).__name__}: {error}"})
            print(f"{name} failed: {traceback.format_exc()}", file=sys.stderr, flush=True)
        if arguments.json is not None:
            results = {"batch": arguments.batch, "headers": HEADERS, "rows": rows, "failed": failed}
            write_results(arguments.json, results)
    print_table(rows, HEADERS, title=f"batch {arguments.batch}")
    if arguments.json is not None:
        print(f"wrote {arguments.json}")
    if failed:
        print(f"{len(failed)} of {len(cases)} cases failed: {', '.join(f['case'] for f in failed)}", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    operations = sorted({case.operation for case in CASES})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--inner", type=int, default=20, help="executions per timed call (default: 20)")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each contender (default: 20)")
    parser.add_argument("--only", nargs="+", choices=operations, default=operations, help="these operations")
    parser.add_argument("--model", default="", help="only models whose name holds this")
    parser.add_argument("--dry-run", action="store_true", help="only the shapes and their limits")
    parser.add_argument("--json", type=Path, help="also write the numbers, the machine and the command to this file")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.operation in arguments.only and arguments.model in case.model]
    if not cases:
        parser.error(f"no case of a model named {arguments.model!r}: --dry-run prints all of them.")
    if arguments.dry_run:
        print_table(dry_run(cases, arguments.batch), (*LIMIT_HEADERS, *(f"{name} us" for name in DEVICES)))
        return 0
    if jax.devices()[0].platform != "gpu":
        print(
            "These kernels need an NVIDIA GPU, and JAX sees none here: --dry-run prints their limits.", file=sys.stderr
        )
        return 1
    return run(cases, arguments)


if __name__ == "__main__":
    sys.exit(main())
