"""A sample's logits do not depend on its batch: not on its mates, their number or its place; bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, student_t
from flax import nnx
from tiny_models import FAMILIES, quantised

from ouromamba_jax.models import pure
from ouromamba_jax.models.layers import as_tokens
from ouromamba_jax.quantize import OPERANDS, QuantConfig, QuantRule
from ouromamba_jax.quantize.modules import QuantLinear

pytestmark = pytest.mark.optimized

BATCH = 8
IN_THREES = (QuantRule(r"^(stem|patch_embed)\.", weight_group=3),)
"""Groups that divide the inputs of a convolution of three colours: 27 of a stem."""
VARIANTS = (
    ("w4a4", {}),
    ("w4a8", {}),
    ("w6a6", {}),
    ("w8a8", {}),
    ("w4a4", dict(outlier_scale="free")),
    ("w4a4", dict(threshold="offline", sigma=2.0)),
    ("w4a4", dict(detection="static")),
    ("w4a4", dict(operands=OPERANDS, rules=())),
    ("w4a4", dict(weight_group=2, rules=IN_THREES)),
    ("w4a8", dict(weight_group=2, rules=IN_THREES)),
)
OTHERS = ("vmamba", "mambavision")


def case(family: str, sizes: tuple[int, ...], name: str, *, slow: bool = False, **fields):
    config = dataclasses.replace(QuantConfig.preset(name), **fields)
    shown = [str(item) for item in fields.items() if item != ("rules", IN_THREES)]
    words = [family, name, *shown, *(["in every split"] if slow else [])]
    return pytest.param(family, config, sizes, id=" ".join(words), marks=[pytest.mark.slow] if slow else [])


CASES = [
    case("vim", (1, 3), "w4a4"),
    case("vim", (5,), "w8a8"),
    *(case(family, (), "w4a4") for family in OTHERS),
    *(case("vim", (1, 2, 3, 5), name, slow=True, **fields) for name, fields in VARIANTS),
    *(case(family, (1, 2, 3, 5), name, slow=True, **fields) for family in OTHERS for name, fields in VARIANTS),
]


def spiky_images(family: str, key: int = 0) -> jax.Array:
    """Images of which half hold rare pixels up to 60 times their standard deviation, and half none."""
    shape = (BATCH, *FAMILIES[family]["img_size"], 3)
    is_heavy = (jnp.arange(BATCH) % 2 == 0)[:, None, None, None]
    return jnp.where(is_heavy, student_t(key, shape, 1.2, 60), normal(key + 100, shape))


def assert_same_bits(logits: jax.Array, expected: np.ndarray, what: str) -> None:
    np.testing.assert_array_equal(np.asarray(logits).view(np.uint32), expected.view(np.uint32), err_msg=what)


@pytest.mark.parametrize(("family", "config", "sizes"), CASES)
def test_batch_mates_change_no_bit(family, config, sizes):
    fn, state = pure(quantised(config, family))
    fn, images = jax.jit(fn), spiky_images(family)
    expected = np.asarray(fn(state, images))
    assert np.isfinite(expected).all()
    assert (expected.std(axis=0) > 0).all()
    order = np.random.default_rng(0).permutation(BATCH)
    assert_same_bits(fn(state, images[order]), expected[order], "permuted")
    others = spiky_images(family, 1).at[3].set(images[3])
    assert_same_bits(fn(state, others)[3], expected[3], "other mates")
    assert_same_bits(fn(state, others.at[2].set(jnp.nan))[3], expected[3], "a mate that is not finite")
    for size in sizes:
        for start in range(0, BATCH - size + 1, size):
            part = slice(start, start + size)
            assert_same_bits(fn(state, images[part]), expected[part], f"samples {start} to {start + size - 1} alone")


@pytest.mark.parametrize(
    ("family", "matmuls"),
    [
        ("vim", 1 + 6 + 1),
        pytest.param("vmamba", 2 + (4 + 4 * 2) + 1, marks=pytest.mark.slow),
        pytest.param("mambavision", 2 + 2 + 1 + (4 + 2) + (2 + 2) + 1, marks=pytest.mark.slow),
    ],
)
def test_the_cases_are_hard(monkeypatch, family, matmuls):
    """In these models tokens do overflow, and larger outlier steps (j > 0) occur for some samples and not for others.

    Only then does a batch take another branch than its parts.
    """
    seen = []

    def watched(layer, x):
        split = layer.act.split(as_tokens(x), with_mask=True)
        seen.append((split.mask.mean(), split.shifted.any(axis=1)))
        return multiply(layer, x)

    multiply = QuantLinear.__call__
    monkeypatch.setattr(QuantLinear, "__call__", watched)
    graphdef, state = nnx.split(quantised(dataclasses.replace(QuantConfig.preset("w4a4"), rules=()), family))

    @jax.jit
    def run(state, images):
        seen.clear()
        nnx.merge(graphdef, state)(images)
        return list(seen)

    found = run(state, spiky_images(family))
    assert len(found) == matmuls
    assert sum(float(rate) > 0.01 for rate, _ in found) >= 4, found
    assert sum(bool(shifted.any()) and not bool(shifted.all()) for _, shifted in found) >= 2, found
