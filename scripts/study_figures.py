"""The figures of a study: charts of its runs, the synthetic images, and the activations that images cause."""

import dataclasses
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np
from study_runs import BITS, OURS, Run, finished

from ouromamba_jax.cli.demo import outlier_figure
from ouromamba_jax.data import load_images, to_pixels
from ouromamba_jax.gen import class_targets
from ouromamba_jax.models import VisionModel
from ouromamba_jax.quantize import QuantLinear
from ouromamba_jax.quantize.sites import named_modules
from ouromamba_jax.report.charts import dot_chart, line_chart, line_panels
from ouromamba_jax.report.figures import image_grid

FORWARD = ("in_proj", "qkv", "x_proj", "dt_proj", "out_proj", "proj", "fc1", "fc2")
"""Names of layers in the order in which a block calls them."""


def draw_charts(study: Any, methods: list[Run], done: dict[str, dict[str, Any]]) -> None:
    """accuracy.png, sqnr.png and sites.png from the finished runs of the methods, if every bit width has one."""
    by_method: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in methods:
        by_method.setdefault(f"{run.title}, {run.source}", {})[run.bits] = finished(run, done)
    complete = {name: cells for name, cells in by_method.items() if all(cells.get(bits) for bits in BITS)}
    if not complete:
        return

    def seeds(score: str, unit: float) -> dict[str, list[list[float]]]:
        return {name: [[unit * e[score] for e in cells[bits]] for bits in BITS] for name, cells in complete.items()}

    ticks, name = [bits.upper() for bits in BITS], study.model_name
    top1, top = seeds("top1", 100), study.float_top1()
    dot_chart(study.out / "accuracy.png", top1, ticks, ylabel="top-1, %", heading=name, reference=("float", top))
    dot_chart(study.out / "sqnr.png", seeds("sqnr_db", 1), ticks, ylabel="SQNR of the logits, dB", heading=name)
    found = {name: cells["w4a4"] for name, cells in complete.items()}
    reported = [set(entry["sites"]) for entries in found.values() for entry in entries]
    common = sorted(set.intersection(*reported), key=_forward_order)
    line_chart(
        study.out / "sites.png",
        {name: [mean(e["sites"][site] for e in entries) for site in common] for name, entries in found.items()},
        [site.removeprefix("blocks.") for site in common],
        xlabel="block and layer",
        ylabel="SQNR of the product, dB",
        heading=f"{name}: every matmul at W4A4, on the method's own calibration images",
    )


def _forward_order(site: str) -> tuple[Any, ...]:
    """Stem, blocks by number, head; within a block as its layers are called."""
    stage, *rest = site.split(".")
    layer = rest[-1]
    numbers = tuple(int(part) for part in rest if part.isdigit())
    place = FORWARD.index(layer) if layer in FORWARD else len(FORWARD)
    return {"stem": 0, "head": 2}.get(stage, 1), numbers[:1], place, numbers


def draw_images(study: Any, run: Run, seed: int) -> None:
    """generated.png: synthetic images of one seed with their targets; outliers.png: what they lead to."""
    config, images = study.config, study.images(run, seed)
    sample = load_images(study.data, study.train_split, config.img_size, config.preprocessing, limit=1)
    names = sample.classes or [str(label) for label in range(config.num_classes)]
    targets = class_targets(run.gen_config, config.num_classes)
    titles = [names[target] for target in targets.tolist()]
    heading = "Synthetic images and the class each was made for"
    image_grid(study.out / "generated.png", to_pixels(images[:40], config.preprocessing), titles[:40], heading=heading)
    low, _ = study.quantize(dataclasses.replace(run, bits="w4a4"), images)
    test = load_images(study.data, study.test_split, config.img_size, config.preprocessing, limit=1)
    outlier_figure(study.out / "outliers.png", low, test.images)


def draw_activations(study: Any, calibration: list[Run], seeds: Sequence[int]) -> None:
    """activations.png: the static scale of every token position in the middle block, as found from each kind of image.

    All images are of the first seed. The legend says by which factor the scales of all layers differ from those of real
    images (median over layers and tokens); the second seed's real images, if there is one, are the yardstick.
    """
    by_source = {run.source: run for run in calibration if (run.method, run.bits) == (OURS, "w4a4")}
    drawn = {name: (by_source[name], seeds[0]) for name in ("real", "synthetic", "noise")}
    if len(seeds) > 1:
        drawn["real, another draw"] = by_source["real"], seeds[1]
    untuned = (("tune_epochs", 0),)
    scales = {}
    for name, (run, seed) in drawn.items():
        low, _ = study.quantize(dataclasses.replace(run, settings=untuned), study.images(run, seed))
        scales[name] = token_scales(low)

    def label(name: str) -> str:
        octaves = np.concatenate([np.abs(np.log2(scales[name][s] / scales["real"][s])) for s in scales["real"]])
        return name if name == "real" else f"{name}: median factor {2 ** np.median(octaves):.2f}"

    blocks = sorted({_block(site) for site in scales["real"] if site.startswith("blocks.")})
    middle = blocks[len(blocks) // 2]
    panels = sorted((s for s in scales["real"] if s.startswith("blocks.") and _block(s) == middle), key=_forward_order)
    line_panels(
        study.out / "activations.png",
        {site: {label(name): found[site].tolist() for name, found in scales.items()} for site in panels},
        xlabel="token, in scan order",
        ylabel="4-bit scale",
        heading=f"{study.model_name}: activations of block {middle}, calibrated by {by_source['real'].images} images",
    )


def token_scales(model: VisionModel) -> dict[str, np.ndarray]:
    """{site: inlier scale (L,)} of a quantised model's 4-bit linear layers."""
    return {
        path: np.asarray(module.act.scale[...])
        for path, module in named_modules(model)
        if isinstance(module, QuantLinear) and module.spec.config.act_bits == 4
    }


def _block(site: str) -> int:
    return int(site.split(".")[1])
