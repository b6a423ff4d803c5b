"""The published code's quantiser against its recorded outputs and its own loop, and its layers."""

from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from tiny_models import filled
from tolerances import FLOAT64_LOOP, REORDERED, SCALE_ROUNDING

from ouromamba_jax.baselines.released import (
    ReleasedLinear,
    ReleasedScan,
    bits_of_outliers,
    round_asymmetric,
    round_symmetric,
    search_ranges,
    search_scales,
)
from ouromamba_jax.baselines.released_detection import DELTA_SIGMA, inliers
from ouromamba_jax.models.layers import SelectiveScan

pytestmark = pytest.mark.optimized

GOLDEN = Path(__file__).parents[1] / "golden" / "quant"
BITS = {16: 4, 256: 8, 65536: 16}
RECORDED = [(levels, out) for levels in (16, 256) for out in (256, 65536)]


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def largest(x):
    return np.abs(x).max(axis=2)


def spread(x):
    return x.max(axis=2) - x.min(axis=2)


def check_recording(golden, key, rounding, limit, span):
    """Levels, lists and triggers of a batch, and of its samples alone."""
    x, scale = golden["x"], golden[key + "s"][0, :, 0]
    values, listed = rounding(jnp.asarray(x))
    np.testing.assert_array_equal(listed, golden[key + "outlier_mask"])
    np.testing.assert_array_equal(values, golden[key + "out"])
    before = np.asarray(listed) & (np.arange(x.shape[1]) % 10 > 0)[:, None]
    before[:, 1:] &= np.asarray(listed)[:, :-1]
    triggered = span(np.where(before, np.float32(0), x)) / np.float32(limit) > scale
    np.testing.assert_array_equal(triggered, golden[key + "trigger"])
    for b in range(len(x)):
        values, listed = rounding(jnp.asarray(x[b : b + 1]))
        np.testing.assert_array_equal(listed[0], golden[key + "outlier_mask_single"][b])
        np.testing.assert_array_equal(values[0], golden[key + "out_single"][b])


@pytest.mark.parametrize(("levels", "out"), RECORDED)
@pytest.mark.parametrize("L", [40, 7])
def test_symmetric_recordings(L, levels, out):
    golden, key, bits = load(f"q_act_L{L}"), f"a{levels}_o{out}_", BITS[levels]
    calibration, scale = jnp.asarray(golden["calib"]), golden[key + "s"][0, :, 0]
    np.testing.assert_array_equal(inliers(calibration) != calibration, golden["calib_outlier_mask"])
    np.testing.assert_allclose(search_scales(calibration, bits), scale, rtol=SCALE_ROUNDING)
    rounding = partial(round_symmetric, scale=jnp.asarray(scale), bits=bits, outlier_bits=BITS[out])
    check_recording(golden, key, rounding, levels // 2 - 1, largest)


@pytest.mark.parametrize(("levels", "out"), RECORDED)
def test_asymmetric_recordings(levels, out):
    golden, key, bits = load("q_act_d_L40"), f"a{levels}_o{out}_", BITS[levels]
    calibration = inliers(jnp.asarray(golden["calib"]), DELTA_SIGMA)
    scale, zero = (golden[key + name][0, :, 0] for name in ("s", "z"))
    np.testing.assert_array_equal(calibration != golden["calib"], golden["calib_outlier_mask"])
    found_scale, found_zero = search_ranges(calibration, bits)
    np.testing.assert_allclose(found_scale, scale, rtol=SCALE_ROUNDING)
    np.testing.assert_array_equal(found_zero, zero)
    found = dict(scale=jnp.asarray(scale), zero=jnp.asarray(zero))
    check_recording(
        golden, key, partial(round_asymmetric, **found, bits=bits, outlier_bits=BITS[out]), levels - 1, spread
    )


def test_batch_mates_trigger_each_other():
    golden = load("coupling_a16_o256")
    rounding = partial(round_symmetric, scale=jnp.asarray(golden["s"][0, :, 0]), bits=4, outlier_bits=8)
    for x, kind in ((golden["x"], "batch"), (golden["x"][:1], "single0"), (golden["x"][1:], "single1")):
        values, listed = rounding(jnp.asarray(x))
        np.testing.assert_array_equal(listed, golden[f"mask_{kind}"])
        np.testing.assert_array_equal(values, golden[f"out_{kind}"])
    assert (golden["mask_batch"][1] != golden["mask_single1"][0]).any()


@pytest.mark.parametrize("levels", [16, 256])
def test_a_layer_multiplies_what_was_recorded(levels):
    weight, activation, key = (
        load(f"linear_1_nlv{levels}"),
        load("q_act_L40"),
        f"a{levels}_o{256 if levels == 16 else 65536}_",
    )
    linear = nnx.Linear(48, 24, rngs=nnx.Rngs(0))
    linear.kernel.set_value(jnp.asarray(weight["weight"].T))
    low = ReleasedLinear(linear, jnp.asarray(activation["calib"]), BITS[levels], BITS[levels])
    np.testing.assert_array_equal(low.levels[...].T, weight["w_int"])
    np.testing.assert_allclose(low.weight_scale[...].T, weight["s"], rtol=SCALE_ROUNDING)
    expected = activation[key + "out"].astype(np.float64) @ weight["w_q"].T
    y = low(jnp.asarray(activation["x"]))
    np.testing.assert_allclose(y, expected, rtol=0, atol=REORDERED * np.abs(expected).max())
    assert low.outlier_rate({"input": jnp.asarray(activation["x"])}) == np.float32(
        activation[key + "outlier_mask"].mean()
    )


def test_the_full_range_is_never_tried():
    """Values on a grid of eighths up to 7/8 would lie on one of 4 bits, had the search its last step."""
    x = jnp.asarray(np.random.default_rng(16).choice([-0.875, 0.25, 0.875], size=(2, 3, 64)).astype(np.float32))
    assert (np.asarray(search_scales(x, 4)) < 0.125).all()


def published_loop(x, scale, *, limit, sigma, span):
    """The lists (B, L, C) of the published loop, in float64 where it takes statistics.

    All windows of ten tokens step together, the last one padded with x = 0 and scale = 1; where one token of the whole
    batch does not fit, every token extends its list.
    """
    B, L, C = x.shape
    padding = -L % 10
    x = np.pad(x, ((0, 0), (0, padding), (0, 0))).reshape(B, -1, 10, C)
    scale = np.pad(scale, (0, padding), constant_values=1).reshape(-1, 10)
    mask = np.zeros(x.shape, bool)
    for i in range(10):
        listed = mask[:, :, i - 1] if i else mask[:, :, i]
        free = np.where(listed, np.float32(0), x[:, :, i])
        if (span(free) / np.float32(limit) > scale[:, i]).any():
            size = np.abs(free).astype(np.float64)
            above = size > size.mean(axis=2, keepdims=True) + sigma * size.std(axis=2, ddof=1, keepdims=True)
            listed = listed | above
        mask[:, :, i] = listed
    return mask.reshape(B, -1, C)[:, :L]


@pytest.mark.parametrize("L", [7, 20, 23, 31])
@pytest.mark.parametrize("is_delta", [False, True], ids=["activation", "delta"])
def test_a_last_token_that_does_not_fit_triggers_once(is_delta, L):
    """The only token that does not fit is the last one: lists grow at its step of every window, and at no later one."""
    rng = np.random.default_rng(L)
    x = rng.standard_t(1.5, (3, L, 48)).clip(-50, 50).astype(np.float32)
    limit, sigma, span = (15, 4.0, spread) if is_delta else (7, 3.0, largest)
    scale = (2 * span(x).max(axis=0) / limit).astype(np.float32)
    scale[-1] *= np.float32(1e-3)
    expected = published_loop(x, scale, limit=limit, sigma=sigma, span=span)
    grows = np.concatenate([expected[:, :1], expected[:, 1:] & ~expected[:, :-1]], axis=1).any(axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(grows), np.arange((L - 1) % 10, L, 10))
    x, scale = jnp.asarray(x), jnp.asarray(scale)
    if is_delta:
        _, listed = round_asymmetric(x, scale, jnp.zeros(L), bits=4, outlier_bits=8)
    else:
        _, listed = round_symmetric(x, scale, bits=4, outlier_bits=8)
    np.testing.assert_array_equal(listed, expected)


def test_the_scan_rounds_every_direction_on_the_last_ones_scales():
    """Delta with its bias on and before softplus, A and D as one token each; then the recurrence in float64."""
    types = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    scan = filled(nnx.eval_shape(lambda: SelectiveScan(2, 40, 3, **types, rngs=nnx.Rngs(0))))
    u, B, C = (normal(seed, (6, 13, 2, width)) for seed, width in ((0, 40), (1, 3), (2, 3)))
    delta = normal(3, u.shape).at[:, 2:, :, 5].add(-40.0)
    low = ReleasedScan(scan, dict(delta=delta, B=B, C=C), 4)
    y = low(u, delta, B, C).y
    assert 0.01 < low.outlier_rate(dict(delta=delta, B=B, C=C)) < 0.1
    delta = delta + scan.dt_bias[...].reshape(1, 1, 2, 40)
    ranges = search_ranges(inliers(delta[:, :, 1], DELTA_SIGMA), 4)
    A, D = scan.decay_rates().reshape(2, 1, 1, -1), scan.D[...].reshape(2, 1, 1, -1)
    for g in range(2):
        steps = round_asymmetric(delta[:, :, g], *ranges, 4, 8)[0]
        own = [
            round_symmetric(x, search_scales(last, 4), 4, 8)[0]
            for x, last in ((A[g], A[1]), (B[:, :, g], B[:, :, 1]), (C[:, :, g], C[:, :, 1]), (D[g], D[1]))
        ]
        a, b, c, d = (np.asarray(x, np.float64).squeeze() for x in own)
        sizes, entering = np.log1p(np.exp(np.asarray(steps, np.float64))), np.asarray(u[:, :, g], np.float64)
        h, expected = np.zeros((6, 40, 3)), np.zeros(entering.shape)
        for t in range(13):
            h = np.exp(sizes[:, t, :, None] * a.reshape(40, 3)) * h
            h += (sizes * entering)[:, t, :, None] * b[:, t, None]
            expected[:, t] = (h * c[:, t, None]).sum(-1) + d * entering[:, t]
        np.testing.assert_allclose(y[:, :, g], expected, rtol=0, atol=FLOAT64_LOOP * np.abs(expected).max())


def test_outliers_beside_8_bits_stay_float():
    assert [bits_of_outliers(bits) for bits in (2, 4, 6, 8)] == [8, 8, 8, 16]
