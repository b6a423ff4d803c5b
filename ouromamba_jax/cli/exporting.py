"""The verb that hands a model to other programs: export."""

import argparse
import warnings

from ouromamba_jax import export
from ouromamba_jax.checkpoint import load
from ouromamba_jax.cli.common import Verb, check_output
from ouromamba_jax.export import PLATFORMS, SUFFIX, ExportNote
from ouromamba_jax.files import local_path


def add_verbs(verb: Verb) -> None:
    """Adds export to the command."""
    sub = verb("export", export_verb, "a program that JAX alone can run", "vim_micro vim_micro.stablehlo")
    sub.add_argument("model", help="checkpoint folder, float or quantised, or the name of a shipped one")
    sub.add_argument("out", help=f"{SUFFIX} to write; docs/guides/export.md says how it is called")
    sub.add_argument(
        "--weights",
        choices=("inside", "beside"),
        default="inside",
        help="the program, or in a .safetensors of its name, which other runtimes can read, too",
    )
    sub.add_argument("--batch-size", type=int, help="images of every call; by default any number")


def export_verb(arguments: argparse.Namespace) -> None:
    check_output(arguments.out, suffix=SUFFIX)
    batch = "b" if arguments.batch_size is None else arguments.batch_size
    model = load(arguments.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExportNote)
        export(arguments.out, model, batch, weights=arguments.weights)
    for warning in caught:
        print(warning.message)
    file = local_path(arguments.out)
    beside = f", its weights in {file.with_suffix('.safetensors')}" if arguments.weights == "beside" else ""
    print(f"{file}: {file.stat().st_size:,} bytes for {', '.join(PLATFORMS)}, batch {batch}{beside}")
