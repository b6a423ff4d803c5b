"""Sums whose order is part of their definition: it is that of 128 GPU threads, whatever surrounds the sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

from ouromamba_jax.ops.fixed_order import tree_sum

pytestmark = pytest.mark.optimized


def sum_of_threads(x: np.ndarray) -> np.ndarray:
    """Thread by thread: each adds every 128th column, then every second one adds its neighbour's sum, and so on."""
    threads = [np.float32(0)] * 128
    for column, value in enumerate(x):
        threads[column % 128] = threads[column % 128] + value
    while len(threads) > 1:
        threads = [a + b for a, b in zip(threads[::2], threads[1::2], strict=True)]
    return threads[0]


@pytest.mark.parametrize("columns", [1, 2, 5, 96, 128, 130, 768])
def test_the_order(columns):
    x = np.random.default_rng(columns).normal(size=(3, columns)).astype(np.float32)
    expected = np.array([sum_of_threads(row) for row in x])
    np.testing.assert_array_equal(tree_sum(jnp.asarray(x))[:, 0], expected)
    if columns > 100:  # in any other order some sum has other bits
        assert (np.sum(x, axis=1) != expected).any()


def test_a_row_has_the_same_bits_in_any_batch_and_program():
    x = normal(0, (40, 200))
    whole = tree_sum(jnp.abs(x))
    for size in (1, 7):
        in_another = jax.jit(lambda x: (jnp.exp(tree_sum(jnp.abs(x))), tree_sum(jnp.abs(x))))
        np.testing.assert_array_equal(in_another(x[:size])[1], whole[:size])
