"""The verbs that measure models: evaluate, compare, bench."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax

from ouromamba_jax import list_models, memory_report
from ouromamba_jax.checkpoint import load
from ouromamba_jax.cli.common import ShownTable, Verb, add_formats, bar, chosen_split, console, print_tables
from ouromamba_jax.data import iterate_batches
from ouromamba_jax.data.classes import read_class_names
from ouromamba_jax.evaluation.bench import HEADERS, compare_speed, machine, models_to_compare
from ouromamba_jax.evaluation.breakdown import BREAKDOWN_HEADERS, block_breakdown
from ouromamba_jax.evaluation.evaluate import Accuracy, compare
from ouromamba_jax.evaluation.stand_in import stand_in
from ouromamba_jax.models import VisionModel
from ouromamba_jax.sharding import data_mesh


def add_verbs(verb: Verb) -> None:
    """Adds evaluate, compare and bench to the command."""
    sub = verb("evaluate", evaluate_verb, "top-1, top-5 and images per second", "vim_micro --data digits")
    sub.add_argument("model", help="checkpoint folder, or the name of a shipped one")
    _add_data(sub)

    sub = verb("compare", compare_verb, "float and quantised models on the same images", "vim_micro low/ --data digits")
    sub.add_argument(
        "models", nargs="+", help="checkpoint folders, or names of shipped ones; the first is the reference"
    )
    _add_data(sub)

    sub = verb("bench", bench, "speed of a model, float and quantised, part by part", "vim_tiny --batch-size 4")
    sub.add_argument("model", help="checkpoint folder, or a model name for random weights")
    sub.add_argument("--batch-size", type=int, default=4, help="images per step")
    add_formats(sub)


def _add_data(sub: argparse.ArgumentParser) -> None:
    """Adds the options that name labelled images, and the format of the scores."""
    sub.add_argument("--data", required=True, help="image folder, .npz, digits, or tfds:NAME")
    sub.add_argument("--split", help="split of a named data set, by default test")
    sub.add_argument("--limit", type=int, help="use this many images; by default all")
    sub.add_argument("--batch-size", type=int, default=64, help="images per step")
    names = sub.add_mutually_exclusive_group()
    names.add_argument("--classes", metavar="FILE", help="names of the model's classes in their order, one per line")
    names.add_argument("--class-names", metavar="NAME,NAME,...", help="the same on the command line")

    add_formats(sub)


def evaluate_verb(arguments: argparse.Namespace) -> None:
    accuracies = _accuracies(arguments, {arguments.model: load(arguments.model)})
    headers = ("top-1 %", "top-5 %", "images", "images/s")
    rows = [[100 * a.top1, 100 * a.top5, a.images, a.images_per_second] for a in accuracies.values()]
    print_tables([ShownTable(rows, headers, arguments.model)], arguments.format)
    _warn_of_non_finite(accuracies)


def compare_verb(arguments: argparse.Namespace) -> None:
    models = {name: load(name) for name in arguments.models}
    accuracies = _accuracies(arguments, models)
    headers = ("model", "top-1 %", "top-5 %", "agreement %", "SQNR dB", "MB", "images/s")
    rows = []
    for (name, model), a in zip(models.items(), accuracies.values(), strict=True):
        shares = [100 * share for share in (a.top1, a.top5, a.agreement)]
        rows.append([name, *shares, a.sqnr_db, memory_report(model).total / 1e6, a.images_per_second])
    images = next(iter(accuracies.values())).images
    title = f"{images} images of {arguments.data}; agreement and SQNR of the logits against {arguments.models[0]}"
    print_tables([ShownTable(rows, headers, title)], arguments.format)
    _warn_of_non_finite(accuracies)


def _accuracies(arguments: argparse.Namespace, models: dict[str, VisionModel]) -> dict[str, Accuracy]:
    """Of every model on the data that the options of `_add_data` name."""
    names = read_class_names(arguments.classes) if arguments.classes else ()
    names = arguments.class_names.split(",") if arguments.class_names else names
    config = next(iter(models.values())).config
    if names and len(names) != config.num_classes:
        raise ValueError(
            f"there are {len(names)} class names, but the model has {config.num_classes} classes; name every one."
        )
    batches = iterate_batches(
        arguments.data,
        chosen_split(arguments.data, arguments.split, "test"),
        config.img_size,
        config.preprocessing,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        labelled=True,
        classes=names or config.num_classes,
    )
    with bar("evaluating") as advance:

        def watched():
            done = 0
            for batch in batches:
                yield batch.images, batch.labels
                advance(done := done + len(batch.images), batches.num_images, "images")

        return compare(models, watched())


def _warn_of_non_finite(accuracies: dict[str, Accuracy]) -> None:
    for name, accuracy in accuracies.items():
        if accuracy.non_finite:
            console.print(
                f"{name}: {accuracy.non_finite} of the images have logits that are not finite, and count as wrong."
            )


def bench(arguments: argparse.Namespace) -> None:
    name, batch_size = arguments.model, arguments.batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use at least 1.")
    model = stand_in(name) if name in list_models() and not Path(name).exists() else load(name)
    with console.status("") as status:

        def tables() -> Iterator[ShownTable]:
            models = models_to_compare(model)
            status.update(f"compiling and timing {', '.join(models)}")
            rows = compare_speed(models, batch_size, repeats=5)
            of, kind = jax.device_count(), jax.devices()[0].platform
            devices = f"{data_mesh(batch_size).size} of {of} {kind} devices ({machine()['cpu']})"
            yield ShownTable(rows, HEADERS, f"{name}, batch {batch_size} on {devices}")
            for kind, compared in models.items():
                status.update(f"taking one block apart, {kind}")
                parts = block_breakdown(compared, batch_size, repeats=5)
                yield ShownTable(parts, BREAKDOWN_HEADERS, f"the middle block of {name}, {kind}")

        print_tables(tables(), arguments.format)
