"""The verbs of checkpoints: convert, inspect."""

import argparse
import shlex
import warnings
from pathlib import Path
from typing import Any

from flax import nnx

from ouromamba_jax import from_torch, list_models, memory_report, save
from ouromamba_jax.checkpoint import is_checkpoint, load, read_description, resolve
from ouromamba_jax.cli.common import ShownTable, Verb, add_formats, check_output, print_tables
from ouromamba_jax.convert import CheckpointNote, load_tensors, matching_models
from ouromamba_jax.files import local_path
from ouromamba_jax.models import VisionModel, model_config
from ouromamba_jax.quantize import QuantLinear


def add_verbs(verb: Verb) -> None:
    """Adds convert and inspect to the command."""
    sub = verb(
        "convert", convert, "PyTorch checkpoint to a Flax model", "vim_tiny vim_t_midclstok_76p1acc.pth vim_tiny/"
    )
    sub.add_argument("name", help=f"one of {', '.join(list_models())}")
    sub.add_argument(
        "source",
        help=".pth, .pth.tar or .safetensors, a hub folder, owner/name on the Hugging Face hub, or a folder of a "
        "converted float model to change",
    )
    sub.add_argument("out", help="folder to write")
    add_source_options(sub)

    sub = verb("inspect", inspect, "what a checkpoint holds", "vim_t_midclstok_76p1acc.pth")
    sub.add_argument("path", help="native checkpoint folder, .pth, .safetensors or a hub folder")
    sub.add_argument("--entry", help="entry of a training file")
    add_formats(sub)


def add_source_options(sub: argparse.ArgumentParser) -> None:
    """Adds the options that say how a PyTorch checkpoint is read; `converted` reads it."""
    sub.add_argument("--entry", help="entry of a training file, e.g. model_ema; by default model or state_dict")
    sub.add_argument("--revision", help="branch, tag or commit of what is fetched from the hub")
    sub.add_argument("--prefix", help="what stands before the model's names, e.g. teacher.backbone.")
    sub.add_argument("--fresh-head", action="store_true", help="a new last layer of num_classes, not the checkpoint's")
    sub.add_argument(
        "--set",
        action="append",
        type=parse_field,
        metavar="FIELD=VALUE",
        help="config field: a number, several with commas, a flag or a name, e.g. img_size=384, class_token=first, "
        "halve_directions=false, mean=0.5,0.5,0.5; may be given several times",
    )
    sub.add_argument(
        "--interpolate-positions",
        action="store_true",
        help="resize the positional embeddings to another img_size than the checkpoint's",
    )


def convert(arguments: argparse.Namespace) -> None:
    check_output(arguments.out)
    is_native = is_checkpoint(local_path(arguments.source))
    model = _changed(arguments) if is_native else converted(arguments.name, arguments)
    save(arguments.out, model)
    count = sum(leaf.size for _, leaf in nnx.to_flat_state(nnx.state(model)))
    print(f"{arguments.out}: {model.family if is_native else arguments.name} with {count:,} parameters")


def converted(name: str, arguments: argparse.Namespace) -> VisionModel:
    """The PyTorch checkpoint `arguments.source` as the model `name`; says what was chosen in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointNote)
        model = from_torch(
            name,
            arguments.source,
            entry=arguments.entry,
            revision=arguments.revision,
            prefix=arguments.prefix,
            head="fresh" if arguments.fresh_head else "checkpoint",
            interpolate_positions=arguments.interpolate_positions,
            **dict(arguments.set or ()),
        )
    _print_notes(caught)
    return model


def _changed(arguments: argparse.Namespace) -> VisionModel:
    """A converted model with other config fields."""
    path = arguments.source
    if arguments.entry or arguments.revision or arguments.prefix or arguments.fresh_head:
        raise ValueError(f"{path} is converted already, so leave out --entry, --revision, --prefix and --fresh-head.")
    model = load(path, **dict(arguments.set or ()))
    if type(model.config) is not type(model_config(arguments.name)):
        raise ValueError(f"{path} holds a {model.family} model, so {arguments.name} is the wrong name.")
    return model


def _print_notes(caught: list[warnings.WarningMessage]) -> None:
    for warning in caught:
        if issubclass(warning.category, CheckpointNote):
            print(warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def inspect(arguments: argparse.Namespace) -> None:
    path = local_path(arguments.path)
    if path.is_file() or (any(path.glob("*.safetensors*")) and not is_checkpoint(path)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CheckpointNote)
            tensors = load_tensors(path, entry=arguments.entry)
        _print_notes(caught)
        rows = [[key, str(tuple(t.shape)), str(t.dtype)] for key, t in tensors.items()]
        print_tables([ShownTable(rows, ("key", "shape", "type"), f"{path}: {len(rows)} tensors")], arguments.format)
        if arguments.format == "terminal":
            print(_how_to_convert(path, tensors))
        return
    description = read_description(resolve(path))
    model = load(path)
    rows = [
        [".".join(map(str, key)), str(leaf.shape), str(leaf.dtype)] for key, leaf in nnx.to_flat_state(nnx.state(model))
    ]
    table = ShownTable(rows, ("parameter", "shape", "type"), f"{path}: {description['family']}")
    print_tables([table], arguments.format)
    if arguments.format == "terminal":
        if (path / "report.md").is_file():
            print((path / "report.md").read_text())
        matmuls = sum(isinstance(module, QuantLinear) for _, module in nnx.iter_modules(model))
        others = len(description["quantization"]) - matmuls
        print(f"{model.config}\nquantised: {matmuls} matmuls, {others} scans or attentions; {memory_report(model)}")


def _how_to_convert(path: Path, tensors: dict[str, Any]) -> str:
    """The models whose names and shapes a checkpoint's tensors have, and the line that converts it."""
    found = matching_models(tensors)
    if not found:
        return "These are no tensors of a model that this library knows."
    name, fields = found[0]
    equal = [other for other, differ in found if differ == fields]
    line = " ".join(
        [
            "ouromamba convert",
            name,
            shlex.quote(str(path)),
            f"{name}/",
            *(f"--set {_field(*f)}" for f in fields.items()),
        ]
    )
    return (
        f"These are tensors of {' or '.join(equal)}{' with other fields' if fields else ''}. To convert them:\n  {line}"
    )


def _field(name: str, value: Any) -> str:
    """A config field as `parse_field` reads it."""
    return f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"


def parse_field(text: str) -> tuple[str, Any]:
    """FIELD=VALUE as (field, value): numbers, true, false, None, names, and tuples of numbers by commas.

    Raises:
      argparse.ArgumentTypeError: for anything else.
    """
    name, equals, value = text.partition("=")
    values = tuple(map(_value, value.removesuffix(",").split(",")))
    is_tuple = "," in value
    if not name or not equals or not value or (is_tuple and any(isinstance(v, str) for v in values)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not FIELD=VALUE, e.g. img_size=384, depths=2,4 or class_token=first"
        )
    return name, values if is_tuple else values[0]


def _value(text: str) -> int | float | bool | str | None:
    words = {"true": True, "True": True, "false": False, "False": False, "None": None}  # "none" is a class_token
    if text in words:
        return words[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
