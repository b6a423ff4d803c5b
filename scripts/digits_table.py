"""The accuracy table of the embedded model on the digits: bits x detection x calibration source, mean over seeds.

    python scripts/digits_table.py --json scripts/results/digits_table.json

A seed draws the calibration images: which real digits, which noise, which synthetic images. All scores are on the
held-out test split, against the float model. With three seeds it takes one CPU core half an hour; each setting prints
its rows when it is done.

Expected on `vim_micro`: `scripts/results/digits_table.json`.
"""

import argparse
import dataclasses
from pathlib import Path
from statistics import mean, pstdev

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from ouromamba_jax import GenConfig, QuantConfig, generate_images, load, quantize
from ouromamba_jax.data import load_images
from ouromamba_jax.evaluation.bench import write_results
from ouromamba_jax.evaluation.evaluate import predict, score
from ouromamba_jax.files import write_text
from ouromamba_jax.quantize import PRESETS
from ouromamba_jax.report.tables import markdown_table, print_table

SETTINGS = (
    ("w8a8", {}),
    ("w8a8", dict(outlier_bits=8)),
    ("w6a6", {}),
    ("w4a8", {}),
    ("w4a4", dict(detection="none")),
    ("w4a4", dict(detection="static")),
    ("w4a4", dict(detection="static", static_list="max")),
    ("w4a4", {}),
)
HEADERS = (
    "calibration",
    "bits",
    "setting",
    "top-1 %",
    "vs float",
    "agreement %",
    "SQNR dB",
    "+-",
    "outliers %",
    "mean bits",
)


def calibration_images(source: str, model, train, count: int, seed: int, iterations: int) -> np.ndarray:
    """`count` images of one source: "real", "noise" or "synthetic"."""
    if source == "real":
        return train.images[np.random.default_rng(seed).permutation(len(train.images))[:count]]
    if source == "noise":
        return np.asarray(jnp.clip(jax.random.normal(jax.random.key(seed), (count, *train.images.shape[1:])), -1, 1))
    config = GenConfig(num_images=count, batch_size=count, iterations=iterations)
    return np.asarray(generate_images(model, config, jax.random.key(seed)).images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_micro", help="checkpoint")
    parser.add_argument("--seeds", type=int, default=3, help="calibration sets per source, from seed 0 on")
    parser.add_argument("--images", type=int, default=64, help="calibration images")
    parser.add_argument("--iterations", type=int, default=GenConfig.iterations, help="of the generation")
    parser.add_argument("--sources", nargs="+", default=["real", "synthetic", "noise"])
    parser.add_argument("--bits", nargs="+", default=list(reversed(PRESETS)), choices=PRESETS)
    parser.add_argument("--tune-epochs", type=int, default=QuantConfig.tune_epochs)
    parser.add_argument("--json", type=Path, help="write the rows and the versions here")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds is {arguments.seeds}, but it is how many there are; use at least 1.")

    model = load(arguments.model)
    config = model.config
    train = load_images("digits", "train", config.img_size, config.preprocessing)
    test = load_images("digits", "test", config.img_size, config.preprocessing)
    reference = predict(model, test.images)
    float_top1 = score(reference, reference, test.labels).top1
    settings = [(bits, kw) for bits, kw in SETTINGS if bits in arguments.bits]
    work = [(source, seed) for source in arguments.sources for seed in range(arguments.seeds)]
    images = {
        (source, seed): calibration_images(source, model, train, arguments.images, seed, arguments.iterations)
        for source, seed in track(work, description="calibration sets")
    }
    rows = []
    for bits, kw in track(settings, description="settings"):
        jax.clear_caches()  # nothing compiled for other settings serves this one, and code takes memory
        runs: dict[str, list[dict]] = {source: [] for source in arguments.sources}
        for source, seed in work:
            quantised, report = quantize(
                model, images[source, seed], QuantConfig.preset(bits, tune_epochs=arguments.tune_epochs, **kw)
            )
            scored = score(predict(quantised, test.images, batch_size=QuantConfig.batch_size), reference, test.labels)
            account = {"outlier_rate": report.outlier_rate, "mean_bits": report.mean_bits}
            runs[source].append(dataclasses.asdict(scored) | account)
        for source, of_source in runs.items():
            average = {name: mean(run[name] for run in of_source) for name in of_source[0]}
            rows.append(
                [
                    source,
                    bits,
                    ", ".join(f"{name} {value}" for name, value in kw.items()) or "dynamic",
                    round(100 * average["top1"], 2),
                    round(100 * (average["top1"] - float_top1), 2),
                    round(100 * average["agreement"], 2),
                    round(average["sqnr_db"], 2),
                    round(pstdev(run["sqnr_db"] for run in of_source), 2),
                    round(100 * average["outlier_rate"], 2),
                    round(average["mean_bits"], 3),
                ]
            )
            print(*rows[-1], sep="  ", flush=True)
    rows.sort(key=lambda row: arguments.sources.index(row[0]))
    title = (
        f"{arguments.model}: float top-1 {100 * float_top1:.2f} %, {arguments.seeds} seeds, {arguments.images} images"
    )
    print_table(rows, HEADERS, title=title)
    if arguments.json:
        record = dict(
            settings=vars(arguments) | {"json": arguments.json.name},
            float_top1=float_top1,
            rows=[dict(zip(HEADERS, row, strict=True)) for row in rows],
        )
        write_results(arguments.json, record)
        write_text(arguments.json.with_suffix(".md"), f"{title}\n\n{markdown_table(rows, HEADERS)}")


if __name__ == "__main__":
    main()
