"""Bytes on disk of a quantised model against FP16 (two bytes per parameter).

    python scripts/memory.py [--models vim_small vim_base] [--bits w4a4] [--json scripts/results/memory.json]

Takes two minutes on two CPU cores and 1.6 GB. Expected at W4A4: raw 3.54x (vim_small) and 3.76x (vim_base); on disk
4.10x (12.57 MB) and 4.36x (44.82 MB). The files are smaller than the tensors because Orbax compresses them: Gaussian
weights rounded to 15 levels have less than 4 bits of entropy.

Weights are Gaussian, and constant initial values (A, D, norms, biases) are spread by noise, so that the compression of
the files finds nothing that a trained model lacks. Scales come from the default search, on one random image; tuning
would change their values, not their number. "raw" counts tensors without compression, "on disk" every file that
`ouromamba_jax.save` writes, the config included.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import ouromamba_jax as oj
from ouromamba_jax.evaluation.bench import random_images, write_results
from ouromamba_jax.report.tables import print_table

HEADERS = ("model", "parameters, M", "FP16, MB", "raw, MB", "raw, times", "on disk, MB", "on disk, times")
BARS = {"vim_small": 3.63, "vim_base": 3.80}
"""What the paper reports for W4A4."""


def with_gaussian_weights(model: nnx.Module, key: jax.Array) -> nnx.Module:
    """Matrices become Gaussian with the spread they have; every other parameter gets 10 % of noise, at least 0.01."""
    for i, (_, leaf) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        value = leaf[...]
        noise = jax.random.normal(jax.random.fold_in(key, i), value.shape, value.dtype)
        constant = value.ndim == 1 or bool(jnp.all(value == value[:1]))
        leaf.set_value(value + noise * jnp.maximum(0.1 * jnp.abs(value), 0.01) if constant else noise * value.std())
    return model


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(name: str, bits: str) -> tuple[list, oj.MemoryReport]:
    model = oj.create_model(name)
    model = with_gaussian_weights(model, jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    config = oj.QuantConfig.preset(bits, tune_epochs=0)
    quantised, _ = oj.quantize(model, random_images(model, 1), config)
    memory = oj.memory_report(quantised)
    with tempfile.TemporaryDirectory() as folder:
        oj.save(Path(folder) / name, quantised)
        disk = disk_bytes(Path(folder) / name)
    fp16 = 2 * parameters
    row = [
        name,
        parameters / 1e6,
        fp16 / 1e6,
        memory.total / 1e6,
        fp16 / memory.total,
        disk / 1e6,
        fp16 / disk,
    ]
    return row, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BARS), choices=oj.list_models(), metavar="NAME")
    parser.add_argument("--bits", default="w4a4", help="a preset of QuantConfig (default: w4a4)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        start = time.perf_counter()
        row, memory = measure(name, arguments.bits)
        rows.append(row)
        bar = f"; the paper: {BARS[name]}x" if arguments.bits == "w4a4" and name in BARS else ""
        print(f"{name}, raw: {memory}{bar} ({time.perf_counter() - start:.0f} s)", flush=True)
    print_table(rows, HEADERS, title=arguments.bits)
    if arguments.json:
        write_results(arguments.json, dict(bits=arguments.bits, headers=HEADERS, rows=rows))


if __name__ == "__main__":
    main()
