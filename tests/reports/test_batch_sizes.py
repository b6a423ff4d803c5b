"""`evaluate` on batches of any sizes, and on a model whose logits are not finite."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ouromamba_jax.data.preprocessing import Preprocessing
from ouromamba_jax.evaluation.evaluate import evaluate, predict
from ouromamba_jax.evaluation.metrics import top1, topk

LABELS = np.arange(9) % 3


class Brightest(nnx.Module):
    """Logits are the means of the three channels and four that are lower."""

    def __call__(self, x):
        return jnp.concatenate([jnp.mean(x, axis=(1, 2)), jnp.full((len(x), 4), -5.0)], axis=1)


@pytest.fixture
def model():
    half = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config = SimpleNamespace(preprocessing=half, img_size=2, num_classes=7)
    return SimpleNamespace(stages=(("head", Brightest()),), config=config)


@pytest.fixture
def images():
    """Nine, of which the first six show their class."""
    x = np.full((9, 2, 2, 3), -0.5, np.float32)
    x[np.arange(9), :, :, (LABELS + (np.arange(9) >= 6)) % 3] = 0.5
    return x


@pytest.mark.parametrize(
    "sizes",
    [(9,), (3, 3, 3), (4, 4, 1), (1, 4, 4), (2, 2, 5), (0, 4, 5), (4, 5, 0), (4, 0, 5), (1, 2, 3, 3)],
    ids=str,
)
def test_batches_of_any_sizes_score_the_same(sizes, model, images):
    ends = np.cumsum(sizes)
    batches = [(images[e - n : e], LABELS[e - n : e]) for n, e in zip(sizes, ends, strict=True)]
    result = evaluate(model, batches)
    assert (result.top1, result.top5, result.images, result.non_finite) == (6 / 9, 1.0, 9, 0)
    assert (result.agreement, result.sqnr_db) == (1, np.inf)
    assert 0 < result.images_per_second < np.inf


@pytest.mark.parametrize("batches", [[], [(np.zeros((0, 2, 2, 3), np.float32), np.zeros(0, np.int32))]])
def test_no_images_are_no_score(batches, model):
    with pytest.raises(ValueError, match="there are no images to evaluate on"):
        evaluate(model, batches)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_wrong_and_counted(value, model, images):
    """A row of NaN has its first class on top: label 0, which is that of images 0 and 3."""
    images[[0, 3, 8]] = value
    for size in (2, 9):
        batches = [(images[i : i + size], LABELS[i : i + size]) for i in range(0, 9, size)]
        result = evaluate(model, batches)
        assert (result.top1, result.top5, result.non_finite) == (4 / 9, 6 / 9, 3)
    assert np.isnan(predict(model, images)).any(axis=1).sum() == (3 if np.isnan(value) else 0)


def test_one_logit_that_is_not_finite_makes_a_row_wrong():
    logits = np.array([[0.0, 1.0, np.nan], [0.0, 1.0, np.inf], [0.0, 1.0, 2.0]])
    assert top1(logits, np.array([1, 2, 2])) == 1 / 3
    assert topk(logits, np.array([1, 2, 0]), 3) == 1 / 3


def test_a_label_that_is_no_class_is_found_at_its_batch(model, images):
    def batches():
        yield images[:2], np.array([0, 7])
        pytest.fail("the next batch was asked for")

    with pytest.raises(ValueError, match="there is a label 7, but the model has 7 classes"):
        evaluate(model, batches())
