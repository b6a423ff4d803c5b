"""`quantize` without images: the same bits as generating them first."""

import jax
import pytest
from quantising import bits_of, float_model, images

import ouromamba_jax as om

CONFIG = om.QuantConfig.preset("w4a8", tune_epochs=0)
GENERATION = om.GenConfig(num_images=3, iterations=2, contrastive=0.0)


def test_images_are_generated_first(tmp_path):
    steps = []
    low, report = om.quantize(
        float_model(),
        None,
        CONFIG,
        generation=GENERATION,
        key=jax.random.key(7),
        progress=lambda done, total, name: steps.append(name),
        resume=tmp_path,
    )
    made = om.generate_images(float_model(), GENERATION, jax.random.key(7)).images
    expected, its_report = om.quantize(float_model(), made, CONFIG)
    assert bits_of(low) == bits_of(expected)
    assert report == its_report
    assert (steps[0], steps[-1]) == ("images", "done")
    assert {"images", "stem.npz"} <= {path.name for path in tmp_path.iterdir()}


def test_a_generation_beside_images_is_refused():
    with pytest.raises(ValueError, match="there are images already; leave out generation and key"):
        om.quantize(float_model(), images(), CONFIG, generation=GENERATION)
