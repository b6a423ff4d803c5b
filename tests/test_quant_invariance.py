"""A sample's logits do not depend on its batch: not on its mates, their number or its place; bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import quantised

from ouromamba_jax.models import pure
from ouromamba_jax.quantize import OPERANDS, QuantConfig, modules

BATCH = 8
CASES = [
    pytest.param(QuantConfig.preset("w4a4"), (1, 3), id="w4a4"),
    pytest.param(QuantConfig.preset("w4a8"), (3,), id="w4a8"),
    pytest.param(QuantConfig.preset("w6a6"), (5,), id="w6a6"),
    pytest.param(QuantConfig.preset("w8a8"), (2,), id="w8a8"),
    *(
        pytest.param(
            dataclasses.replace(QuantConfig.preset(name), **fields),
            (1, 2, 3, 5),
            id=f"{name} {fields}",
            marks=pytest.mark.slow,
        )
        for name, fields in (
            ("w4a4", {}),
            ("w4a8", {}),
            ("w6a6", {}),
            ("w8a8", {}),
            ("w4a4", dict(outlier_scale="free")),
            ("w4a4", dict(threshold="offline", sigma=2.0)),
            ("w4a4", dict(detection="static")),
            ("w4a4", dict(operands=OPERANDS, rules=())),
            ("w4a4", dict(weight_group=2, rules=())),
            ("w4a8", dict(weight_group=2, rules=())),
        )
    ),
]


def heavy_tailed(key: int = 0) -> jax.Array:
    """Images of which half hold rare pixels up to 60 times their standard deviation, and half none."""
    first, second = jax.random.split(jax.random.key(key))
    shape = (BATCH, 12, 16, 3)
    spikes = jnp.clip(jax.random.t(second, 1.2, shape), -60, 60)
    is_heavy = (jnp.arange(BATCH) % 2 == 0)[:, None, None, None]
    return jnp.where(is_heavy, spikes, jax.random.normal(first, shape))


def assert_same_bits(logits: jax.Array, expected: np.ndarray, what: str) -> None:
    np.testing.assert_array_equal(np.asarray(logits).view(np.uint32), expected.view(np.uint32), err_msg=what)


@pytest.mark.parametrize(("config", "sizes"), CASES)
def test_batch_mates_change_no_bit(config, sizes):
    fn, state = pure(quantised(config))
    fn, images = jax.jit(fn), heavy_tailed()
    expected = np.asarray(fn(state, images))
    assert np.isfinite(expected).all()
    assert (expected.std(axis=0) > 0).all()
    order = np.random.default_rng(0).permutation(BATCH)
    assert_same_bits(fn(state, images[order]), expected[order], "permuted")
    others = heavy_tailed(1).at[3].set(images[3])
    assert_same_bits(fn(state, others)[3], expected[3], "other mates")
    assert_same_bits(fn(state, others.at[2].set(jnp.nan))[3], expected[3], "a mate that is not finite")
    for size in sizes:
        for start in range(0, BATCH - size + 1, size):
            part = slice(start, start + size)
            assert_same_bits(fn(state, images[part]), expected[part], f"samples {start} to {start + size - 1} alone")


def test_the_cases_are_hard(monkeypatch):
    """In these models tokens do overflow, and larger outlier steps (j > 0) occur for some samples and not for others.

    Only then does a batch take another branch than its parts.
    """
    seen = []

    def watched(split, weight, **options):
        shifted = (split.outlier_scale != split.inlier_scale[None]).any(axis=1)
        seen.append((split.mask.mean(), shifted))
        return original(split, weight, **options)

    original = modules.outlier_matmul
    monkeypatch.setattr(modules, "outlier_matmul", watched)
    graphdef, state = nnx.split(quantised(dataclasses.replace(QuantConfig.preset("w4a4"), rules=())))

    @jax.jit
    def run(state, images):
        seen.clear()
        nnx.merge(graphdef, state)(images)
        return list(seen)

    found = run(state, heavy_tailed())
    assert len(found) == 1 + 6 + 1
    assert sum(float(rate) > 0.01 for rate, _ in found) >= 4, found
    assert sum(bool(shifted.any()) and not bool(shifted.all()) for _, shifted in found) >= 2, found
