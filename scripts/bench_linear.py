"""Quantised against float32 linear layers of Vim-Base on CPU, `split_outliers` included.

    python scripts/bench_linear.py [--batch 4] [--repeats 15]

Takes about a minute on two CPU cores. Expected with AVX512-VNNI: W4A4 with 8-bit outliers has in_proj 2.8x, out_proj
1.9x and a whole block 2x as fast as float32; W6A6 and W8A8 with 8-bit outliers 1.2-1.5x (outliers beyond the int8 range
of the inlier step need a second product). x_proj is slower: its 80 outputs do not repay a pass over 1536 inputs.
16-bit outliers are slower than float32 on this data (0.7x): Gaussian tails list most channels somewhere in a sample,
so that the compacted product does not fit and the dense float product is taken.

One jitted function per entry; the fastest of the interleaved repeats counts, so that all entries of a row saw the same
machine. Activations are Gaussian with 1 % of heavy channels; scales come from `search_token_scales`.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from ouromamba_jax.matmul import outlier_matmul
from ouromamba_jax.outliers import OutlierConfig, outlier_statistics, search_token_scales, split_outliers
from ouromamba_jax.qtensor import quantize_array

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


def quantized_layer(weight, scale, config):
    return jax.jit(lambda x: outlier_matmul(split_outliers(x, scale, config), weight))


def fastest(functions, x, repeats: int) -> list[float]:
    """Milliseconds of each function's fastest run, runs interleaved."""
    for function in functions:
        function(x).block_until_ready()
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function(x).block_until_ready()
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    totals = np.zeros(1 + len(BITS))
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
            scale = search_token_scales(x, config)
            functions.append(quantized_layer(quantize_array(w, weight_bits), scale, config))
            stats = outlier_statistics(split_outliers(x, scale, config))
            rate = rate or f"{stats.rate:.1%}, j > 0 in {stats.shifted_rows:.1%} of tokens"
        times = np.asarray(fastest(functions, x, arguments.repeats))
        totals += PER_BLOCK[name] * times
        print(row(name, times) + f"   {rate}")
    print(row("block", totals) + "   (x_proj and dt_proj twice)")


def row(name: str, times: np.ndarray) -> str:
    cells = "".join(f"{t:>10.2f} ({times[0] / t:4.2f}x)" for t in times[1:])
    return f"{name:10}{times[0]:>9.2f}{cells}"


if __name__ == "__main__":
    main()
