"""Images as lists, in float64, without a batch, with channels first: they work, or the sentence names the shape."""

import jax.numpy as jnp
import numpy as np
import pytest
from linear_model import LinearModel
from PIL import Image

from ouromamba_jax import QuantConfig, quantize
from ouromamba_jax.evaluation.evaluate import compare, evaluate, predict


class Staged(LinearModel):
    stages = property(lambda self: (("head", self.head),))


MODEL = Staged()
IMAGES = np.random.default_rng(0).normal(size=(4, 4, 4, 3)).astype(np.float32)
LABELS = np.zeros(4, np.int32)
DOORS = {
    "predict": lambda images: predict(MODEL, images),
    "evaluate": lambda images: evaluate(MODEL, [(images, LABELS[: len(images)])]),
    "compare": lambda images: compare({"a": MODEL, "b": MODEL}, [(images, LABELS[: len(images)])]),
    "quantize": lambda images: quantize(MODEL, images, QuantConfig(tune_epochs=0)),
}


@pytest.mark.parametrize(
    "images",
    [[*IMAGES], tuple(map(jnp.asarray, IMAGES)), IMAGES.tolist(), IMAGES.astype(np.float64), jnp.asarray(IMAGES)],
    ids=["list", "tuple of JAX's", "lists of lists", "float64", "JAX's"],
)
def test_what_is_obvious_works(images):
    logits = predict(MODEL, images, batch_size=3)
    np.testing.assert_array_equal(logits, predict(MODEL, IMAGES, batch_size=3))
    assert logits.dtype == np.float32
    assert evaluate(MODEL, [(images, np.argmax(logits, -1))]).top1 == 1


WRONG = {
    "one image": (IMAGES[0], r"have shape \(4, 4, 3\), .* \(batch, height, width, 3\); one image is .* images\[None\]"),
    "channels first": (np.moveaxis(IMAGES, -1, 1)[:, :, :, :2], "channels come last"),
    "two channels": (IMAGES[..., :2], r"\(batch, height, width, 3\)"),
    "flat": (IMAGES.reshape(4, -1), r"\(batch, height, width, 3\)"),
    "other sizes": (
        [IMAGES[0], IMAGES[0, :2]],
        r"a list of arrays that differ .* \(batch, height, width, 3\)",
    ),
    "pictures": (
        [Image.fromarray(np.zeros((4, 4, 3), np.uint8))] * 2,
        "are uint8, .* give uint8 pixels to load",
    ),
    "texts": ([[[["a"] * 3]]], "images are <U1, but a model takes normalised floats"),
    "objects": (np.full((1, 2, 2, 3), None), "images are object"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_not_is_refused_at_every_door(kind, door):
    images, says = WRONG[kind]
    with pytest.raises(ValueError, match=says):
        DOORS[door](images)


def test_every_batch_is_looked_at():
    raw = (IMAGES - IMAGES.min()) / np.ptp(IMAGES)
    for later, says in ((255 * raw, "are 0 to 255"), (IMAGES[0], "have shape")):
        with pytest.raises(ValueError, match=says):
            evaluate(MODEL, [(IMAGES, LABELS), (IMAGES, LABELS), (later, LABELS)])
    with pytest.raises(ValueError, match="lie within 0 and 1"):
        evaluate(MODEL, [(raw, LABELS), (IMAGES, LABELS)])
    evaluate(MODEL, [(IMAGES, LABELS), (raw, LABELS)])  # pictures that happen to be bright
