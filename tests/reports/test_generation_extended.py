"""A generation goes on from its folder to more images, as one run would have made them."""

import dataclasses

import jax
import numpy as np
import pytest
from linear_model import LinearModel

from ouromamba_jax import GenConfig, generate_images

BASE = GenConfig(num_images=2, batch_size=2, iterations=4, contrastive=0.0, checkpoint_every=2)
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def model():
    return LinearModel()


class Interrupt(Exception):
    pass


def make(model, folder, images, stop=None, **fields):
    """`images` images into a folder, interrupted at iteration `stop` of all; with every iteration that was done."""
    seen = []

    def report(iteration, total, losses):
        seen.append(iteration)
        if stop is not None and iteration >= stop:
            raise Interrupt

    config = dataclasses.replace(BASE, num_images=images, **fields)
    if stop is None:
        return generate_images(model, config, KEY, progress=report, checkpoint_dir=folder), seen
    with pytest.raises(Interrupt):
        generate_images(model, config, KEY, progress=report, checkpoint_dir=folder)
    return None, seen


@pytest.fixture(scope="module")
def at_once(model):
    return {n: generate_images(model, dataclasses.replace(BASE, num_images=n), KEY) for n in (4, 5, 6)}


@pytest.mark.parametrize(
    ("first", "stop", "then", "begins"),
    [
        (2, None, 4, 6),  # whole batches
        (2, None, 5, 6),  # the new last one is shorter
        (3, None, 4, 6),  # the old last one was shorter, and is made again
        (5, None, 6, 10),
        (5, 10, 6, 10),  # as was the one that was interrupted
        (2, 2, 4, 4),  # interrupted inside a whole batch, which goes on
        (4, 6, 6, 8),
        (4, None, 4, None),  # nothing is left to do
    ],
)
def test_more_images_are_those_of_one_run(first, stop, then, begins, model, at_once, tmp_path):
    make(model, tmp_path, first, stop)
    extended, seen = make(model, tmp_path, then)
    assert (seen[0] if seen else None) == begins
    np.testing.assert_array_equal(extended.images, at_once[then].images)
    np.testing.assert_array_equal(extended.targets, at_once[then].targets)
    for name, values in at_once[then].history.items():
        np.testing.assert_array_equal(extended.history[name], values, err_msg=name)


def test_what_does_not_continue_a_run_is_refused(model, tmp_path):
    make(model, tmp_path, 4)
    before = (tmp_path / "generation.npz").read_bytes()
    for fields, says in (
        (dict(images=2), "already holds 4 images; ask for as many or more, or use another directory"),
        (dict(images=4, iterations=6), "holds a run of 4 iterations, and another number changes the learning rate"),
        (dict(images=6, learning_rate=0.1), "belongs to another model, config or key"),
        (dict(images=6, batch_size=3), "belongs to another model, config or key"),
    ):
        with pytest.raises(ValueError, match=says):
            make(model, tmp_path, **fields)
    config = dataclasses.replace(BASE, num_images=5)
    with pytest.raises(ValueError, match="holds images of other targets; give the same ones first"):
        generate_images(model, config, KEY, targets=[0, 0, 0, 0, 0], checkpoint_dir=tmp_path)
    assert (tmp_path / "generation.npz").read_bytes() == before


def test_explicit_targets_are_continued(model, tmp_path):
    config = dataclasses.replace(BASE, num_images=4)
    generate_images(model, BASE, KEY, targets=[4, 1], checkpoint_dir=tmp_path)
    extended = generate_images(model, config, KEY, targets=[4, 1, 1, 0], checkpoint_dir=tmp_path)
    np.testing.assert_array_equal(extended.images, generate_images(model, config, KEY, targets=[4, 1, 1, 0]).images)


def test_how_often_it_is_saved_may_change(model, at_once, tmp_path):
    make(model, tmp_path, 4, stop=2)
    extended, _ = make(model, tmp_path, 4, checkpoint_every=3)
    np.testing.assert_array_equal(extended.images, at_once[4].images)
