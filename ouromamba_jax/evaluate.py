"""Running a model over a set of images, and scoring a quantised model against the float one."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ouromamba_jax.models.base import VisionModel, apply_stage
from ouromamba_jax.report import agreement, sqnr_db, top1, topk


def _forward(stages: list[tuple[nnx.GraphDef, nnx.State]], images: np.ndarray) -> np.ndarray:
    """Logits, stage by stage: what compiles is one block, however deep the model."""
    x: Any = images
    for graphdef, state in stages:
        x = apply_stage(graphdef, state, x)
    return np.asarray(x)


def predict(
    model: VisionModel, images: Float[Array | np.ndarray, "N H W 3"], *, batch_size: int = 128
) -> Float[np.ndarray, "N classes"]:
    """Logits of all images, in batches under `jax.jit`; a short last batch is filled up, so nothing is retraced."""
    stages = [nnx.split(stage) for _, stage in model.stages]
    size = min(batch_size, len(images))
    batches = [np.asarray(images[start : start + size]) for start in range(0, len(images), size)]
    return np.concatenate([_forward(stages, _fill(b, size))[: len(b)] for b in batches])


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
    stages = [nnx.split(stage) for _, stage in model.stages]
    logits, labels, timed, seconds, size = [], [], 0, 0.0, 0
    for images, batch_labels in batches:
        size = max(size, len(images))
        start = time.perf_counter()
        logits.append(_forward(stages, _fill(images, size))[: len(images)])
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
