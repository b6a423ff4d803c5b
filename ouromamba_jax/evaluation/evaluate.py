"""Running a model over a set of images, and scoring a quantised model against the float one."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ouromamba_jax.evaluation.metrics import agreement, hits, sqnr_db, top1
from ouromamba_jax.models.base import VisionModel, apply_stage
from ouromamba_jax.ops.cpu_miscompile import warn_if_miscompiled
from ouromamba_jax.sharding import data_mesh, replicate, split_samples, to_host

_NO_IMAGES = "there are no images to evaluate on; name a data set that has some."


class StageRunner:
    """A model ready for batches of one size: its stages on every device, the samples of a batch spread over them.

    Stage by stage, what compiles is one block, however deep the model. On one device nothing is placed: `jax.jit` would
    compile again for explicitly placed arrays the stages that `quantize` has already compiled.
    """

    def __init__(self, model: VisionModel, batch_size: int):
        warn_if_miscompiled()
        self.size, self.mesh = batch_size, data_mesh(batch_size)
        self.stages = [nnx.split(stage) for _, stage in model.stages]
        if self.mesh.size > 1:
            self.stages = [(graphdef, replicate(self.mesh, state)) for graphdef, state in self.stages]

    def __call__(self, images: np.ndarray) -> Float[np.ndarray, "N classes"]:
        """Logits. A short batch is filled up with its first image, so that nothing is retraced."""
        batch = np.concatenate([images, np.repeat(images[:1], self.size - len(images), axis=0)])
        return to_host(self.mesh, self.run(self.place(batch)))[: len(images)]

    def place(self, images: Array | np.ndarray) -> Float[Array, "B H W 3"]:
        """A whole batch, where `run` takes it from."""
        return split_samples(self.mesh, images) if self.mesh.size > 1 else jnp.asarray(images)

    def run(self, x: Array, stop: int | None = None) -> Array:
        """What the stages before `stop`, by default all, make of a placed batch."""
        for graphdef, state in self.stages[:stop]:
            x = apply_stage(graphdef, state, x)
        return x


def predict(
    model: VisionModel, images: Float[Array | np.ndarray, "N H W 3"], *, batch_size: int = 128
) -> Float[np.ndarray, "N classes"]:
    """Logits of all images, in batches under `jax.jit`, spread over all devices. NaN where a pixel is not finite.

    Raises:
      ValueError: if there are no images, or they are not normalised (`Preprocessing.check_normalised`).
    """
    if not len(images):
        raise ValueError(_NO_IMAGES)
    model.config.preprocessing.check_normalised(images, finite=False)
    run = StageRunner(model, min(batch_size, len(images)))
    return np.concatenate([run(np.asarray(images[i : i + run.size])) for i in range(0, len(images), run.size)])


@dataclass(frozen=True)
class Score:
    """A quantised model against the float one: accuracies as fractions, the logits' signal to noise in dB."""

    top1: float
    agreement: float
    sqnr_db: float


def score(
    logits: Float[np.ndarray, "N K"], reference: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"]
) -> Score:
    """Top-1 against the labels; agreement and SQNR against the float model's logits."""
    return Score(top1(logits, labels), agreement(logits, reference), sqnr_db(reference, logits))


@dataclass(frozen=True)
class Accuracy:
    """Result of `evaluate`: fractions, numbers of images, and images per second without batches that compile.

    `non_finite` images have logits that are not finite, and count as wrong.
    """

    top1: float
    top5: float
    images: int
    images_per_second: float
    non_finite: int


def evaluate(model: VisionModel, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Accuracy:
    """Accuracy over (images, labels) batches of any sizes; one that is larger than all before it compiles anew.

    Raises:
      ValueError: if there are no images, the first batch is not normalised (`Preprocessing.check_normalised`), or a
        label is no class of the model.
    """
    run = None
    first, fifth, count, non_finite, timed, seconds = 0, 0, 0, 0, 0, 0.0
    for images, labels in batches:
        if not len(images):
            continue
        if not count:
            model.config.preprocessing.check_normalised(images, finite=False)
        start = time.perf_counter()
        is_new = run is None or len(images) > run.size
        if is_new:
            run = StageRunner(model, len(images))
        logits = run(images)
        if not is_new:
            seconds += time.perf_counter() - start
            timed += len(images)
        count += len(images)
        first += int(hits(logits, labels, 1).sum())
        fifth += int(hits(logits, labels, 5).sum())
        non_finite += int((~np.isfinite(logits).all(axis=-1)).sum())
    if not count:
        raise ValueError(_NO_IMAGES)
    speed = timed / seconds if seconds else float("nan")
    return Accuracy(first / count, fifth / count, count, speed, non_finite)
