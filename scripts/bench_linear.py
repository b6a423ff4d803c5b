"""Quantised against float32 linear layers of Vim-Base on CPU, `split_outliers` included.

    python scripts/bench_linear.py [--batch 4] [--repeats 15] [--json scripts/results/bench_linear_cpu.json]

Takes half a minute on two CPU cores. How much int8 products gain is the processor's: 5 to 9 times with AMX, 2.5 times
with AVX512-VNNI, 1.2 times with AVX2 alone. 16-bit outliers take a second one.

One jitted function per entry; the fastest of the interleaved repeats counts, so that all entries of a row saw the same
machine. Activations are Gaussian with 1 % of heavy channels.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ouromamba_jax.evaluation.bench import time_interleaved, write_results
from ouromamba_jax.ops.matmul import outlier_matmul
from ouromamba_jax.ops.qtensor import quantize_array
from ouromamba_jax.ops.split import OutlierConfig
from ouromamba_jax.ops.split_calibration import calibrate

TOKENS = 197
LAYERS = {"in_proj": (768, 3072), "x_proj": (1536, 80), "dt_proj": (48, 1536), "out_proj": (1536, 768)}
PER_BLOCK = {"in_proj": 1, "x_proj": 2, "dt_proj": 2, "out_proj": 1}
BITS = {
    "W4A4 O8": (4, 4, 8),
    "W6A6 O8": (6, 6, 8),
    "W8A8 O8": (8, 8, 8),
    "W4A8 O16": (4, 8, 16),
    "W8A8 O16": (8, 8, 16),
}


def quantized_layer(weight, calibration, config):
    return jax.jit(lambda x: outlier_matmul(calibration.split(x, config), weight))


def fastest(functions, x, repeats: int) -> np.ndarray:
    """Milliseconds of each function's fastest run, runs interleaved: (2, functions), wall-clock and processor time."""
    calls = {str(i): partial(function, x) for i, function in enumerate(functions)}
    timings = time_interleaved(calls, repeats=repeats).values()
    return 1e3 * np.asarray([[min(t.seconds) for t in timings], [min(t.cpu_seconds) for t in timings]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the numbers, the machine and the command to this file")
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    totals = np.zeros((2, 1 + len(BITS)))
    rows = []
    print(f"batch {arguments.batch} x {TOKENS} tokens; milliseconds, in brackets the speed-up over float32")
    print(f"{'':10}{'float32':>9}" + "".join(f"{name:>18}" for name in BITS) + "   outliers (W4A4)")
    for name, (inputs, outputs) in LAYERS.items():
        heavy = np.where(rng.random(inputs) < 0.01, 10, 1)
        x = jnp.asarray((heavy * rng.normal(size=(arguments.batch, TOKENS, inputs))).astype(np.float32))
        w = jnp.asarray((rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)).astype(np.float32))
        functions = [jax.jit(lambda x, w=w: x @ w)]
        rate = ""
        for weight_bits, act_bits, outlier_bits in BITS.values():
            config = OutlierConfig(act_bits=act_bits, outlier_bits=outlier_bits)
            calibration = calibrate(x, config)
            functions.append(quantized_layer(quantize_array(w, weight_bits), calibration, config))
            rate = rate or f"{float(calibration.split(x, config).listed().mean()):.1%}"
        times = fastest(functions, x, arguments.repeats)
        totals += PER_BLOCK[name] * times
        rows.append(record(name, times))
        print(row(name, times[0]) + f"   {rate}")
    rows.append(record("block", totals))
    print(row("block", totals[0]) + "   (x_proj and dt_proj twice)")
    print(row("block, CPU", totals[1]) + "   (processor time, summed over threads)")
    if arguments.json is not None:
        write_results(arguments.json, {"batch": arguments.batch, "tokens": TOKENS, "rows": rows})
        print(f"wrote {arguments.json}")


def row(name: str, times: np.ndarray) -> str:
    cells = "".join(f"{t:>10.2f} ({times[0] / t:4.2f}x)" for t in times[1:])
    return f"{name:10}{times[0]:>9.2f}{cells}"


def record(name: str, times: np.ndarray) -> dict:
    """One layer's wall-clock and processor milliseconds, and their ratios float32 / quantised."""
    names = ("float32", *BITS)
    entry = {"layer": name}
    for kind, values in zip(("ms", "cpu_ms"), times, strict=True):
        entry[kind] = {n: round(float(t), 4) for n, t in zip(names, values, strict=True)}
        entry[kind.replace("ms", "speed_up")] = {
            n: round(float(values[0] / t), 3) for n, t in zip(BITS, values[1:], strict=True)
        }
    return entry


if __name__ == "__main__":
    main()
