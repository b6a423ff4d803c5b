"""QTensor, the scale search against the recorded official quantiser, packing."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st

from ouromamba_jax.ops.qtensor import (
    QTensor,
    divide,
    max_level,
    pack_levels,
    packed_rows,
    quantize_array,
    quantize_with_scale,
    search_scale,
    search_weight_scale,
    unpack_levels,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "quant"


@pytest.mark.parametrize(("levels", "bits"), [(16, 4), (256, 8)])
def test_weight_quantiser_equals_the_recordings(levels, bits):
    golden = np.load(GOLDEN / f"linear_1_nlv{levels}.npz")
    tensor = quantize_array(jnp.asarray(golden["weight"].T), bits)
    tensor.check()
    np.testing.assert_array_equal(np.asarray(tensor.values).T, golden["w_int"])
    np.testing.assert_allclose(np.asarray(tensor.scale).T, golden["s"], rtol=tolerances.SCALE_ROUNDING)
    np.testing.assert_allclose(np.asarray(tensor.dequantize()).T, golden["w_q"], rtol=tolerances.SCALE_ROUNDING)


@pytest.mark.parametrize(("levels", "bits"), [(16, 4), (256, 8)])
def test_scale_without_search_is_the_range(levels, bits):
    golden = np.load(GOLDEN / f"linear_1_nlv{levels}_notrunc.npz")
    scale = search_weight_scale(jnp.asarray(golden["weight"].T), bits, search=False)
    np.testing.assert_array_equal(np.asarray(scale).T, golden["s"])


def test_search_picks_the_first_best_candidate_of_a_float64_search():
    w = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    scale = np.asarray(quantize_array(jnp.asarray(w), 3).scale)[0]
    for column, found in zip(w.T.astype(np.float64), scale, strict=True):
        candidates = np.abs(column).max() * np.arange(1, 101) / 100 / 3
        error = [np.mean(np.abs(column - s * np.clip(np.rint(column / s), -3, 3)) ** 2.4) for s in candidates]
        np.testing.assert_allclose(found, candidates[np.argmin(error)], rtol=tolerances.SCALE_ROUNDING)


def test_groups_are_quantised_on_their_own():
    w = jnp.asarray((np.random.default_rng(1).normal(size=(24, 5)) * np.arange(1, 6) ** 2).astype(np.float32))
    grouped = quantize_array(w, 4, group=8)
    grouped.check()
    assert grouped.scale.shape == (3, 5)
    for g in range(3):
        alone = quantize_array(w[8 * g : 8 * g + 8], 4)
        np.testing.assert_array_equal(grouped.values[8 * g : 8 * g + 8], alone.values)
        np.testing.assert_array_equal(grouped.scale[g], alone.scale[0])
        np.testing.assert_array_equal(grouped.dequantize()[8 * g : 8 * g + 8], alone.dequantize())


def test_rounding_is_half_to_even():
    w = jnp.asarray([7.0, -6, 5, -4, 3, 2, 0.5, 1.5, -2.5])[:, None]
    scale = jnp.ones((1, 1))
    levels = quantize_with_scale(w, scale, 4).values[:, 0]
    np.testing.assert_array_equal(levels, [7, -6, 5, -4, 3, 2, 0, 2, -2])


def test_all_zero_column_gets_a_positive_scale():
    w = jnp.asarray(np.random.default_rng(2).normal(size=(8, 3)).astype(np.float32)).at[:, 1].set(0)
    tensor = quantize_array(w, 4)
    tensor.check()
    assert float(tensor.scale[0, 1]) == pytest.approx(1e-8)
    assert not np.asarray(tensor.values[:, 1]).any()


def test_division_is_ieee_under_jit():
    rng = np.random.default_rng(3)
    x, s = rng.normal(size=(64, 96)).astype(np.float32), rng.uniform(0.1, 1, size=(64, 1)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(divide)(x, s), x / s)
    np.testing.assert_array_equal(jax.jit(lambda a: divide(a, 127))(x), x / np.float32(127))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(2, 8), st.sampled_from([0, 1, 2, 7, 32]), st.sampled_from([1, 5]), st.integers(0, 2**32 - 1))
def test_packing_is_exact_and_without_gaps(bits, rows, columns, seed):
    top = 2 ** (bits - 1)
    values = np.random.default_rng(seed).integers(-top, top, size=(rows, columns)).astype(np.int8)
    packed = pack_levels(values, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (packed_rows(rows, bits), columns) == (math.ceil(rows * bits / 8), columns)
    for column, of_column in zip(values.T, packed.T, strict=True):
        number = sum((int(level) % 2**bits) << (bits * k) for k, level in enumerate(column))
        assert int.from_bytes(of_column.tobytes(), "little") == number
    unpacked = unpack_levels(packed, bits, rows)
    assert unpacked.dtype == np.int8
    np.testing.assert_array_equal(unpacked, values)


def test_pytree_keeps_the_static_facts():
    tensor = quantize_array(jnp.asarray(np.random.default_rng(4).normal(size=(8, 3)).astype(np.float32)), 5, group=4)
    again = jax.jit(lambda t: t)(tensor)
    assert (again.bits, again.group) == (5, 4)
    assert len(jax.tree.leaves(tensor)) == 2
    assert max_level(again.bits) == 15


@pytest.mark.parametrize(
    ("values", "scale", "bits", "group", "message"),
    [
        (np.full((4, 2), 8, np.int8), np.full((1, 2), 0.5, np.float32), 4, None, "does not fit"),
        (np.full((4, 2), -128, np.int8), np.full((1, 2), 0.5, np.float32), 8, None, "does not fit"),
        (np.full((4, 2), 3, np.int32), np.full((1, 2), 0.5, np.float32), 4, None, "int8"),
        (np.full((4, 2), 3, np.int8), np.full((1, 3), 0.5, np.float32), 4, None, "scale must be"),
        (np.full((4, 2), 3, np.int8), np.full((1, 2), 0.5, np.float32), 4, 3, "divide"),
        (np.full((4, 2), 3, np.int8), np.full((1, 2), 0.0, np.float32), 4, None, "positive"),
        (np.full((4, 2), 3, np.int8), np.full((1, 2), np.nan, np.float32), 4, None, "positive"),
        (np.full((4, 2), 3, np.int8), np.full((1, 2), 0.5, np.float32), 16, None, "2..8"),
    ],
)
def test_check_names_the_broken_invariant(values, scale, bits, group, message):
    with pytest.raises(ValueError, match=message):
        QTensor(jnp.asarray(values), jnp.asarray(scale), bits, group).check()


def test_errors_name_the_way_out():
    w = jnp.asarray(np.random.default_rng(5).normal(size=(10, 4)).astype(np.float32))
    with pytest.raises(ValueError, match="not a number of levels"):
        quantize_array(w, 16)
    with pytest.raises(ValueError, match="choose a divisor"):
        quantize_array(w, 4, group=4)
    with pytest.raises(ValueError, match="matrix"):
        quantize_array(w[0], 4)
    with pytest.raises(ValueError, match="5 bytes do not hold 12 levels of 4 bits"):
        unpack_levels(pack_levels(np.asarray(quantize_array(w, 4).values), 4), 4, 12)


def test_search_does_not_materialise_the_candidates():
    x = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    search = jax.jit(lambda x: search_scale(x, max_level(4), axes=(0,), fractions=[i / 100 for i in range(1, 101)]))
    memory = search.lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 10 * 512 * 256 * 4
