"""The verbs that measure a model: evaluate, bench."""

import argparse
from pathlib import Path

import jax

from ouromamba_jax import list_models
from ouromamba_jax.checkpoint import load
from ouromamba_jax.cli.common import Verb, bar, console
from ouromamba_jax.data import iterate_batches
from ouromamba_jax.data.classes import read_class_names
from ouromamba_jax.evaluation.bench import HEADERS, compare_speed, models_to_compare
from ouromamba_jax.evaluation.breakdown import BREAKDOWN_HEADERS, block_breakdown
from ouromamba_jax.evaluation.evaluate import evaluate
from ouromamba_jax.evaluation.stand_in import stand_in
from ouromamba_jax.report.tables import print_table
from ouromamba_jax.sharding import data_mesh


def add_verbs(verb: Verb) -> None:
    """Adds evaluate and bench to the command."""
    sub = verb("evaluate", evaluate_verb, "top-1, top-5 and images per second", "vim_micro --data digits")
    sub.add_argument("model", help="checkpoint folder, or the name of a shipped one")
    sub.add_argument("--data", required=True, help="image folder, .npz, digits, or tfds:NAME")
    sub.add_argument("--split", default="test", help="split of a named data set")
    sub.add_argument("--limit", type=int, help="use this many images; by default all")
    sub.add_argument("--batch-size", type=int, default=64, help="images per step")
    names = sub.add_mutually_exclusive_group()
    names.add_argument("--classes", metavar="FILE", help="names of the model's classes in their order, one per line")
    names.add_argument("--class-names", metavar="NAME,NAME,...", help="the same on the command line")

    sub = verb("bench", bench, "speed of a model, float and quantised, part by part", "vim_tiny --batch-size 4")
    sub.add_argument("model", help="checkpoint folder, or a model name for random weights")
    sub.add_argument("--batch-size", type=int, default=4, help="images per step")


def evaluate_verb(arguments: argparse.Namespace) -> None:
    names = read_class_names(arguments.classes) if arguments.classes else ()
    names = arguments.class_names.split(",") if arguments.class_names else names
    model = load(arguments.model)
    if names and len(names) != model.config.num_classes:
        raise ValueError(
            f"there are {len(names)} class names, but the model has {model.config.num_classes} classes; name every one."
        )
    batches = iterate_batches(
        arguments.data,
        arguments.split,
        model.config.img_size,
        model.config.preprocessing,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        labelled=True,
        classes=names or model.config.num_classes,
    )
    with bar("evaluating") as advance:

        def watched():
            done = 0
            for batch in batches:
                yield batch.images, batch.labels
                advance(done := done + len(batch.images), None, "images")

        result = evaluate(model, watched())
    rows = [[100 * result.top1, 100 * result.top5, result.images, result.images_per_second]]
    print_table(rows, ["top-1 %", "top-5 %", "images", "images/s"], title=str(arguments.model))
    if result.non_finite:
        print(f"{result.non_finite} of the images have logits that are not finite, and count as wrong.")


def bench(arguments: argparse.Namespace) -> None:
    name, batch_size = arguments.model, arguments.batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use at least 1.")
    model = stand_in(name) if name in list_models() and not Path(name).exists() else load(name)
    with console.status("") as status:
        models = models_to_compare(model)
        status.update(f"compiling and timing {', '.join(models)}")
        rows = compare_speed(models, batch_size, repeats=5)
        devices = f"{data_mesh(batch_size).size} of {jax.device_count()} {jax.devices()[0].platform} devices"
        print_table(rows, HEADERS, title=f"{name}, batch {batch_size} on {devices}")
        for kind, compared in models.items():
            status.update(f"taking one block apart, {kind}")
            parts = block_breakdown(compared, batch_size, repeats=5)
            print_table(parts, BREAKDOWN_HEADERS, title=f"the middle block of {name}, {kind}")
