"""The `ouromamba` command: every verb is a few lines over one call of the library."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ouromamba_jax import (
    GenConfig,
    QuantConfig,
    from_torch,
    generate_images,
    list_models,
    memory_report,
    quantize,
    save,
)
from ouromamba_jax.checkpoint import load, read_description, resolve
from ouromamba_jax.data import iterate_batches, load_images, to_pixels
from ouromamba_jax.files import check_writable, whole_file
from ouromamba_jax.models import create_model
from ouromamba_jax.quantize import PRESETS
from ouromamba_jax.report.figures import image_grid, new_figure
from ouromamba_jax.report.tables import print_table

console = Console(stderr=True)


_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError, jax.errors.JaxRuntimeError)
"""Bad input, and machines that are too small for it; anything else is a fault of ours and shows its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; an error is one sentence on stderr and exit status 1 (2 for wrong usage)."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except _EXPECTED as error:
        if arguments.debug:
            raise
        print(f"ouromamba: {_sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = getattr(arguments, "resume", None)
        print(f"ouromamba: interrupted{f'; the same command goes on from {kept}' if kept else ''}.", file=sys.stderr)
        return 130
    return 0


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{'' if error.filename is None else f'{error.filename}: '}{error.strerror.lower()}."
    return " ".join(str(error).split()) or type(error).__name__


def convert(arguments: argparse.Namespace) -> None:
    _check_output(arguments.out)
    model = from_torch(
        arguments.name,
        arguments.checkpoint,
        entry=arguments.entry,
        interpolate_positions=arguments.interpolate_positions,
        **dict(arguments.set or ()),
    )
    save(arguments.out, model)
    count = sum(leaf.size for _, leaf in nnx.to_flat_state(nnx.state(model)))
    print(f"{arguments.out}: {arguments.name} with {count:,} parameters")


def generate(arguments: argparse.Namespace) -> None:
    _check_output(arguments.out, suffix=".npz")
    config = GenConfig(**_given(arguments, GenConfig))
    if arguments.figure:
        _check_output(arguments.figure, suffix=".png")
        new_figure(1.0, 1.0)  # without Matplotlib it fails here, not after the generation
    model = load(arguments.model)
    generated = generate_images(
        model, config, jax.random.key(arguments.seed), progress=True, checkpoint_dir=arguments.resume
    )
    with whole_file(arguments.out) as file:
        np.savez_compressed(file, images=np.asarray(generated.images), labels=np.asarray(generated.targets))
    print(f"{arguments.out}: {len(generated.images)} images")
    if arguments.figure:
        pixels = to_pixels(generated.images[:64], model.config.preprocessing)
        image_grid(arguments.figure, pixels, [str(int(t)) for t in generated.targets[:64]])
        print(arguments.figure)


def quantize_verb(arguments: argparse.Namespace) -> None:
    _check_output(arguments.out)
    config = QuantConfig.preset(arguments.bits, **_given(arguments, QuantConfig))
    model = load(arguments.model)
    images = load_images(
        arguments.images, arguments.split, model.config.img_size, model.config.preprocessing, limit=arguments.limit
    ).images
    with _bar("quantising") as advance:
        quantised, report = quantize(model, jnp.asarray(images), config, progress=advance)
    save(arguments.out, quantised)
    print(report)
    print(f"\n{arguments.out}: {memory_report(quantised)}")


def evaluate_verb(arguments: argparse.Namespace) -> None:
    from ouromamba_jax.evaluation.evaluate import evaluate

    model = load(arguments.model)
    batches = iterate_batches(
        arguments.data,
        arguments.split,
        model.config.img_size,
        model.config.preprocessing,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        labelled=True,
    )
    with _bar("evaluating") as advance:

        def watched():
            done = 0
            for batch in batches:
                yield batch.images, batch.labels
                advance(done := done + len(batch.images), None, "images")

        result = evaluate(model, watched())
    rows = [[100 * result.top1, 100 * result.top5, result.images, result.images_per_second]]
    print_table(rows, ["top-1 %", "top-5 %", "images", "images/s"], title=str(arguments.model))


def inspect(arguments: argparse.Namespace) -> None:
    path = Path(arguments.path)
    if path.is_file():
        from ouromamba_jax.convert.torch_file import load_tensors

        tensors = load_tensors(path, entry=arguments.entry)
        rows = [[key, str(tuple(t.shape)), str(t.dtype)] for key, t in tensors.items()]
        print_table(rows, ["key", "shape", "type"], title=f"{path}: {len(rows)} tensors")
        return
    description = read_description(resolve(path))
    model = load(path)
    rows = [
        [".".join(map(str, key)), str(leaf.shape), str(leaf.dtype)] for key, leaf in nnx.to_flat_state(nnx.state(model))
    ]
    print_table(rows, ["parameter", "shape", "type"], title=f"{path}: {description['family']}")
    print(f"{model.config}\n{len(description['quantization'])} quantised sites; {memory_report(model)}")


def bench(arguments: argparse.Namespace) -> None:
    from ouromamba_jax.evaluation.bench import HEADERS, models_to_compare, speed_rows, time_models
    from ouromamba_jax.evaluation.breakdown import BREAKDOWN_HEADERS, block_breakdown

    batch_size = arguments.batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use at least 1.")
    named = arguments.model in list_models() and not Path(arguments.model).exists()
    model = create_model(arguments.model) if named else load(arguments.model)
    with console.status("") as status:
        models = models_to_compare(model, progress=status.update)
        status.update(f"compiling and timing {', '.join(models)}")
        rows = speed_rows(time_models(models, batch_size), batch_size)
        print_table(rows, HEADERS, title=f"{arguments.model}, batch {batch_size}, {jax.devices()[0].device_kind}")
        for name, compared in models.items():
            status.update(f"taking one block apart, {name}")
            parts = block_breakdown(compared, batch_size)
            print_table(parts, BREAKDOWN_HEADERS, title=f"the middle block of {arguments.model}, {name}")


def demo(arguments: argparse.Namespace) -> None:
    from ouromamba_jax.cli.demo import HEADERS, run_demo

    start = time.perf_counter()
    with console.status("") as status:

        def say(line: str) -> None:
            status.update(line)
            console.print(line)

        runs, float_top1 = run_demo(
            Path(arguments.out),
            model_name=arguments.model,
            num_images=arguments.num_images,
            seed=arguments.seed,
            say=say,
        )
    print_table(
        [run.row() for run in runs],
        HEADERS,
        title=f"{arguments.model}: float top-1 {100 * float_top1:.1f} %; shares in %, SQNR in dB",
    )
    figures = ", ".join(sorted(p.name for p in Path(arguments.out).glob("*.png")))
    print(f"{arguments.out}: {figures}; {time.perf_counter() - start:.0f} s")


def _given(arguments: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of a config that the command line sets."""
    values = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value is not None}


def _check_output(path: str, *, suffix: str | None = None) -> None:
    """Refuses, before any work is done, what could not be written at its end."""
    if suffix is not None and not path.endswith(suffix):
        raise ValueError(f"{path} must end in {suffix}.")
    if Path(path).exists():
        raise ValueError(f"{path} already exists; choose another name or remove it first.")
    check_writable(path)


@contextmanager
def _bar(label: str):
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total, name: progress.update(
            task, completed=done, total=total, description=f"{label} {name}"
        )


def _field(text: str) -> tuple[str, int | float | tuple[int | float, ...]]:
    name, _, value = text.partition("=")
    try:
        numbers = tuple(int(v) if v.lstrip("+-").isdigit() else float(v) for v in value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=NUMBER, e.g. img_size=384") from None
    return name, numbers[0] if len(numbers) == 1 else numbers


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed; give a whole number from 0 to {2**32 - 1}")
    return seed


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults that say something: neither "None" nor "False"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ouromamba", description="Data-free quantisation of vision Mamba models in JAX."
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of one sentence")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run, help: str, example: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example: ouromamba {name} {example}",
            formatter_class=_Help,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show a traceback")
        return sub

    sub = verb(
        "convert", convert, "PyTorch checkpoint to a Flax model", "vim_tiny vim_t_midclstok_76p1acc.pth vim_tiny/"
    )
    sub.add_argument("name", help=f"one of {', '.join(list_models())}")
    sub.add_argument("checkpoint", help=".pth, .pth.tar or .safetensors")
    sub.add_argument("out", help="folder to write")
    sub.add_argument("--entry", help="entry of a training file, e.g. model_ema; by default model or state_dict")
    sub.add_argument(
        "--set",
        action="append",
        type=_field,
        metavar="FIELD=NUMBER[,NUMBER...]",
        help="config field, e.g. img_size=384; may be given several times",
    )
    sub.add_argument(
        "--interpolate-positions",
        action="store_true",
        help="resize the positional embeddings to another img_size than the checkpoint's",
    )

    sub = verb(
        "generate", generate, "calibration images from a model alone", "vim_micro images.npz --figure images.png"
    )
    sub.add_argument("model", help="checkpoint folder, or the name of a shipped one")
    sub.add_argument("out", help=".npz to write: images, labels")
    sub.add_argument("--num-images", type=int, default=GenConfig.num_images, help="images to make")
    sub.add_argument("--iterations", type=int, default=GenConfig.iterations, help="updates per batch")
    sub.add_argument("--batch-size", type=int, default=GenConfig.batch_size, help="images optimised together")
    sub.add_argument("--contrastive", type=float, default=GenConfig.contrastive, help="weight of the contrastive loss")
    sub.add_argument("--output", type=float, default=GenConfig.output, help="weight of the output loss")
    sub.add_argument("--seed", type=_seed, default=0, help="same seed, same images")
    sub.add_argument("--resume", metavar="DIR", help="keep the run's state here, and continue from it")
    sub.add_argument("--figure", help="PNG with the first 64 images")

    sub = verb(
        "quantize", quantize_verb, "a low-bit model", "vim_micro --images images.npz --bits w4a4 vim_micro_w4a4/"
    )
    sub.add_argument("model", help="checkpoint folder, or the name of a shipped one")
    sub.add_argument("out", help="folder to write")
    sub.add_argument("--images", required=True, help="calibration images: .npz, folder, digits, or tfds:NAME")
    sub.add_argument("--split", default="train", help="split of a named data set")
    sub.add_argument("--limit", type=int, help="use this many images; by default all")
    sub.add_argument("--bits", required=True, choices=PRESETS, help="weights and activations")
    sub.add_argument(
        "--detection",
        choices=("dynamic", "static", "none"),
        default=QuantConfig.detection,
        help="of outlier channels",
    )
    sub.add_argument(
        "--outlier-scale", choices=("pow2", "free"), default=QuantConfig.outlier_scale, help="scale of the outliers"
    )
    sub.add_argument(
        "--threshold", choices=("online", "offline"), default=QuantConfig.threshold, help="of the detection"
    )
    sub.add_argument("--n-refresh", type=int, default=QuantConfig.n_refresh, help="tokens per window")
    sub.add_argument(
        "--sigma",
        type=float,
        default=QuantConfig.sigma,
        help="standard deviations above the mean that make an outlier",
    )
    sub.add_argument("--weight-group", type=int, help="input channels per weight scale; by default all")
    sub.add_argument(
        "--tune-epochs",
        type=int,
        default=QuantConfig.tune_epochs,
        help="passes over the images to tune the scales; 0: none",
    )
    sub.add_argument("--batch-size", type=int, default=QuantConfig.batch_size, help="images per step of calibration")

    sub = verb("evaluate", evaluate_verb, "top-1, top-5 and images per second", "vim_micro --data digits")
    sub.add_argument("model", help="checkpoint folder, or the name of a shipped one")
    sub.add_argument("--data", required=True, help="image folder, .npz, digits, or tfds:NAME")
    sub.add_argument("--split", default="test", help="split of a named data set")
    sub.add_argument("--limit", type=int, help="use this many images; by default all")
    sub.add_argument("--batch-size", type=int, default=64, help="images per step")

    sub = verb("inspect", inspect, "what a checkpoint holds", "vim_t_midclstok_76p1acc.pth")
    sub.add_argument("path", help="native checkpoint folder, .pth or .safetensors")
    sub.add_argument("--entry", help="entry of a training file")

    sub = verb("bench", bench, "speed of a model, float and quantised, part by part", "vim_tiny --batch-size 4")
    sub.add_argument("model", help="checkpoint folder, or a model name for random weights")
    sub.add_argument("--batch-size", type=int, default=4, help="images per step")

    sub = verb("demo", demo, "the whole pipeline on an embedded model, offline", "--out ouromamba-demo")
    sub.add_argument("--model", default="vim_micro", help="vim_micro, vmamba_micro, mambavision_micro, or a checkpoint")
    sub.add_argument("--out", default="ouromamba-demo", help="folder for the figures")
    sub.add_argument("--num-images", type=int, default=64, help="images to generate")
    sub.add_argument("--seed", type=_seed, default=0, help="same seed, same result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
