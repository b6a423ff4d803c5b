"""The verbs of checkpoints: convert, inspect."""

import argparse
from pathlib import Path

from flax import nnx

from ouromamba_jax import from_torch, list_models, memory_report, save
from ouromamba_jax.checkpoint import load, read_description, resolve
from ouromamba_jax.cli.common import Verb, check_output
from ouromamba_jax.report.tables import print_table


def add_verbs(verb: Verb) -> None:
    """Adds convert and inspect to the command."""
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

    sub = verb("inspect", inspect, "what a checkpoint holds", "vim_t_midclstok_76p1acc.pth")
    sub.add_argument("path", help="native checkpoint folder, .pth or .safetensors")
    sub.add_argument("--entry", help="entry of a training file")


def convert(arguments: argparse.Namespace) -> None:
    check_output(arguments.out)
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


def _field(text: str) -> tuple[str, int | float | tuple[int | float, ...]]:
    name, _, value = text.partition("=")
    try:
        numbers = tuple(int(v) if v.lstrip("+-").isdigit() else float(v) for v in value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=NUMBER, e.g. img_size=384") from None
    return name, numbers[0] if len(numbers) == 1 else numbers
