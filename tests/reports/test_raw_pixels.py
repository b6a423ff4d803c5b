"""Pixels that are not normalised are refused wherever a model takes images, and normalised ones never are."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ouromamba_jax import QuantConfig, create_model, quantize
from ouromamba_jax.data import load_images
from ouromamba_jax.data.preprocessing import Preprocessing
from ouromamba_jax.evaluation.evaluate import evaluate, predict

IMAGENET = Preprocessing()
HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
UNIT = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


def normalised(pixels, preprocessing):
    mean, std = preprocessing.mean_and_std()
    return (np.asarray(pixels, np.float32) / 255 - mean) / std


RAW = {
    "uint8": (PIXELS, r"are uint8, .* compute \(images / 255 - mean\) / std"),
    "int32": (PIXELS.astype(np.int32), "are int32"),
    "0..255": (PIXELS.astype(np.float32), r"are 0 to 255, .* compute \(images / 255 - mean\) / std"),
    "0..1": (PIXELS.astype(np.float32) / 255, r"lie within 0 and 1, .* compute \(images - mean\) / std"),
    "centred": (PIXELS.astype(np.float32) - 128, r"reach from -128 to 127, .* compute \(images / 255 - mean\)"),
}


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("preprocessing", [IMAGENET, HALF], ids=["imagenet", "half"])
@pytest.mark.parametrize("kind", RAW)
def test_raw_pixels_are_refused_with_the_fix(kind, preprocessing, xp):
    images, says = RAW[kind]
    with pytest.raises(ValueError, match=says) as caught:
        preprocessing.check_normalised(xp.asarray(images))
    assert "mean, std = model.config.preprocessing.mean_and_std()" in str(caught.value)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("preprocessing", [IMAGENET, HALF, UNIT], ids=["imagenet", "half", "unit"])
def test_normalised_images_pass(preprocessing, xp):
    bordered = PIXELS.copy()
    bordered[:, :2] = 0
    bright = PIXELS // 2 + 128
    sets = [PIXELS, bordered, PIXELS // 8, bright, np.zeros_like(PIXELS), np.full_like(PIXELS, 255)]
    for pixels in sets:
        preprocessing.check_normalised(xp.asarray(normalised(pixels, preprocessing)))
    preprocessing.check_normalised(xp.zeros((1, 8, 8, 3), np.float32))
    noise = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    preprocessing.check_normalised(xp.asarray(2 * noise))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_floats_are_judged_too(dtype):
    HALF.check_normalised(jnp.asarray(normalised(PIXELS, HALF), dtype))
    with pytest.raises(ValueError, match="lie within 0 and 1"):
        HALF.check_normalised(jnp.asarray(PIXELS / 255, dtype))


def test_what_the_sentence_says_is_the_fix():
    mean, std = HALF.mean_and_std()
    for images in ((PIXELS / 255 - mean) / std, (jnp.asarray(PIXELS) / 255 - mean) / std):
        np.testing.assert_allclose(images, normalised(PIXELS, HALF), atol=1e-6)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_value_that_is_not_finite_is_found_among_many(value, xp):
    images = normalised(PIXELS, HALF)
    images[1, 2, 3, 0] = value
    with pytest.raises(ValueError, match="not finite, first in number 1; make them again"):
        HALF.check_normalised(xp.asarray(images))
    HALF.check_normalised(xp.asarray(images), finite=False)


@pytest.mark.parametrize("kind", RAW)
def test_every_door_refuses_them(kind):
    images, says = RAW[kind]
    model = create_model("vim_micro", rngs=nnx.Rngs(0), img_size=8, patch_size=4, stride=4, embed_dim=16, depth=1)
    stand_in = SimpleNamespace(config=model.config)
    for door in (
        lambda: predict(stand_in, images),
        lambda: evaluate(stand_in, [(images, np.zeros(3, np.int32))]),
        lambda: quantize(model, images, QuantConfig()),
    ):
        with pytest.raises(ValueError, match=says):
            door()


def test_float_images_of_a_file_are_judged_together(tmp_path):
    images = normalised(PIXELS, HALF)
    images[0] = np.linspace(0.2, 0.9, images[0].size).reshape(images[0].shape)  # one bright picture alone
    np.savez(tmp_path / "a.npz", images=images)
    np.testing.assert_array_equal(load_images(tmp_path / "a.npz", "test", 8, HALF).images, images)
    np.savez(tmp_path / "b.npz", images=PIXELS.astype(np.float32) / 255)
    with pytest.raises(ValueError, match=r"float images of \S+b\.npz lie within 0 and 1"):
        load_images(tmp_path / "b.npz", "test", 8, HALF)
