"""Running a model over a set of images, and scoring a quantised model against the float one."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ouromamba_jax.models import VisionModel
from ouromamba_jax.report import agreement, sqnr_db, top1, topk


@partial(jax.jit, static_argnums=0)
def forward(graphdef: nnx.GraphDef, state: nnx.State, images: Array) -> Float[Array, "N classes"]:
    """A model's logits; two models of equal structure share one compilation."""
    return nnx.merge(graphdef, state)(images)


def predict(
    model: VisionModel, images: Float[Array | np.ndarray, "N H W 3"], *, batch_size: int = 128
) -> Float[np.ndarray, "N classes"]:
    """Logits of all images, in batches under `jax.jit`; a short last batch is filled up, so nothing is retraced."""
    graphdef, state = nnx.split(model)
    size = min(batch_size, len(images))
    batches = [np.asarray(images[start : start + size]) for start in range(0, len(images), size)]
    return np.concatenate([np.asarray(forward(graphdef, state, _fill(b, size)))[: len(b)] for b in batches])


def _fill(batch: np.ndarray, size: int) -> np.ndarray:
    """Repeats the first image until the batch has `size`."""
    return np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])


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
    """Result of `evaluate`: fractions, number of images, and images per second without the first, compiling batch."""

    top1: float
    top5: float
    images: int
    images_per_second: float


def evaluate(model: VisionModel, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Accuracy:
    """Accuracy over (images, labels) batches of one size; only the last may be smaller.

    Raises:
      ValueError: if there are no batches.
    """
    graphdef, state = nnx.split(model)
    logits, labels, timed, seconds, size = [], [], 0, 0.0, 0
    for images, batch_labels in batches:
        size = max(size, len(images))
        start = time.perf_counter()
        logits.append(np.asarray(forward(graphdef, state, _fill(images, size)))[: len(images)])
        if len(logits) > 1:
            seconds += time.perf_counter() - start
            timed += len(images)
        labels.append(batch_labels)
    if not logits:
        raise ValueError("there are no images to evaluate on; name a data set that has some.")
    everything, truth = np.concatenate(logits), np.concatenate(labels)
    return Accuracy(
        top1(everything, truth),
        topk(everything, truth, 5),
        len(truth),
        timed / seconds if seconds else float("nan"),
    )
