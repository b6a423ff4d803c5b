"""The published code's asymmetric quantiser for delta, against its recorded outputs; and what padding must not do."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from draws import normal

from ouromamba_jax.ops.released import quantize_asymmetric, search_ranges
from ouromamba_jax.ops.split import split_outliers
from ouromamba_jax.ops.split_types import OutlierConfig

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "quant" / "q_act_d_L40.npz")
BITS = {16: 4, 256: 8, 65536: 16}


def config(levels: int, outlier_levels: int) -> OutlierConfig:
    return OutlierConfig(BITS[levels], BITS[outlier_levels], sigma=4.0, outlier_scale="free", spec="released")


@pytest.mark.parametrize("levels", [16, 256])
@pytest.mark.parametrize("outlier_levels", [256, 65536])
def test_the_recordings(levels, outlier_levels):
    key, settings = f"a{levels}_o{outlier_levels}_", config(levels, outlier_levels)
    scale, zero = (jnp.asarray(GOLDEN[key + name][0, :, 0]) for name in ("s", "z"))
    found_scale, found_zero = search_ranges(jnp.asarray(GOLDEN["calib"]), settings)
    np.testing.assert_allclose(found_scale, scale, rtol=tolerances.SCALE_ROUNDING)
    np.testing.assert_array_equal(found_zero, zero)
    together, mask = quantize_asymmetric(jnp.asarray(GOLDEN["x"]), scale, zero, settings)
    np.testing.assert_array_equal(mask, GOLDEN[key + "outlier_mask"])
    np.testing.assert_array_equal(together, GOLDEN[key + "out"])
    for b in range(len(GOLDEN["x"])):
        alone, mask = quantize_asymmetric(jnp.asarray(GOLDEN["x"][b : b + 1]), scale, zero, settings)
        np.testing.assert_array_equal(mask[0], GOLDEN[key + "outlier_mask_single"][b])
        np.testing.assert_array_equal(alone[0], GOLDEN[key + "out_single"][b])


def test_gradients_reach_x_and_scale():
    settings = config(16, 256)
    scale, zero = search_ranges(jnp.asarray(GOLDEN["calib"]), settings)
    x = jnp.asarray(GOLDEN["x"])
    weight = normal(0, x.shape)
    loss = lambda x, s: jnp.sum(weight * quantize_asymmetric(x, s, zero, settings)[0])  # noqa: E731
    to_x, to_scale = jax.grad(loss, argnums=(0, 1))(x, scale)
    assert float(jnp.mean((to_x != 0).astype(jnp.float32))) > 0.2
    assert bool((to_scale != 0).all())


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


def largest(x):
    return np.abs(x).max(axis=2)


def spread(x):
    return x.max(axis=2) - x.min(axis=2)


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
    if is_delta:
        zero = jnp.zeros((L,), jnp.float32)
        _, mask = quantize_asymmetric(jnp.asarray(x), jnp.asarray(scale), zero, config(16, 256))
    else:
        mask = split_outliers(jnp.asarray(x), jnp.asarray(scale), replace(config(16, 256), sigma=sigma)).mask
    np.testing.assert_array_equal(mask, expected)
