"""The `ouromamba` command: every verb is a few lines over one call of the library."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from ouromamba_jax import __version__
from ouromamba_jax.cli import checkpoints, demo, exporting, generate, measurement, quantize
from ouromamba_jax.ops.cpu_miscompile import mend_miscompile
from ouromamba_jax.sharding import keep_freed_memory, use_all_cores

_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError, jax.errors.JaxRuntimeError)
"""Bad input, and machines that are too small for it; anything else is a fault of ours and shows its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; an error is one sentence on stderr and exit status 1 (2 for wrong usage)."""
    arguments = _parser().parse_args(argv)
    _prepare_jax()
    try:
        arguments.run(arguments)
    except _EXPECTED as error:
        if arguments.debug:
            raise
        print(f"ouromamba: {_sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = getattr(arguments, "resume", None)
        goes_on = f"; the same command goes on from {kept}" if kept and Path(kept).exists() else ""
        print(f"ouromamba: interrupted{goes_on}.", file=sys.stderr)
        return 130
    return 0


def command() -> None:
    """What the shell runs: `main`, and after an interruption no waiting for threads that still compile."""
    status = main()
    if status == 130:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{'' if error.filename is None else f'{error.filename}: '}{error.strerror.lower()}."
    return " ".join(str(error).split()) or type(error).__name__


def _prepare_jax() -> None:
    """What the command asks of JAX and the system: every core, right results, memory and programs that are kept."""
    mend_miscompile()
    use_all_cores()
    keep_freed_memory()
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "ouromamba" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults that say something: neither "None" nor "False"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ouromamba", description="Data-free quantisation of vision Mamba models in JAX."
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of one sentence")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
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

    modules = (checkpoints, generate, quantize, measurement, exporting, demo)
    for module in modules:
        module.add_verbs(verb)
    return parser


if __name__ == "__main__":
    command()
