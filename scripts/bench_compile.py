"""How long `jax.jit` of a whole model takes to compile, float and quantised, on one CPU device.

    python scripts/bench_compile.py --model vim_tiny --json scripts/results/bench_compile.json

Each model is traced and compiled `--repeats` times in turns, from nothing: JAX's caches are cleared before. Weights are
random: nothing depends on them. Expected of Vim-Tiny: the quantised programs take at most 2.5 times as long as float's.
`evaluate`, `quantize` and the command compile stage by stage instead, where equal blocks share one program.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from ouromamba_jax import pure
from ouromamba_jax.evaluation.bench import Timing, models_to_compare, random_images, time_ratio, write_results
from ouromamba_jax.evaluation.stand_in import stand_in
from ouromamba_jax.models import VisionModel
from ouromamba_jax.report.tables import print_table

HEADERS = ("model", "s", "CPU s", "of float", "of float, CPU")


def compile_once(model: VisionModel, batch: int) -> tuple[float, float]:
    """Seconds, wall-clock and the processor's, that one compilation takes."""
    fn, state = pure(model)
    images = random_images(model, batch)
    jax.clear_caches()
    start, cpu_start = time.perf_counter(), time.process_time()
    jax.jit(fn).lower(state, images).compile()
    return time.perf_counter() - start, time.process_time() - cpu_start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_tiny", help="a name of list_models() (default: vim_tiny)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the numbers, the machine and the command to this file")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    models = models_to_compare(stand_in(arguments.model))
    rounds = [
        {name: compile_once(model, arguments.batch) for name, model in models.items()} for _ in range(arguments.repeats)
    ]
    timings = {name: Timing(*zip(*(one[name] for one in rounds), strict=True)) for name in models}
    of_float = timings["float"]
    rows: list[list[str | float]] = []
    for name, t in timings.items():
        ratios = time_ratio(t, of_float), time_ratio(t, of_float, cpu=True)
        rows.append([name, t.median, float(np.median(t.cpu_seconds)), *ratios])
    print_table(rows, HEADERS, title=f"compiling {arguments.model}, batch {arguments.batch}")
    if arguments.json:
        write_results(arguments.json, dict(model=arguments.model, batch=arguments.batch, headers=HEADERS, rows=rows))


if __name__ == "__main__":
    main()
