"""The verb that makes a low-bit model, without data: quantize."""

import argparse
import dataclasses
import re
import shutil
import types
import typing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ouromamba_jax import GenConfig, QuantConfig, QuantRule, generate_images, list_models, quantize, save
from ouromamba_jax.checkpoint import is_checkpoint, is_shipped, load
from ouromamba_jax.cli.checkpoints import add_source_options, converted
from ouromamba_jax.cli.common import Verb, bar, check_output, chosen_split, given, parse_seed, unfinished
from ouromamba_jax.cli.generate import save_images
from ouromamba_jax.convert import load_tensors, matching_models
from ouromamba_jax.data import load_images
from ouromamba_jax.evaluation.evaluate import predict
from ouromamba_jax.evaluation.metrics import agreement, sqnr_db
from ouromamba_jax.files import local_path, write_json, write_text
from ouromamba_jax.models import VisionModel
from ouromamba_jax.quantize.report import finite, memory_report
from ouromamba_jax.quantize.sites import resolve_sites


def add_verbs(verb: Verb) -> None:
    """Adds quantize to the command."""
    sub = verb(
        "quantize",
        quantize_verb,
        "a low-bit model, without data: its calibration images are generated",
        "vim_t_midclstok_76p1acc.pth --model vim_tiny --bits w4a4 vim_tiny_w4a4/",
    )
    sub.add_argument("source", help="checkpoint folder, name of a shipped one, or with --model what convert takes")
    sub.add_argument("out", help="folder to write: the model, report.md and report.json, and the images it generated")
    sub.add_argument("--model", help=f"what the source is of, if it is not converted yet: {', '.join(list_models())}")
    add_source_options(sub)
    sub.add_argument("--images", help="calibration images, generated otherwise: .npz, folder, digits, or tfds:NAME")
    sub.add_argument("--split", help="split of a named data set, by default train")
    sub.add_argument("--limit", type=int, help="use this many images; by default all")
    sub.add_argument("--num-images", type=int, help=f"images to generate, by default {GenConfig.num_images}")
    sub.add_argument("--iterations", type=int, help=f"updates per generated batch, by default {GenConfig.iterations}")
    sub.add_argument("--seed", type=parse_seed, help="of the generation, by default 0: same seed, same images")
    sub.add_argument("--no-keep-images", action="store_true", help="leave the generated images out of OUT")
    sub.add_argument("--bits", help="of weights and activations, e.g. w4a4, w8a8, w3a8; a16 leaves activations float")
    sub.add_argument("--weight-bits", type=int, help="instead of those in --bits")
    sub.add_argument("--act-bits", type=int, help="instead of those in --bits")
    sub.add_argument("--outlier-bits", type=int, help="by default 8 with activations of up to 6 bits, else 16")
    sub.add_argument(
        "--rule",
        action="append",
        metavar="PATTERN:FIELD=VALUE,...",
        help="exception for the layers whose path matches, e.g. in_proj:act_bits=8,outlier_bits=16 or "
        "'blocks.0:skip'; of several, a later one overrides an earlier one field by field",
    )
    sub.add_argument(
        "--detection",
        choices=("dynamic", "static", "none"),
        default=QuantConfig.detection,
        help="of outlier channels",
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
        "--weight-rounding",
        choices=("gptq", "nearest"),
        default=QuantConfig.weight_rounding,
        help="of weights: gptq, where later inputs make up for the rounding of earlier ones, or to the nearest",
    )
    sub.add_argument(
        "--tune-epochs",
        type=int,
        default=QuantConfig.tune_epochs,
        help="passes over the images to tune the scales; 0: none",
    )
    sub.add_argument("--batch-size", type=int, default=QuantConfig.batch_size, help="images per step of calibration")
    sub.add_argument("--json", action="store_true", help="print the whole report as JSON")


@dataclasses.dataclass(frozen=True)
class Scores:
    """What quantising cost, on the images of calibration."""

    calibration_images: int
    agreement: float
    sqnr_db: float


def quantize_verb(arguments: argparse.Namespace) -> None:
    check_output(arguments.out)
    _check_used(arguments)
    config = quant_config(arguments)
    model = _float_model(arguments)
    resolve_sites(model, config)  # what is wrong with the rules is said before images are made
    out = local_path(arguments.out)
    with unfinished(arguments) as folder:
        images, generated = _calibration_images(arguments, model, folder)
        with bar("quantising") as advance:
            quantised, report = quantize(model, jnp.asarray(images), config, progress=advance, resume=folder)
        reference, logits = (predict(m, images, batch_size=config.batch_size) for m in (model, quantised))
        scores = Scores(len(images), agreement(logits, reference), sqnr_db(reference, logits))
        whole = folder / "result"
        shutil.rmtree(whole, ignore_errors=True)
        save(whole, quantised)
        write_json(whole / "report.json", finite(report.to_json() | dataclasses.asdict(scores)))
        write_text(whole / "report.md", report.markdown())
        if generated is not None and not arguments.no_keep_images:
            save_images(str(whole / "images.npz"), generated)
        whole.replace(out)
    if arguments.json:
        print((out / "report.json").read_text())
        return
    print(
        f"{arguments.out}: {report.summary()}\n"
        f"logits: {scores.sqnr_db:.1f} dB SQNR, {100 * scores.agreement:.1f} % of the classes are the float "
        f"model's, on the {len(images)} calibration images\n"
        f"size: {memory_report(quantised)}\n"
        f"every site: {out / 'report.md'}, or ouromamba inspect {arguments.out}"
    )


def _check_used(arguments: argparse.Namespace) -> None:
    """Refuses options that the others make idle.

    Raises:
      ValueError: naming the option and what it needs.
    """
    reading = ("set", "entry", "prefix", "revision", "fresh_head", "interpolate_positions")
    idle = {
        "--model": reading if arguments.model is None else (),
        "--images": ("split", "limit") if arguments.images is None else (),
        "no --images": ("num_images", "iterations", "seed", "no_keep_images") if arguments.images is not None else (),
    }
    for needed, names in idle.items():
        for name in names:
            if getattr(arguments, name) not in (None, False):
                raise ValueError(f"--{name.replace('_', '-')} needs {needed}; change one of the two.")


def _float_model(arguments: argparse.Namespace) -> VisionModel:
    """The model to quantise: a checkpoint of ours, or another one under the name of its model.

    Raises:
      ValueError: if the source needs a name and has none, or has one and needs none.
    """
    path = local_path(arguments.source)
    if arguments.model is not None:
        if is_checkpoint(path) or is_shipped(arguments.source):
            raise ValueError(f"{path} is converted already and knows its model; leave out --model {arguments.model}.")
        return converted(arguments.model, arguments)
    if path.exists() and not is_checkpoint(path):
        names = [name for name, fields in matching_models(load_tensors(path, entry=arguments.entry)) if not fields]
        known = f"it fits {' and '.join(names)}" if names else f"ouromamba inspect {arguments.source} names what fits"
        raise ValueError(f"{path} is not converted yet; say with --model which model it is of: {known}.")
    return load(arguments.source)


def _calibration_images(arguments: argparse.Namespace, model: VisionModel, folder: Path) -> tuple[np.ndarray, Any]:
    """(images, and what was generated if they are)."""
    if arguments.images is not None:
        config = model.config
        split = chosen_split(arguments.images, arguments.split, "train")
        loaded = load_images(arguments.images, split, config.img_size, config.preprocessing, limit=arguments.limit)
        return loaded.images, None
    given_sizes = {name: getattr(arguments, name) for name in ("num_images", "iterations")}
    config = GenConfig(**{name: value for name, value in given_sizes.items() if value is not None})
    key = jax.random.key(arguments.seed or 0)
    generated = generate_images(model, config, key, progress=True, checkpoint_dir=folder / "images")
    return np.asarray(generated.images), generated


def quant_config(arguments: argparse.Namespace) -> QuantConfig:
    """What --bits and the options beside it say; any bits have the presets' rule for the first and the last layer.

    Raises:
      ValueError: for bits or rules that mean nothing.
    """
    spelled = {}
    if arguments.bits is not None:
        match = re.fullmatch(r"w(\d+)a(\d+)", arguments.bits.lower())
        if match is None:
            raise ValueError(
                f"--bits {arguments.bits} means nothing; give the bits of weights and activations, e.g. --bits w4a4."
            )
        spelled = {"weight_bits": int(match[1]), "act_bits": int(match[2])}
    spelled |= {name: value for name in ("weight_bits", "act_bits") if (value := getattr(arguments, name)) is not None}
    if len(spelled) < 2:
        raise ValueError("the bits are missing; give those of weights and activations, e.g. --bits w4a4.")
    if not 2 <= spelled["act_bits"] <= 8 and spelled["act_bits"] != 16:
        raise ValueError(f"activations cannot have {spelled['act_bits']} bits; give 2 to 8, or 16 to leave them float.")
    bits = given(arguments, QuantConfig) | spelled | {"rules": tuple(map(parse_rule, arguments.rule or ()))}
    preset = "w4a4" if bits["act_bits"] <= 6 else "w8a8"
    return QuantConfig.preset(preset, **bits | ({"act_bits": None} if bits["act_bits"] == 16 else {}))


def parse_rule(text: str) -> QuantRule:
    """The rule "PATTERN:FIELD=VALUE,..."; a flag has no value, and "+" joins several names.

    Raises:
      ValueError: for another form, and for a field or a value that `QuantRule` does not have.
    """
    pattern, _, settings = text.rpartition(":")
    kinds = {field.name: field.type for field in dataclasses.fields(QuantRule) if field.name != "pattern"}
    fields = {}
    for setting in settings.split(","):
        name, _, value = setting.partition("=")
        try:
            if not pattern:
                raise ValueError
            fields[name] = _value(kinds[name], value)
        except (KeyError, ValueError):
            raise ValueError(
                f"{setting!r} in the rule {text!r} sets nothing; write PATTERN:FIELD=VALUE,... with the fields "
                f"{', '.join(kinds)}."
            ) from None
    return QuantRule(pattern, **fields)


def _value(kind: Any, text: str) -> Any:
    """`text` as a field of this annotation, None aside."""
    kind = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind
    if kind is bool:
        return {"": True, "true": True, "false": False}[text.lower()]
    if typing.get_origin(kind) is tuple:
        return tuple(text.split("+"))
    return kind(text) if kind in (int, float) else text
