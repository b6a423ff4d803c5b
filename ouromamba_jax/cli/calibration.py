"""The verbs that make a low-bit model: generate, quantize."""

import argparse
import dataclasses
import re
import types
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ouromamba_jax import GenConfig, QuantConfig, QuantRule, generate_images, memory_report, quantize, save
from ouromamba_jax.checkpoint import load
from ouromamba_jax.cli.common import Verb, bar, check_output, given, parse_seed
from ouromamba_jax.data import load_images, to_pixels
from ouromamba_jax.files import whole_file
from ouromamba_jax.report.figures import image_grid, new_figure


def add_verbs(verb: Verb) -> None:
    """Adds generate and quantize to the command."""
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
    sub.add_argument("--seed", type=parse_seed, default=0, help="same seed, same images")
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
    sub.add_argument("--bits", required=True, help="of weights and activations, e.g. w4a4, w6a6, w8a8, w3a8")
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
        "--tune-epochs",
        type=int,
        default=QuantConfig.tune_epochs,
        help="passes over the images to tune the scales; 0: none",
    )
    sub.add_argument("--batch-size", type=int, default=QuantConfig.batch_size, help="images per step of calibration")
    sub.add_argument("--resume", metavar="DIR", help="keep finished stages here, and continue behind them")


def generate(arguments: argparse.Namespace) -> None:
    check_output(arguments.out, suffix=".npz")
    config = GenConfig(**given(arguments, GenConfig))
    if arguments.figure:
        check_output(arguments.figure, suffix=".png")
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
    check_output(arguments.out)
    config = quant_config(arguments)
    model = load(arguments.model)
    images = load_images(
        arguments.images, arguments.split, model.config.img_size, model.config.preprocessing, limit=arguments.limit
    ).images
    with bar("quantising") as advance:
        quantised, report = quantize(model, jnp.asarray(images), config, progress=advance, resume=arguments.resume)
    save(arguments.out, quantised)
    print(report)
    print(f"\n{arguments.out}: {memory_report(quantised)}")


def quant_config(arguments: argparse.Namespace) -> QuantConfig:
    """What --bits and the options beside it say; any bits have the presets' rule for the first and the last layer.

    Raises:
      ValueError: for bits or rules that mean nothing.
    """
    match = re.fullmatch(r"w(\d+)a(\d+)", arguments.bits.lower())
    if match is None:
        raise ValueError(f"--bits {arguments.bits} means nothing; give the bits of weights and activations, e.g. w4a4.")
    bits = {"weight_bits": int(match[1]), "act_bits": int(match[2])} | given(arguments, QuantConfig)
    outlier_bits = 8 if bits["act_bits"] <= 6 else 16
    rules = tuple(map(parse_rule, arguments.rule or ()))
    return QuantConfig.preset("w4a4", **{"outlier_bits": outlier_bits} | bits, rules=rules)


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
