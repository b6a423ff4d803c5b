"""GPTQ against the textbook's loop in float64, and what it is for: the error of the outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import heavy_tailed

from ouromamba_jax.ops.qtensor import max_level, quantize_with_scale, search_weight_scale
from ouromamba_jax.ops.weight_rounding import DAMPING, gptq_round


def correlated(seed: int, tokens: int, width: int) -> np.ndarray:
    """Inputs that lie near a plane of a quarter of their dimensions."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((max(1, width // 4), width))
    return rng.standard_normal((tokens, len(mixing))) @ mixing + 0.1 * rng.standard_normal((tokens, width))


def by_the_book(kernel, scale, moments, bits):
    """Optimal brain quantisation in a fixed order: invert what is left of the moments after every input."""
    kernel, moments = np.array(kernel, np.float64), np.array(moments, np.float64)
    step = np.repeat(np.asarray(scale, np.float64), len(kernel) // len(scale), axis=0)
    left = list(np.argsort(-np.diagonal(moments), kind="stable"))
    moments = moments + DAMPING * np.mean(np.diagonal(moments)) * np.eye(len(moments))
    levels = np.zeros(kernel.shape)
    while left:
        inverse, i = np.linalg.inv(moments[np.ix_(left, left)]), left[0]
        levels[i] = np.clip(np.round(kernel[i] / step[i]), -max_level(bits), max_level(bits))
        kernel[left] -= np.outer(inverse[0] / inverse[0, 0], kernel[i] - levels[i] * step[i])
        left = left[1:]
    return levels


@pytest.mark.parametrize(("bits", "group"), [(2, None), (3, 8), (4, None), (4, 6), (8, None)])
def test_it_is_the_loop_by_the_book(bits, group):
    kernel = jnp.asarray(np.asarray(heavy_tailed(bits, (24, 10))), jnp.float32)
    x = correlated(bits, 200, 24)
    moments = jnp.asarray(x.T @ x, jnp.float32)
    scale = search_weight_scale(kernel, bits, group=group)
    levels = np.asarray(gptq_round(kernel, scale, moments, bits=bits))
    assert levels.dtype == np.int8
    # A weight that float32 brings to the other side of a tie changes what comes after it.
    assert np.mean(levels != by_the_book(kernel, scale, moments, bits)) < 0.02


def test_blocks_of_inputs_do_not_change_the_levels(monkeypatch):
    """130 inputs in one block, and in nine, the last of which is padded."""
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((130, 6)), jnp.float32)
    x = correlated(1, 400, 130)
    moments, scale = jnp.asarray(x.T @ x, jnp.float32), search_weight_scale(kernel, 4)
    found = []
    for block in (130, 16):
        monkeypatch.setattr("ouromamba_jax.ops.weight_rounding.BLOCK", block)
        gptq_round.clear_cache()
        found.append(np.asarray(gptq_round(kernel, scale, moments, bits=4)))
    gptq_round.clear_cache()
    assert np.mean(found[0] != found[1]) < 0.02  # where float32 brings a weight to the other side of a tie


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_outputs_of_correlated_inputs_lose_less(bits):
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((48, 16)), jnp.float32)
    seen, unseen = correlated(1, 400, 48), correlated(1, 800, 48)[400:]
    scale = search_weight_scale(kernel, bits)
    nearest = quantize_with_scale(kernel, scale, bits).values
    in_turn = gptq_round(kernel, scale, jnp.asarray(seen.T @ seen, jnp.float32), bits=bits)

    def loss(levels):
        return np.sum((unseen @ (np.asarray(kernel) - np.asarray(levels) * np.asarray(scale))) ** 2)

    assert loss(in_turn) < 0.6 * loss(nearest)


def test_inputs_that_have_nothing_in_common_are_rounded_to_the_nearest():
    kernel = jnp.asarray(np.random.default_rng(2).standard_normal((20, 8)), jnp.float32)
    scale = search_weight_scale(kernel, 4)
    moments = jnp.diag(jnp.asarray(np.random.default_rng(3).uniform(0.1, 9, 20), jnp.float32))
    expected = quantize_with_scale(kernel, scale, 4).values
    for found in (moments, jnp.zeros_like(moments)):
        np.testing.assert_array_equal(gptq_round(kernel, scale, found, bits=4), expected)
    with jax.disable_jit():
        np.testing.assert_array_equal(gptq_round(kernel, scale, moments, bits=4), expected)
