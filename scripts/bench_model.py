"""Whole models on CPU: our scan against the associative_scan formulation, and quantised against float.

    python scripts/bench_model.py associative --model vim_tiny --batch 4
    python scripts/bench_model.py quantised --model vim_base --batch 2 --json scripts/results/bench_model_cpu.json

`associative` times a model against the same model on `jax.lax.associative_scan` (the usual parallel formulation in
JAX, which holds (B, L, D, N) arrays). `quantised` times a float model against its W8A8 and W4A4 versions, and then
says which parts of one block take the time. Without a name both run. Weights are random and images Gaussian; models
take turns and the ratios are medians over rounds, so that other work on the machine hits all of them.

On two busy CPU cores `associative` took one to three minutes and `quantised` nine to sixteen (mostly compiling).
Measured there by processor time: vim_tiny 3.8x faster than on associative_scan; vim_base 1.1x as fast as float at W8A8
and 1.3x at W4A4 (16-bit outliers take a second int8 product). Trained models have other outliers.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ouromamba_jax.bench import (
    BREAKDOWN_HEADERS,
    HEADERS,
    block_breakdown,
    quantize_untuned,
    speed_rows,
    time_models,
    write_results,
)
from ouromamba_jax.models import create_model
from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.quantize.modules import set_module
from ouromamba_jax.report import print_table
from ouromamba_jax.scan import ScanOutput


class AssociativeScan(SelectiveScan):
    """The scan of a mixer as a prefix sum over pairs (decay, input) with `jax.lax.associative_scan`."""

    def __init__(self, scan: SelectiveScan):
        self.directions, self.dtype = scan.directions, scan.dtype
        self.A_log, self.D, self.dt_bias = scan.A_log, scan.D, scan.dt_bias

    def scan(self, u, delta, A, B, C, D, *, collect=None, state_transform=None) -> ScanOutput:
        if collect is not None or state_transform is not None:
            raise ValueError("AssociativeScan is here to be timed: it supports neither collect nor state_transform.")
        groups, channels, d_state = self.directions, u.shape[3], A.shape[1]
        bias = self.dt_bias[...].reshape(1, 1, groups, channels)
        step = jax.nn.softplus(delta + bias)[..., None]  # (B, L, G, E, 1)
        decay = jnp.exp(step * A.reshape(1, 1, groups, channels, d_state))
        h = jax.lax.associative_scan(_combine, (decay, step * u[..., None] * B[:, :, :, None]), axis=1)[1]
        y = jnp.sum(h * C[:, :, :, None], axis=-1) + D.reshape(1, 1, groups, channels) * u
        return ScanOutput(y, h[:, -1].reshape(h.shape[0], -1, d_state), None)


def _combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    return left[0] * right[0], right[0] * left[1] + right[1]


def with_associative_scan(model: nnx.Module) -> nnx.Module:
    """A copy of `model` that runs its scans by `AssociativeScan`."""
    model = nnx.clone(model)
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, SelectiveScan):
            set_module(model, ".".join(map(str, path)), AssociativeScan(module))
    return model


def bench_associative(model: nnx.Module, batch: int, repeats: int) -> list[list]:
    models = {"associative_scan": with_associative_scan(model), "ours": model}
    return speed_rows(time_models(models, batch, repeats=repeats), batch)


def bench_quantised(model: nnx.Module, batch: int, repeats: int, bits: list[str]) -> tuple[list[list], dict[str, list]]:
    models = {"float": model}
    for name in bits:
        print(f"quantising to {name}", flush=True)
        models[name] = quantize_untuned(model, name)
    parts = {name: block_breakdown(m, batch, repeats=repeats) for name, m in models.items()}
    print("compiling and timing the whole models", flush=True)
    return speed_rows(time_models(models, batch, repeats=repeats), batch), parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [WHAT] [options]"
    )
    parser.add_argument(
        "what", nargs="?", choices=("associative", "quantised"), help="one comparison; both if left out"
    )
    parser.add_argument("--model", help="vim_tiny for associative, vim_base for quantised if left out")
    parser.add_argument("--batch", type=int, help="images per call; 4 for associative, 2 for quantised if left out")
    parser.add_argument("--depth", type=int, help="fewer blocks, for a quick look")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a4"], help="presets to compare (default: w8a8 w4a4)")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each model (default: 10)")
    parser.add_argument("--json", type=Path, help="also write the numbers, the machine and the command to this file")
    arguments = parser.parse_args()
    overrides = {} if arguments.depth is None else {"depth": arguments.depth}
    results: dict = {"depth": arguments.depth}

    if arguments.what in (None, "associative"):
        name, batch = arguments.model or "vim_tiny", arguments.batch or 4
        rows = bench_associative(create_model(name, **overrides), batch, arguments.repeats)
        print_table(rows, HEADERS, title=f"{name}, batch {batch}")
        results["associative"] = dict(model=name, batch=batch, headers=HEADERS, rows=rows)
    if arguments.what in (None, "quantised"):
        name, batch = arguments.model or "vim_base", arguments.batch or 2
        rows, parts = bench_quantised(create_model(name, **overrides), batch, arguments.repeats, arguments.bits)
        print_table(rows, HEADERS, title=f"{name}, batch {batch}")
        for bits, table in parts.items():
            print_table(table, BREAKDOWN_HEADERS, title=f"one block of {name}, {bits}")
        results["quantised"] = dict(
            model=name, batch=batch, headers=HEADERS, rows=rows, breakdown_headers=BREAKDOWN_HEADERS, breakdown=parts
        )
    if arguments.json is not None:
        write_results(arguments.json, results)
        print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
