"""outlier_matmul: exact integers, the float epilogue, and independence of batch mates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from ouromamba_jax.ops import matmul
from ouromamba_jax.ops.matmul import BACKENDS, outlier_matmul
from ouromamba_jax.ops.qtensor import quantize_array
from ouromamba_jax.ops.split import merge, split_outliers
from ouromamba_jax.ops.split_calibration import search_token_scales
from ouromamba_jax.ops.split_types import OutlierConfig, OutlierSplit

pytestmark = pytest.mark.optimized

B, L, K, O = 3, 13, 33, 20
CONFIGS = {
    "pow2": OutlierConfig(),
    "free": OutlierConfig(outlier_scale="free"),
    "w8": OutlierConfig(act_bits=8),
    "float": OutlierConfig(act_bits=8, outlier_bits=16),
    "float4": OutlierConfig(act_bits=4, outlier_bits=16),
}
INTEGER = ("pow2", "free", "w8")


def weight(rng, K=K, bits=4, group=None):
    return quantize_array(jnp.asarray(rng.normal(size=(K, O)).astype(np.float32)), bits, group=group)


def sample(rng, size, *, B=B, K=K, channels=2):
    """(B, L, K) activations with a few outlier channels `size` times as large, and single entries as well."""
    heavy = np.isin(np.arange(K), rng.choice(K, channels, replace=False))
    x = rng.normal(size=(B, L, K)) * np.where(heavy, size, 1) * np.where(rng.random((B, L, K)) < 0.005, size, 1)
    return jnp.asarray(x.astype(np.float32))


def split_of(name, x):
    config = CONFIGS[name]
    return split_outliers(x, search_token_scales(x, config), config)


def random_split(rng, kind, pow2):
    """A split that detection would never make: every level at its limits, all inliers or all outliers."""
    mask = {"inliers": np.zeros, "outliers": np.ones}.get(kind, lambda shape, dtype: rng.random(shape) < 0.3)
    mask = mask((B, L, K), bool)
    scale = rng.uniform(0.1, 1, size=L).astype(np.float32)
    power = np.ldexp(np.float32(1), rng.integers(0, 3, size=(B, L))).astype(np.float32)
    outlier_scale = scale[None] * power if pow2 else rng.uniform(0.1, 1, size=(B, L)).astype(np.float32)
    inlier = np.where(mask, 0, rng.integers(-7, 8, size=mask.shape)).astype(np.int8)
    outlier = np.where(mask, rng.choice([-127, 127, 3], size=mask.shape), 0).astype(np.int8)
    return OutlierSplit.from_levels(*map(jnp.asarray, (inlier, outlier, outlier_scale, mask, scale)), pow2=pow2)


def integer_products(split, tensor):
    """The exact accumulators behind `outlier_matmul`, int32 (groups, B, L, O): in units of S[t], and of s_O[t]."""
    values = jnp.split(tensor.values, len(tensor.scale))

    def products(levels):
        parts = jnp.split(levels, len(values), axis=-1)
        return jnp.stack([matmul._dot(part, value) for part, value in zip(parts, values, strict=True)])

    return tuple(map(products, (split.near, split.far)))


def exact(split, tensor):
    """The documented sum in float64, and its two integer products per group in int64."""
    groups = tensor.scale.shape[0]
    values = np.asarray(tensor.values, np.int64).reshape(groups, -1, O)
    inner = [np.asarray(a).astype(np.int64).reshape(B, L, groups, -1) for a in (split.inlier_q, split.outlier_q)]
    near, far = (np.einsum("blgk,gko->gblo", a, values) for a in inner)
    s_in, s_out = (np.asarray(s, np.float64) for s in (split.inlier_scale, split.outlier_scale))
    columns = np.asarray(tensor.scale, np.float64)[:, None, None]
    return near, far, (columns * (s_in[None, None, :, None] * near + s_out[None, :, :, None] * far)).sum(0)


def assert_close(y, expected, bound=0.0):
    """Equal up to the rounding of the float epilogue, and `bound` where the method itself rounds."""
    assert y.dtype == jnp.float32
    assert np.all(np.abs(np.asarray(y, np.float64) - expected) <= bound + tolerances.EPILOGUE * np.abs(expected).max())


def fixed_point_bound(split, tensor):
    """What rounding to half a step can move each result: the step is under 2 / 32639 of the largest entry.

    Rounded are 16-bit outliers, and inliers only in a token whose largest entry is more than 32639 S.
    """
    if split.outlier_q.dtype == jnp.int8:
        return 0.0
    largest = np.abs(np.asarray(merge(split), np.float64)).max(-1, keepdims=True)
    rounded = np.asarray(split.mask) | (largest > 32639 * np.asarray(split.inlier_scale, np.float64)[None, :, None])
    return largest / 32639 * (rounded.astype(np.float64) @ np.abs(np.asarray(tensor.dequantize(), np.float64)))


@pytest.mark.parametrize("group", [None, 11])
@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("kind", ["mixed", "inliers", "outliers"])
def test_integers_are_exact(kind, pow2, group):
    rng = np.random.default_rng(0)
    split, tensor = random_split(rng, kind, pow2), weight(rng, group=group)
    near, far, y = exact(split, tensor)
    accumulators = integer_products(split, tensor)
    assert [x.dtype for x in accumulators] == [jnp.int32, jnp.int32]
    if pow2:  # tokens at j = 0 are counted on the inliers' step
        shifted = np.asarray(split.outlier_scale > split.inlier_scale[None])[None, :, :, None]
        near, far = np.where(shifted, near, near + far), np.where(shifted, far, 0)
    np.testing.assert_array_equal(accumulators[0], near)
    np.testing.assert_array_equal(accumulators[1], far)
    assert_close(jax.jit(outlier_matmul)(split, tensor), y)


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("size", [0.5, 15, 400])
def test_split_activations_give_the_documented_sum(name, size):
    rng = np.random.default_rng(1)
    split, tensor = split_of(name, sample(rng, size)), weight(rng)
    assert_close(outlier_matmul(split, tensor), exact(split, tensor)[2])


def test_a_huge_outlier_does_not_overflow():
    rng = np.random.default_rng(2)
    x = np.asarray(sample(rng, 1)).copy()
    x[1, 4, 7] = 1e15
    tensor = weight(rng)
    scale = search_token_scales(jnp.asarray(np.delete(x, 1, axis=0)), CONFIGS["pow2"])
    split = split_outliers(jnp.asarray(x), scale, CONFIGS["pow2"])
    assert float(split.outlier_scale[1, 4]) > 1e12
    assert_close(outlier_matmul(split, tensor)[1, 4], exact(split, tensor)[2][1, 4])


def test_no_accumulator_overflows_at_the_extremes():
    K = 4096
    ones = jnp.asarray(np.where(np.random.default_rng(3).random((1, 1, K)) < 0.999, 127, -127).astype(np.int8))
    split = OutlierSplit.from_levels(
        jnp.zeros_like(ones), ones, jnp.full((1, 1), 2.0), jnp.ones(ones.shape, bool), jnp.ones((1,)), pow2=True
    )
    tensor = quantize_array(jnp.asarray(np.random.default_rng(4).choice([-1.0, 1], size=(K, 1)).astype(np.float32)), 8)
    expected = np.asarray(ones[0, 0], np.int64) @ np.asarray(tensor.values[:, 0], np.int64)
    assert integer_products(split, tensor)[1].ravel().tolist() == [expected]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("group", [None, 11])
def test_equals_the_fake_quantised_product(name, group):
    rng = np.random.default_rng(5)
    split, tensor = split_of(name, sample(rng, 30)), weight(rng, bits=8, group=group)
    expected = np.asarray(merge(split), np.float64) @ np.asarray(tensor.dequantize(), np.float64)
    assert_close(outlier_matmul(split, tensor), expected, fixed_point_bound(split, tensor))


@pytest.mark.parametrize("size", [1, 3, 40, 300, 1e6, 1e36])
def test_float_outliers_of_any_size(size):
    """Up to 32639 S they are fixed-point numbers beside exact inliers; beyond that inliers are rounded, too."""
    rng = np.random.default_rng(6)
    K = 64
    mask = rng.random((B, L, K)) < 0.1
    mask[:, ::3] = False
    x = sample(rng, 5, K=K) * jnp.where(jnp.asarray(mask), jnp.float32(size), 1.0)
    scale = rng.uniform(0.02, 0.03, size=L).astype(np.float32)
    levels = np.clip(np.rint(np.asarray(x, np.float64) / scale[None, :, None]), -127, 127)
    split = OutlierSplit.from_levels(
        jnp.asarray(np.where(mask, 0, levels).astype(np.int8)),
        jnp.where(jnp.asarray(mask), x, 0.0),
        jnp.ones((B, L)),
        jnp.asarray(mask),
        jnp.asarray(scale),
        pow2=False,
    )
    tensor = weight(rng, K=K)
    expected = np.asarray(merge(split), np.float64) @ np.asarray(tensor.dequantize(), np.float64)
    y = np.asarray(jax.jit(outlier_matmul)(split, tensor))
    assert_close(y, expected, fixed_point_bound(split, tensor))
    assert_close(y[:, ::3], expected[:, ::3])  # the rows without outliers on their own, where nothing is rounded


@pytest.mark.parametrize(
    ("name", "group", "jit"),
    [("pow2", None, True), ("pow2", None, False), ("pow2", 8, True), ("free", 8, True), ("float", 8, True)],
)
def test_a_sample_keeps_its_bits_in_any_batch(name, group, jit):
    rng = np.random.default_rng(7)
    K = 64
    x = np.asarray(sample(rng, 8, B=8, K=K)).copy()
    x[2] *= np.where(rng.random((L, K)) < 0.01, 300, 1)  # one sample needs j > 0, or rounded inliers
    x = jnp.asarray(x)
    config, tensor = CONFIGS[name], weight(rng, K=K, group=group)
    scale = search_token_scales(x, config)

    def layer(x):
        return outlier_matmul(split_outliers(x, scale, config), tensor)

    layer = jax.jit(layer) if jit else layer
    whole = np.asarray(layer(x))
    order = rng.permutation(8)
    np.testing.assert_array_equal(layer(x[order]), whole[order])
    for first, last in ((0, 1), (2, 3), (3, 8)):
        np.testing.assert_array_equal(layer(x[first:last]), whole[first:last])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_non_finite_token_is_nan_and_alone(name):
    rng = np.random.default_rng(8)
    x, tensor = np.asarray(sample(rng, 20)), weight(rng)
    scale = search_token_scales(jnp.asarray(x), CONFIGS[name])
    fine = outlier_matmul(split_outliers(jnp.asarray(x), scale, CONFIGS[name]), tensor)
    broken = x.copy()
    broken[1, 4, 3] = np.nan
    bad = np.asarray(outlier_matmul(split_outliers(jnp.asarray(broken), scale, CONFIGS[name]), tensor))
    assert np.isnan(bad[1, 4]).all()
    assert np.isnan(bad).sum() == O
    np.testing.assert_array_equal(bad[0], fine[0])


def test_the_result_is_rounded_once_to_the_dtype_asked_for():
    rng = np.random.default_rng(11)
    for name in CONFIGS:
        split, tensor = split_of(name, sample(rng, 20)), weight(rng)
        y = outlier_matmul(split, tensor, dtype=jnp.bfloat16)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(y, outlier_matmul(split, tensor).astype(jnp.bfloat16))


def test_errors_name_the_way_out():
    rng = np.random.default_rng(9)
    split = split_of("pow2", sample(rng, 20))
    with pytest.raises(ValueError, match=r"choose one of .*xla"):
        outlier_matmul(split, weight(rng), implementation="cuda")
    with pytest.raises(ValueError, match=r"the bias must be \(20,\)"):
        outlier_matmul(split, weight(rng), bias=jnp.ones(1))
    with pytest.raises(ValueError, match="channels"):
        outlier_matmul(split, weight(rng, K=K + 1))


def test_dispatch_prefers_a_backend_that_supports_the_call(monkeypatch):
    rng = np.random.default_rng(10)
    split, tensor = split_of("pow2", sample(rng, 20)), weight(rng)
    y = outlier_matmul(split, tensor)
    fussy = BACKENDS["xla"]._replace(supports=lambda *call: "it wants more rows", run=lambda *call: None)
    monkeypatch.setitem(BACKENDS, "xla", fussy)
    with pytest.raises(ValueError, match="it wants more rows"):
        outlier_matmul(split, tensor, implementation="xla")
    monkeypatch.undo()
    np.testing.assert_array_equal(outlier_matmul(split, tensor, implementation="xla"), y)
