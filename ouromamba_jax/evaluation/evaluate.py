"""Running a model over a set of images, and scoring a quantised model against the float one."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ouromamba_jax.evaluation.metrics import agreement, decibels, hits, sqnr_db, top1
from ouromamba_jax.models.base import VisionModel, apply_stage
from ouromamba_jax.ops.cpu_miscompile import warn_if_miscompiled
from ouromamba_jax.sharding import data_mesh, replicate, split_samples, to_host, without_mesh


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
        """Logits. A short batch is filled up with its first image, an empty one with zeros: nothing is retraced."""
        dtype = np.float32 if images.dtype == np.float64 else images.dtype
        batch = np.zeros((self.size, *images.shape[1:]), dtype)
        batch[: len(images)] = images
        if len(images):
            batch[len(images) :] = images[0]
        return to_host(self.mesh, self.run(self.place(batch)))[: len(images)]

    def place(self, images: Array | np.ndarray) -> Float[Array, "B H W I"]:
        """A whole batch, where `run` takes it from."""
        return split_samples(self.mesh, images) if self.mesh.size > 1 else jnp.asarray(images)

    def run(self, x: Array, stop: int | None = None) -> Array:
        """What the stages before `stop`, by default all, make of a placed batch."""
        for graphdef, state in self.stages[:stop]:
            x = apply_stage(graphdef, state, x)
        return x


@without_mesh
def predict(
    model: VisionModel, images: Float[Array | np.ndarray, "N H W I"], *, batch_size: int = 128
) -> Float[np.ndarray, "N classes"]:
    """Logits of all images, in batches under `jax.jit`, spread over all devices. NaN where a pixel is not finite.

    Raises:
      ValueError: if the images have another shape, or are not normalised (`Preprocessing.check_normalised`).

    Examples:
      >>> import numpy as np
      >>> import ouromamba_jax as om
      >>> from ouromamba_jax.evaluation.evaluate import predict
      >>> predict(om.load("vim_micro"), np.zeros((3, 32, 32, 3), np.float32), batch_size=2).shape
      (3, 10)
    """
    images = model.config.preprocessing.checked(images, finite=False)
    run = StageRunner(model, min(batch_size, max(1, len(images))))
    starts = range(0, max(1, len(images)), run.size)  # one batch of zeros where there are no images
    return np.concatenate([run(np.asarray(images[start : start + run.size])) for start in starts])


@dataclass(frozen=True)
class Score:
    """A quantised model against the float one: accuracies as fractions, the logits' signal to noise in dB."""

    top1: float
    agreement: float
    sqnr_db: float


def score(
    logits: Float[np.ndarray, "N K"], reference: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"]
) -> Score:
    """Top-1 against the labels; agreement and SQNR against the float model's logits.

    Examples:
      >>> import numpy as np
      >>> from ouromamba_jax.evaluation.evaluate import score
      >>> reference = np.asarray([[2.0, 1.0], [0.0, 3.0]])
      >>> score(reference + 0.1, reference, labels=np.asarray([0, 0])).top1
      0.5
    """
    return Score(top1(logits, labels), agreement(logits, reference), sqnr_db(reference, logits))


@dataclass(frozen=True)
class Accuracy:
    """What a model makes of labelled images, beside a reference: fractions, images, dB, and images per second.

    `non_finite` images have logits that are not finite, and count as wrong. `agreement` is the share of images that
    the reference puts into the same class, `sqnr_db` the signal to noise of the logits against its own. No batch counts
    for the speed in which something is compiled.
    """

    top1: float
    top5: float
    images: int
    images_per_second: float
    non_finite: int
    agreement: float
    sqnr_db: float


class _Tally:
    """Sums over the batches that one model has seen."""

    def __init__(self, model: VisionModel):
        self.model = model
        self.run: StageRunner | None = None
        self.first = self.fifth = self.agree = self.non_finite = self.count = self.timed = 0
        self.signal = self.noise = self.seconds = 0.0

    def logits(self, images: np.ndarray) -> Float[np.ndarray, "N classes"]:
        """Logits of a batch; one that is larger than all before it compiles anew."""
        if self.run is None or len(images) > self.run.size:
            self.run = StageRunner(self.model, len(images))
            return self.run(images)
        return self.timed_logits(images)

    def timed_logits(self, images: np.ndarray) -> Float[np.ndarray, "N classes"]:
        start = time.perf_counter()
        logits = self.run(images)  # type: ignore[misc]  # there is one by now
        self.seconds += time.perf_counter() - start
        self.timed += len(images)
        return logits

    def add(self, logits: np.ndarray, labels: np.ndarray, reference: np.ndarray) -> None:
        self.count += len(labels)
        self.first += int(hits(logits, labels, 1).sum())
        self.fifth += int(hits(logits, labels, 5).sum())
        self.non_finite += int((~np.isfinite(logits).all(axis=-1)).sum())
        self.agree += int(hits(logits, np.argmax(reference, -1), 1).sum())
        with np.errstate(invalid="ignore"):  # logits may be infinite
            self.signal += float(np.sum(np.square(reference, dtype=np.float64)))
            self.noise += float(np.sum(np.square(reference - logits, dtype=np.float64)))

    def accuracy(self) -> Accuracy:
        first, fifth, agree = (n / self.count for n in (self.first, self.fifth, self.agree))
        ratio = decibels(self.signal, self.noise)
        return Accuracy(first, fifth, self.count, self.timed / self.seconds, self.non_finite, agree, ratio)


@without_mesh
def compare(models: Mapping[str, VisionModel], batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, Accuracy]:
    """Accuracy of models, by name, over the same (images, labels) batches of any sizes; the first is the reference.

    Raises:
      ValueError: if there are no images, the models' inputs or classes differ, the images of a batch have another shape
        or are not normalised (`Preprocessing.check_normalised`), or a label is no class of the models.

    Examples:
      >>> import ouromamba_jax as om
      >>> from ouromamba_jax.data import load_images
      >>> from ouromamba_jax.evaluation.evaluate import compare
      >>> model = om.load("vim_micro")
      >>> data = load_images("digits", "test", 32, model.config.preprocessing, limit=16)
      >>> compare({"float": model, "again": model}, [(data.images, data.labels)])["again"].agreement
      1.0
    """
    tallies = {name: _Tally(model) for name, model in models.items()}
    configs = [(m.config.img_size, m.config.preprocessing, m.config.num_classes) for m in models.values()]
    for name, config in zip(models, configs, strict=True):
        if config != configs[0]:
            raise ValueError(
                f"{name} and {next(iter(models))} differ in image size, preprocessing or classes; compare models that "
                "see the same images."
            )
    images, has_dark = None, False
    for given, labels in batches:
        if not len(given):
            continue
        images = configs[0][1].checked(given, finite=False, may_be_bright=has_dark)
        has_dark = has_dark or bool((images < 0).any())
        reference = None
        for tally in tallies.values():
            logits = tally.logits(images)
            reference = logits if reference is None else reference
            tally.add(logits, labels, reference)
    if images is None:
        raise ValueError("there are no images to evaluate on; name a data set that has some.")
    for tally in tallies.values():
        if not tally.timed:
            tally.timed_logits(images)
    return {name: tally.accuracy() for name, tally in tallies.items()}


def evaluate(model: VisionModel, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Accuracy:
    """Accuracy over (images, labels) batches, the model being its own reference. Raises as `compare` does.

    Examples:
      >>> import ouromamba_jax as om
      >>> from ouromamba_jax.data import load_images
      >>> from ouromamba_jax.evaluation.evaluate import evaluate
      >>> model = om.load("vim_micro")
      >>> data = load_images("digits", "test", 32, model.config.preprocessing, limit=16)
      >>> result = evaluate(model, [(data.images, data.labels)])
      >>> result.images, result.top1 > 0.9
      (16, True)
    """
    return compare({"model": model}, batches)["model"]
