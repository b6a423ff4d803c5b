"""outlier_matmul: exact integers, one float epilogue, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from ouromamba_jax import OutlierConfig, QTensor, Split, outlier_matmul, quantize_array, split_outliers
from ouromamba_jax.ops.matmul import BACKENDS, prepare
from ouromamba_jax.ops.split_calibration import calibrate

pytestmark = pytest.mark.optimized

B, L, K, O = 3, 13, 33, 20


def weight(rng, K=K, bits=4, group=None):
    return quantize_array(jnp.asarray(rng.normal(size=(K, O)), jnp.float32), bits, group=group)


def random_split(rng, planes: int, shape=(B, L, K), scale=None) -> Split:
    """Levels over the whole range, many of them at its ends."""
    ends = rng.choice([-127, 0, 127], shape)
    low, high = (
        jnp.asarray(np.where(rng.random(shape) < 0.5, ends, rng.integers(-128, 128, shape)), jnp.int8) for _ in "lh"
    )
    scale = rng.uniform(0.1, 1, shape[1]) if scale is None else np.full(shape[1], scale)
    first = jnp.zeros((shape[0], -(-shape[1] // 10), shape[2]), jnp.int8)
    return Split(low, high if planes == 2 else None, jnp.asarray(scale, jnp.float32), first, 10)


def exact(split: Split, tensor: QTensor) -> np.ndarray:
    """The documented sum in float64, its integer products in int64."""
    groups = tensor.scale.shape[0]
    values = np.asarray(tensor.values, np.int64).reshape(groups, -1, tensor.shape[1])
    levels = np.asarray(split.levels(), np.int64)
    products = np.einsum("blgk,gko->gblo", levels.reshape(*levels.shape[:2], groups, -1), values)
    columns = np.asarray(tensor.scale, np.float64)[:, None, None]
    return (columns * products).sum(0) * np.asarray(split.scale, np.float64)[:, None]


def assert_close(y, expected):
    """Equal up to the rounding of the float epilogue."""
    assert y.dtype == jnp.float32
    assert np.abs(np.asarray(y, np.float64) - expected).max() <= tolerances.EPILOGUE * np.abs(expected).max()


@pytest.mark.parametrize("group", [None, 11])
@pytest.mark.parametrize("planes", [1, 2])
def test_the_documented_sum(planes, group):
    rng = np.random.default_rng(0)
    split, tensor, bias = random_split(rng, planes), weight(rng, group=group), rng.normal(size=O).astype(np.float32)
    expected = exact(split, tensor)
    assert_close(outlier_matmul(split, tensor), expected)
    y = outlier_matmul(split, tensor, bias=100 * bias)
    assert_close(y, expected + 100 * bias)
    half = outlier_matmul(split, tensor, bias=100 * bias, dtype=jnp.bfloat16)  # rounded once, at the end
    np.testing.assert_array_equal(half, y.astype(jnp.bfloat16))


@pytest.mark.parametrize("planes", [1, 2])
def test_integers_are_exact(planes):
    """With steps of 1 and sums that floats hold, nothing is rounded."""
    rng = np.random.default_rng(1)
    split = random_split(rng, planes, scale=1)
    values = jnp.asarray(rng.integers(-15, 16, (K, O)), jnp.int8)
    tensor = QTensor(values, jnp.ones((1, O)), bits=5)
    expected = exact(split, tensor)
    assert np.abs(expected).max() < 2**24
    np.testing.assert_array_equal(outlier_matmul(split, tensor), expected)


@pytest.mark.parametrize("planes", [1, 2])
def test_no_accumulator_overflows_at_the_extremes(planes):
    """Every product of 4096 inputs has the largest size and one sign, or another."""
    K = 4096
    rng = np.random.default_rng(3)
    signs = np.where(rng.random(K) < 0.5, -1, 1)
    low = jnp.asarray(np.broadcast_to(127 * signs, (1, 2, K)), jnp.int8)
    split = Split(low, low if planes == 2 else None, jnp.ones(2), jnp.zeros((1, 1, K), jnp.int8), 10)
    columns = np.stack([signs, -signs, rng.choice([-1, 1], K)], 1)
    tensor = QTensor(jnp.asarray(127 * columns, jnp.int8), jnp.ones((1, 3)))
    y, expected = np.asarray(outlier_matmul(split, tensor), np.float64), exact(split, tensor)
    assert np.abs(expected).max() > 2**24
    np.testing.assert_allclose(y, expected, rtol=2.0**-22)


@pytest.mark.parametrize("bits", [(4, 8), (8, 16)])
@pytest.mark.parametrize("size", [0.5, 15, 400])
def test_a_split_activation_is_multiplied_as_it_is_merged(bits, size):
    rng = np.random.default_rng(5)
    heavy = np.isin(np.arange(K), rng.choice(K, 2, replace=False))
    x = jnp.asarray(rng.normal(size=(B, L, K)) * np.where(heavy, size, 1), jnp.float32)
    config, tensor = OutlierConfig(*bits), weight(rng, bits=8)
    split = calibrate(x, config).split(x, config)
    expected = np.asarray(split.merge(), np.float64) @ np.asarray(tensor.dequantize(), np.float64)
    assert_close(outlier_matmul(split, tensor), expected)


def test_a_prepared_weight_gives_the_same_bits():
    rng = np.random.default_rng(7)
    split, tensor = random_split(rng, 1), weight(rng)
    prepared = prepare(jax.eval_shape(lambda: split), tensor)
    np.testing.assert_array_equal(outlier_matmul(split, prepared), outlier_matmul(split, tensor))


def test_errors_name_the_way_out():
    rng = np.random.default_rng(9)
    split = split_outliers(jnp.ones((B, L, K)), jnp.ones(L), OutlierConfig())
    with pytest.raises(ValueError, match=r"choose one of .*xla"):
        outlier_matmul(split, weight(rng), implementation="cuda")
    with pytest.raises(ValueError, match=r"the bias must be \(20,\)"):
        outlier_matmul(split, weight(rng), bias=jnp.ones(1))
    with pytest.raises(ValueError, match="channels but the weight 34 inputs"):
        outlier_matmul(split, weight(rng, K=K + 1))
    with pytest.raises(ValueError, match="channels but the weight 32 inputs"):
        outlier_matmul(split, weight(rng, K=K - 1))


def test_a_named_backend_that_refuses_says_why(monkeypatch):
    rng = np.random.default_rng(10)
    split, tensor = random_split(rng, 1), weight(rng)
    fussy = BACKENDS["xla"]._replace(supports=lambda *call: "it wants more rows", run=lambda *call: None)
    monkeypatch.setitem(BACKENDS, "xla", fussy)
    with pytest.raises(ValueError, match="it wants more rows"):
        outlier_matmul(split, tensor, dtype=jnp.float16, implementation="xla")  # a call that no other test compiles
