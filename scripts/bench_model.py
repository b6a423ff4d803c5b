"""Whole models: on CPU our scan against associative_scan; on a GPU the kernels.

    python scripts/bench_model.py --model vim_tiny --batch 4
    python scripts/bench_model.py --device gpu --json scripts/results/bench_model_h100.json    # needs an NVIDIA GPU

On a CPU a model is timed against the same one on `jax.lax.associative_scan` (the usual parallel formulation in JAX,
which holds (B, L, D, N) arrays). Weights are random and images Gaussian; models take turns and the ratios are medians
over rounds, so that other work on the machine hits all of them. Quantised models on CPUs: `ouromamba bench`.

`--device gpu` times six published models at batch 32 in bfloat16, W8A8 and W4A4, through XLA and on our kernels
(`bench.preferring`), below Hopper also on 4-bit tensor cores, then says what share of the time on the kernels goes into
finding and splitting outliers, into products, into scans and into the rest. A model that fails is recorded with its
error, and the next one starts.

What a kernel refuses runs on XLA: "kernels" counts the kernels' calls in the compiled program.
Not run on a GPU yet: no time and no number is known.
"""

import argparse
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array
from memory import with_gaussian_weights

from ouromamba_jax.evaluation.bench import (
    HEADERS,
    preferring,
    random_images,
    speed_rows,
    time_interleaved,
    time_models,
    time_ratio,
    write_results,
)
from ouromamba_jax.evaluation.breakdown import KINDS, model_breakdown
from ouromamba_jax.models import VisionModel, create_model, model_config, pure
from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.ops.scan_types import ScanOutput
from ouromamba_jax.pallas.device import int4_reason
from ouromamba_jax.quantize import QuantConfig, quantize
from ouromamba_jax.quantize.kinds import prepare_weights
from ouromamba_jax.quantize.sites import set_module
from ouromamba_jax.report.tables import print_table

OURS, INT4, XLA, FLOAT = "mosaic_gpu", "mosaic_gpu_int4", "xla", "bf16"
INT4_KERNEL = "int4_matmul"
GPU_MODELS = ("vim_tiny", "vim_small", "vim_base", "vmamba_tiny_s1l8", "vmamba_base_s1l20", "mambavision_t")
GPU_HEADERS = ("bits", "backend", "ms", "spread %", "images/s", "bf16 / this", "xla / this", "kernels")
SHARE_HEADERS = ("bits", "ms", *(f"{kind} %" for kind in KINDS))


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


def shortened(name: str, depth: int | None) -> dict[str, Any]:
    """Config fields that leave a model at most `depth` blocks, or as many in every stage if it has stages."""
    if depth is None:
        return {}
    config = model_config(name)
    if hasattr(config, "depths"):
        return {"depths": tuple(min(blocks, depth) for blocks in config.depths)}
    return {"depth": min(config.depth, depth)}


def bench_associative(model: nnx.Module, batch: int, repeats: int) -> list[list]:
    models = {"associative_scan": with_associative_scan(model), "ours": model}
    return speed_rows(time_models(models, batch, repeats=repeats), batch)


def gpu_models(name: str, bits: list[str], **overrides: Any) -> dict[str, nnx.Module]:
    """A bfloat16 model and its quantised versions. Weights are Gaussian: initial uniform ones have larger levels."""
    model = create_model(name, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, **overrides)
    model = with_gaussian_weights(model, jax.random.key(0))
    return {FLOAT: model, **{preset: quantize_untuned(model, preset) for preset in bits}}


def quantize_untuned(model: VisionModel, preset: str) -> VisionModel:
    """`model` at a preset's bits, calibrated on one Gaussian image: fit to be timed, not to be used."""
    config = QuantConfig.preset(preset, tune_epochs=0, scale_search="max")
    return quantize(model, random_images(model, 1, seed=1), config)[0]


def bench_gpu(models: dict[str, nnx.Module], batch: int, repeats: int) -> tuple[list[list], list[list]]:
    """Rows under GPU_HEADERS and SHARE_HEADERS."""
    images = random_images(models[FLOAT], batch)
    calls, kernels, shares = {}, {}, []
    for backend in (XLA, OURS, *([INT4] if int4_reason() is None else [])):
        with preferring(backend):
            for bits, model in models.items():
                log(f"compiling {bits} on {backend}")
                prepare_weights(model)
                function, state = pure(model)
                compiled = jax.jit(function).lower(state, images).compile()
                if backend == INT4 and INT4_KERNEL not in compiled.as_text():
                    continue  # nothing in it has 4 bits
                calls[bits, backend] = partial(compiled, state, images)
                kernels[bits, backend] = compiled.as_text().count('custom_call_target="mosaic_gpu')
    timings = time_interleaved(calls, repeats=repeats)
    rows = []
    for (bits, backend), timing in timings.items():
        float_backend = OURS if backend == INT4 else backend
        ratios = [time_ratio(timings[other], timing) for other in ((FLOAT, float_backend), (bits, XLA))]
        times = [1e3 * timing.median, 100 * timing.spread, batch / timing.median]
        rows.append([bits, backend, *times, *ratios, kernels[bits, backend]])
    with preferring(OURS):
        for bits, model in models.items():
            log(f"taking {bits} apart")
            parts = model_breakdown(model, batch, repeats=repeats, progress=log)
            total = sum(parts.values())
            shares.append([bits, total, *(100 * ms / total for ms in parts.values())])
    return rows, shares


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main_gpu(arguments: argparse.Namespace) -> int:
    if jax.devices()[0].platform != "gpu":
        log("The kernels need an NVIDIA GPU, and JAX sees none here: without --device gpu this times models on CPU.")
        return 1
    batch = arguments.batch or 32
    results: dict[str, Any] = {
        "batch": batch, "depth": arguments.depth, "headers": GPU_HEADERS, "share_headers": SHARE_HEADERS, "models": {}
    }  # fmt: skip
    failed = []
    for name in [arguments.model] if arguments.model else GPU_MODELS:
        log(f"building {name}")
        try:
            models = gpu_models(name, arguments.bits, **shortened(name, arguments.depth))
            rows, shares = bench_gpu(models, batch, arguments.repeats)
        except Exception as error:
            failed.append(name)
            log(f"{name} failed: {traceback.format_exc()}")
            results["models"][name] = {"error": f"{type(error).__name__}: {error}"}
        else:
            print_table(rows, GPU_HEADERS, title=f"{name}, batch {batch}")
            print_table(shares, SHARE_HEADERS, title=f"{name} on {OURS}: where the time goes")
            results["models"][name] = {"rows": rows, "shares": shares}
        if arguments.json is not None:  # after every model: all six take long
            write_results(arguments.json, results)
            print(f"wrote {arguments.json}")
    if failed:
        log(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="gpu: the kernels (default: cpu)")
    parser.add_argument("--model", help="vim_tiny on a CPU, six on a GPU if left out")
    parser.add_argument("--batch", type=int, help="images per call; 4 on a CPU, 32 on a GPU if left out")
    parser.add_argument("--depth", type=int, help="at most so many blocks (per stage), for a quick look")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a4"], help="presets on a GPU (default: w8a8 w4a4)")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each model (default: 10)")
    parser.add_argument("--json", type=Path, help="also write the numbers, the machine and the command to this file")
    arguments = parser.parse_args()
    if arguments.device == "gpu":
        return main_gpu(arguments)
    name, batch = arguments.model or "vim_tiny", arguments.batch or 4
    rows = bench_associative(create_model(name, **shortened(name, arguments.depth)), batch, arguments.repeats)
    print_table(rows, HEADERS, title=f"{name}, batch {batch}")
    if arguments.json is not None:
        write_results(arguments.json, dict(model=name, depth=arguments.depth, batch=batch, headers=HEADERS, rows=rows))
        print(f"wrote {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
