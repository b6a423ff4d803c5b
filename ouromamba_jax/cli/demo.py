"""The whole pipeline on an embedded model: generate, quantise, compare, draw. Offline, minutes on two CPU cores."""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ouromamba_jax.checkpoint import load
from ouromamba_jax.cli.common import ShownTable, Verb, add_formats, console, parse_seed, print_tables
from ouromamba_jax.data import load_images, to_pixels
from ouromamba_jax.evaluation.evaluate import Score, predict, score
from ouromamba_jax.files import check_writable, local_path
from ouromamba_jax.gen import GenConfig, Generated, generate_images
from ouromamba_jax.models import Trace, VisionModel
from ouromamba_jax.quantize import PRESETS, MemoryReport, QuantConfig, QuantLinear, memory_report, quantize
from ouromamba_jax.report.charts import dot_chart
from ouromamba_jax.report.figures import image_grid, outlier_map

BITS = tuple(PRESETS)
HEADERS = ("images", "bits", "top-1", "agree", "SQNR", "sites", "outl.", "MB", "FP16/")
"""The table's columns, narrow enough for 80 characters; shares in %, SQNR of the logits and mean of the sites in dB."""
ITERATIONS = 40
UNTUNED = dict(tune_epochs=0)
ROUND_TO_NEAREST = dict(detection="none", scale_search="max", **UNTUNED)


@dataclass(frozen=True)
class Run:
    """One quantised model of the comparison."""

    calibration: str
    bits: str
    score: Score
    mean_sqnr_db: float
    outlier_rate: float
    memory: MemoryReport

    def row(self) -> list[str]:
        """Cells under `HEADERS`."""
        return [
            self.calibration,
            self.bits,
            f"{100 * self.score.top1:.1f}",
            f"{100 * self.score.agreement:.1f}",
            f"{self.score.sqnr_db:.1f}",
            f"{self.mean_sqnr_db:.1f}",
            f"{100 * self.outlier_rate:.2f}",
            f"{self.memory.total / 1e6:.3f}",
            f"{self.memory.compression:.2f}",
        ]


def add_verbs(verb: Verb) -> None:
    """Adds demo to the command."""
    sub = verb("demo", demo, "the whole pipeline on an embedded model, offline", "--out ouromamba-demo")
    sub.add_argument("--model", default="vim_micro", help="vim_micro, vmamba_micro, mambavision_micro, or a checkpoint")
    sub.add_argument("--out", default="ouromamba-demo", help="folder for the figures")
    sub.add_argument("--num-images", type=int, default=64, help="images to generate")
    sub.add_argument("--seed", type=parse_seed, default=0, help="same seed, same result")
    add_formats(sub)


def demo(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    with console.status("") as status:

        def say(line: str) -> None:
            status.update(line)
            console.print(line)

        runs, float_top1 = run_demo(
            local_path(arguments.out),
            model_name=arguments.model,
            num_images=arguments.num_images,
            seed=arguments.seed,
            say=say,
        )
    title = f"{arguments.model}: float top-1 {100 * float_top1:.1f} %; shares in %, SQNR in dB"
    print_tables([ShownTable([run.row() for run in runs], HEADERS, title)], arguments.format)
    if arguments.format == "terminal":
        figures = ", ".join(sorted(p.name for p in local_path(arguments.out).glob("*.png")))
        print(f"{arguments.out}: {figures}; {time.perf_counter() - start:.0f} s")


def run_demo(
    folder: Path,
    *,
    model_name: str = "vim_micro",
    num_images: int = 64,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> tuple[list[Run], float]:
    """Generates images from the model, quantises it with them and with others, and draws what happened.

    Writes generated.png, outliers.png and sqnr.png into `folder`.

    Returns:
      (one `Run` per calibration source and bit width, top-1 of the float model) on the digits' test split.

    Raises:
      OSError: before any work, if nothing can be written in `folder`.
    """
    check_writable(folder / "generated.png")
    model = load(model_name)
    config = model.config
    train = load_images("digits", "train", config.img_size, config.preprocessing)
    test = load_images("digits", "test", config.img_size, config.preprocessing)
    labels = np.asarray(test.labels)
    reference = predict(model, test.images)
    float_score = score(reference, reference, labels)
    say(f"float {model_name}: top-1 {100 * float_score.top1:.1f} % on {len(test.images)} held-out digits")

    # The contrastive loss triples the time, and images made by the output loss alone calibrate as well (docs/study).
    settings = GenConfig(num_images=num_images, iterations=ITERATIONS, batch_size=num_images, contrastive=0.0)
    picked = train.images[np.random.default_rng(seed).permutation(len(train.images))[:num_images]]
    noise = jnp.clip(jax.random.normal(jax.random.key(seed + 1), picked.shape), -1, 1)
    sources: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "real": (lambda: picked, UNTUNED),
        "noise": (lambda: noise, UNTUNED),
        "synthetic": (lambda: made.result().images, UNTUNED),
        "synthetic, RTN": (lambda: made.result().images, ROUND_TO_NEAREST),
    }
    low: dict[tuple[str, str], VisionModel] = {}

    def generate() -> Generated:
        say(f"generating {num_images} images from the weights alone, {settings.iterations} iterations")
        generated = generate_images(model, settings, jax.random.key(seed))
        pixels = to_pixels(generated.images, config.preprocessing)
        titles = [str(int(target)) for target in generated.targets]
        heading = (
            "Synthetic calibration images, and the class each was made for.\n"
            "They need not look like digits: they are to excite the model as digits do."
        )
        image_grid(folder / "generated.png", pixels, titles, heading=heading)
        return generated

    def compare(bits: str) -> list[Run]:
        runs = []
        for source, (images, overrides) in sources.items():
            say(f"quantising to {bits}, calibrated by {source}")
            quantised, report = quantize(model, images(), QuantConfig.preset(bits, **overrides))
            # The batch of calibration, so that its compiled programs serve again.
            logits = predict(quantised, test.images, batch_size=QuantConfig.batch_size)
            scored = score(logits, reference, labels)
            runs.append(Run(source, bits, scored, report.mean_sqnr_db, report.outlier_rate, memory_report(quantised)))
            low[source, bits] = quantised
        return runs

    # Most of the time goes into compiling, one core per program; bit widths share few programs. Generation is the first
    # in the queue, so that nobody waits for images that nobody makes.
    pool = ThreadPoolExecutor(2)
    try:
        made = pool.submit(generate)
        compared = [pool.submit(compare, bits) for bits in BITS]
        compared[0].result()
        outlier_figure(folder / "outliers.png", low["synthetic", BITS[0]], test.images)
        runs = [run for of_bits in compared for run in of_bits.result()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # all are done, or something went wrong
    series = {f"calibrated by {name}": [[r.score.sqnr_db] for r in runs if r.calibration == name] for name in sources}
    heading = f"What quantising {model_name} costs, on {len(test.images)} held-out digits (higher is better)"
    dot_chart(folder / "sqnr.png", series, BITS, ylabel="SQNR of the logits, dB", xlabel="bits", heading=heading)
    return runs, float_score.top1


def outlier_figure(path: Path, model: VisionModel, images: np.ndarray) -> None:
    """Channel x token map of the outliers at the first matmul of the middle scan block, for one image.

    Where the block works on windows, it is the window with the most outliers.
    """
    _, trace = model.trace(jnp.asarray(images[:1]))
    middle = middle_scan(trace)
    name, site = next(
        (".".join(map(str, p)), m)
        for p, m in nnx.iter_modules(model.blocks[middle])
        if isinstance(m, QuantLinear) and p[-1] == "in_proj"
    )
    mask = np.asarray(site.split(trace.layers[middle].mixer_in).listed())
    most = int(np.argmax(np.mean(mask, axis=(1, 2))))
    sample = "first test image" if len(mask) == 1 else f"window {most} of the first test image"
    config = site.spec.config
    heading = f"blocks.{middle}.{name}, A{config.act_bits} with outliers of {config.outlier_bits} bits, {sample}"
    fullest = mask[most]
    outlier_map(path, fullest, n_refresh=site.spec.config.n_refresh, heading=heading)


def middle_scan(trace: Trace) -> int:
    """Index of the middle one of the blocks that scan."""
    scanning = [i for i, layer in enumerate(trace.layers) if layer.scans]
    return scanning[len(scanning) // 2]
