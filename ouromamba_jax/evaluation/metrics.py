"""What is measured: shares of right answers, and signal to noise."""

import math

import numpy as np
from jaxtyping import Array, Bool, Float, Int


def top1(logits: Float[Array | np.ndarray, "N K"], labels: Int[Array | np.ndarray, " N"]) -> float:
    """Share of the samples whose largest logit is their label's, in [0, 1]; raises as `topk` does."""
    return topk(logits, labels, 1)


def topk(logits: Float[Array | np.ndarray, "N K"], labels: Int[Array | np.ndarray, " N"], k: int) -> float:
    """Share of the samples that are `hits`, in [0, 1]; raises as it does."""
    return float(np.mean(hits(logits, labels, k)))


def hits(
    logits: Float[Array | np.ndarray, "N K"], labels: Int[Array | np.ndarray, " N"], k: int
) -> Bool[np.ndarray, " N"]:
    """Whether the label is among the k largest logits; never where a logit is not finite.

    Raises:
      ValueError: if there are not as many labels as rows of logits, or one is not in [0, K).
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"there are {logits.shape[0]} rows of logits but labels of shape {labels.shape}.")
    if labels.size and labels.min() < 0:
        raise ValueError(f"there is a label {labels.min()}, which is no class; score on images whose class is known.")
    if labels.size and labels.max() >= logits.shape[1]:
        raise ValueError(
            f"there is a label {labels.max()}, but the model has {logits.shape[1]} classes: use another data set or "
            "model."
        )
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    return np.any(best == labels[:, None], axis=-1) & np.isfinite(logits).all(axis=-1)


def agreement(logits: Float[Array | np.ndarray, "N K"], reference: Float[Array | np.ndarray, "N K"]) -> float:
    """Share of the samples for which two models name the same class, in [0, 1]."""
    return top1(logits, np.argmax(np.asarray(reference), -1))


def sqnr_db(reference: Float[Array | np.ndarray, "..."], value: Float[Array | np.ndarray, "..."]) -> float:
    """Signal to quantisation noise, 10 log10(sum reference^2 / sum (reference - value)^2), in dB; inf if equal."""
    reference, value = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    if reference.shape != value.shape:
        raise ValueError(f"the reference has shape {reference.shape}, but the value has {value.shape}.")
    return decibels(float(np.sum(reference**2)), float(np.sum((reference - value) ** 2)))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); inf without noise, NaN where a sum is."""
    if noise == 0:
        return math.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(np.divide(signal, noise)))
