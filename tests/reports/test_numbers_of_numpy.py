"""NumPy's numbers as config values, and JAX's 64-bit mode, change nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from linear_model import LinearModel

from ouromamba_jax import GenConfig, create_model, generate_images
from ouromamba_jax.data.preprocessing import Preprocessing

PLAIN = GenConfig(num_images=2, batch_size=2, iterations=2, neighbourhood=3, positives=3, scales=2)
FAMILIES = {
    "vim_micro": dict(img_size=12, patch_size=4, stride=4, embed_dim=16, depth=1, num_classes=5),
    "vmamba_micro": dict(img_size=24, dims=(16,), depths=(1,), num_classes=5),
    "mambavision_micro": dict(img_size=48, dim=8, in_dim=4, depths=(1, 1), window_size=(12, 3), num_heads=(1, 1)),
    "vit_micro": dict(img_size=12, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=5),
}


def test_a_generation_takes_numbers_of_numpy():
    kinds = {int: np.int32, float: np.float64}
    values = {f.name: getattr(PLAIN, f.name) for f in dataclasses.fields(PLAIN)}
    numpy = GenConfig(**{name: kinds.get(type(v), lambda v: v)(v) for name, v in values.items()})
    assert numpy == PLAIN
    assert repr(numpy) == repr(PLAIN)  # which names a run in its checkpoint


def test_a_preprocessing_takes_them_and_can_be_stored():
    plain = Preprocessing(mean=(0.5, 0.25, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0)
    for kind in (lambda v: np.array(v, np.float32), lambda v: tuple(map(np.float32, v)), list):
        other = Preprocessing(mean=kind(plain.mean), std=kind(plain.std), crop_pct=np.float32(1))
        assert other == plain
        assert hash(other) == hash(plain)
        assert json.dumps(dataclasses.asdict(other)) == json.dumps(dataclasses.asdict(plain))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_in_64_bit_mode_of_every_family(name):
    check_64_bits(create_model(name, rngs=nnx.Rngs(3), **FAMILIES[name]), PLAIN)


def test_generation_in_64_bit_mode():
    check_64_bits(LinearModel(), dataclasses.replace(PLAIN, contrastive=0.0))


def check_64_bits(model, config):
    plain = generate_images(model, config, jax.random.key(1))
    with jax.enable_x64(True):
        wide = generate_images(model, config, jax.random.key(1))
    assert (wide.images.dtype, wide.targets.dtype) == (jnp.float32, jnp.int32)
    np.testing.assert_allclose(wide.history["total"], plain.history["total"], rtol=1e-3)
    np.testing.assert_array_equal(wide.targets, plain.targets)
