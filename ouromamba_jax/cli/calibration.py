"""The verbs that make a low-bit model: generate, quantize."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from ouromamba_jax import GenConfig, QuantConfig, generate_images, memory_report, quantize, save
from ouromamba_jax.checkpoint import load
from ouromamba_jax.cli.common import Verb, bar, check_output, given, parse_seed
from ouromamba_jax.data import load_images, to_pixels
from ouromamba_jax.files import whole_file
from ouromamba_jax.quantize import PRESETS
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
    sub.add_argument("--bits", required=True, choices=PRESETS, help="weights and activations")
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
    config = QuantConfig.preset(arguments.bits, **given(arguments, QuantConfig))
    model = load(arguments.model)
    images = load_images(
        arguments.images, arguments.split, model.config.img_size, model.config.preprocessing, limit=arguments.limit
    ).images
    with bar("quantising") as advance:
        quantised, report = quantize(model, jnp.asarray(images), config, progress=advance)
    save(arguments.out, quantised)
    print(report)
    print(f"\n{arguments.out}: {memory_report(quantised)}")
