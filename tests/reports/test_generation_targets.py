"""Generated images are made for classes that exist, each for its own, and no more than were asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_model import LinearModel

from ouromamba_jax import GenConfig, generate_images
from ouromamba_jax.gen import class_targets, run

SMALL = GenConfig(num_images=4, batch_size=2, iterations=2, contrastive=0.0)
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def model():
    return LinearModel()


@pytest.mark.parametrize("classes", [3, 7])
def test_targets_follow_the_head_and_not_the_config(classes):
    config = dataclasses.replace(SMALL, num_images=8, batch_size=8, iterations=1)
    targets = generate_images(LinearModel(classes), config, KEY).targets
    assert set(targets.tolist()) == set(range(classes))


@pytest.mark.parametrize("kind", [list, np.array, jnp.array, lambda t: np.array(t, np.uint8)])
def test_explicit_targets_are_taken(kind, model):
    generated = generate_images(model, SMALL, KEY, targets=kind([4, 4, 0, 2]))
    assert generated.targets.tolist() == [4, 4, 0, 2]
    assert generated.targets.dtype == jnp.int32
    default = generate_images(model, SMALL, KEY, targets=class_targets(SMALL, 5))
    np.testing.assert_array_equal(default.images, generate_images(model, SMALL, KEY).images)
    assert np.any(np.asarray(default.images != generated.images), axis=(1, 2, 3)).any()


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ([0, 1, 2], "there are 3 targets for 4 images; give one each, or set num_images."),
        ([0, 1, 2, 5], "there is a target 5, but the model has 5 classes; count them from 0."),
        ([0, -1, 2, 3], "there is a target -1, but"),
        ([0.0, 1.0, 2.0, 3.0], "targets are float64 of shape"),
        ([[0, 1], [2, 3]], "give one whole number per image"),
        ("dog", "targets are <U3 of shape"),
    ],
)
def test_targets_that_cannot_be_are_refused(targets, says, model):
    with pytest.raises(ValueError, match=says):
        generate_images(model, SMALL, KEY, targets=targets)


@pytest.mark.parametrize("classes", [1, 2, 10, 100, 1000])
@pytest.mark.parametrize("count", [1, 5, 128, 1003])
def test_default_targets_are_spread_over_the_classes_and_do_not_depend_on_what_follows(classes, count):
    targets = np.asarray(class_targets(dataclasses.replace(SMALL, num_images=count), classes))
    longer = np.asarray(class_targets(dataclasses.replace(SMALL, num_images=2 * count), classes))
    np.testing.assert_array_equal(targets, longer[:count])
    assert targets.dtype == np.int32
    assert np.ptp(np.bincount(targets, minlength=classes)) <= 1
    if count < classes:
        distinct = np.sort(targets)
        gaps = np.diff([*distinct, distinct[0] + classes])
        assert gaps.max() < 2 * classes / count


def test_no_more_images_are_made_than_asked_for(model, monkeypatch):
    """The shapes that the update is called with: two images and not 32, then a batch and what is left of the next."""
    shapes = []
    advance = run._advance
    monkeypatch.setattr(run, "_advance", lambda *a: (shapes.append(a[3][0].shape[0]), advance(*a))[1])
    for count, batch, expected in ((2, 32, {2}), (5, 3, {3, 2})):
        shapes.clear()
        config = dataclasses.replace(SMALL, num_images=count, batch_size=batch)
        generated = generate_images(model, config, KEY)
        assert generated.images.shape == (count, 4, 4, 3)
        assert generated.targets.shape == (count,)
        assert set(shapes) == expected


def test_a_model_without_classes_has_none_to_aim_at():
    model = LinearModel(classes=0)
    with pytest.raises(ValueError, match="the model has no classes to make images for; load it with its head, or set"):
        generate_images(model, SMALL, KEY)
    made = generate_images(model, dataclasses.replace(SMALL, output=0.0), KEY)
    assert made.images.shape == (4, 4, 4, 3)


def test_full_batches_have_the_same_bits_whatever_follows(model):
    made = {n: generate_images(model, dataclasses.replace(SMALL, num_images=n), KEY).images for n in (2, 3, 4)}
    np.testing.assert_array_equal(made[3][:2], made[2])
    np.testing.assert_array_equal(made[4][:2], made[2])
    np.testing.assert_allclose(made[4][2], made[3][2], atol=1e-3)  # the noise of a full batch, optimised alone
