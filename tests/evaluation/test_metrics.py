"""Metrics against hand-made cases."""

import math

import numpy as np
import pytest

from ouromamba_jax.evaluation.metrics import agreement, sqnr_db, top1


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_top1_and_agreement(rng):
    logits = rng.normal(size=(200, 7))
    labels = np.array([row.tolist().index(max(row)) for row in logits])
    labels[:50] = (labels[:50] + 1) % 7
    assert top1(logits, labels) == 0.75
    other = logits.copy()
    other[:20, :] = -other[:20, :]  # the largest becomes the smallest
    assert agreement(logits, other) == 0.9
    with pytest.raises(ValueError, match="200 rows of logits"):
        top1(logits, labels[:10])
    with pytest.raises(ValueError, match="a label -1, which is no class"):
        top1(logits, labels - 1)
    with pytest.raises(ValueError, match="a label 7, but the model has 7 classes: use another data set or model"):
        top1(logits, labels + 1)


def test_sqnr_of_noise_a_tenth_of_the_signal_is_20_db(rng):
    signal, noise = rng.normal(size=(2, 40, 50)).astype(np.float32)
    noise *= np.sqrt(np.sum(signal**2) / np.sum(noise**2)) / 10
    assert sqnr_db(signal, signal + noise) == pytest.approx(20, abs=1e-3)
    assert sqnr_db(signal, signal) == math.inf
    assert sqnr_db(np.zeros(3), np.array([0.0, 1.0, 0.0])) == -math.inf
    with pytest.raises(ValueError, match="shape"):
        sqnr_db(signal, signal[:1])
