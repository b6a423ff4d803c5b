"""The verb that makes images: generate."""

import argparse

import jax
import numpy as np

from ouromamba_jax import GenConfig, Generated, generate_images
from ouromamba_jax.checkpoint import load
from ouromamba_jax.cli.common import Verb, check_output, given, parse_seed, unfinished
from ouromamba_jax.data import to_pixels
from ouromamba_jax.files import whole_file
from ouromamba_jax.report.figures import image_grid, new_figure

HEADING = (
    "Synthetic calibration images, and the class each was made for.\n"
    "They need not look like photographs: they are to excite the model as real images do."
)


def add_verbs(verb: Verb) -> None:
    """Adds generate to the command."""
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
    sub.add_argument(
        "--resume",
        metavar="DIR",
        help="keep the run's state here, to continue it or to extend it; by default beside OUT until it is done",
    )
    sub.add_argument("--figure", help="PNG with the first 64 images")


def generate(arguments: argparse.Namespace) -> None:
    check_output(arguments.out, suffix=".npz")
    config = GenConfig(**given(arguments, GenConfig))
    if arguments.figure:
        check_output(arguments.figure, suffix=".png")
        new_figure(1.0, 1.0)  # without Matplotlib it fails here, not after the generation
    model = load(arguments.model)
    with unfinished(arguments) as folder:
        generated = generate_images(model, config, jax.random.key(arguments.seed), progress=True, checkpoint_dir=folder)
        save_images(arguments.out, generated)
    print(f"{arguments.out}: {len(generated.images)} images")
    if arguments.figure:
        pixels = to_pixels(generated.images[:64], model.config.preprocessing)
        titles = [str(int(target)) for target in generated.targets[:64]]
        image_grid(arguments.figure, pixels, titles, heading=HEADING)
        print(arguments.figure)


def save_images(path: str, generated: Generated) -> None:
    """Writes images and labels where `load_images` reads them, an .npz."""
    with whole_file(path) as file:
        np.savez_compressed(file, images=np.asarray(generated.images), labels=np.asarray(generated.targets))
