"""The walk over windows of tokens that Algorithm 2 takes, and statistics that have the same bits in every program.

Windows and samples are independent, so the code walks the tokens of all windows together. Every sum is an explicit
pairwise tree and no product feeds a sum without a guard: the compiler can then neither reorder nor contract them, and
the result of a sample has the same bits in any batch and in any surrounding program.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32

from ouromamba_jax.ops.fixed_order import guard_product, tree_sum
from ouromamba_jax.ops.qtensor import divide


def mean_and_std(magnitude: Float32[Array, "*rows C"]) -> tuple[Float32[Array, "*rows 1"], Float32[Array, "*rows 1"]]:
    """Mean and ddof=1 standard deviation over the last axis, with the same bits in every program."""
    count = magnitude.shape[-1]
    mean = divide(tree_sum(magnitude), count)
    deviation = magnitude - mean
    square = guard_product(deviation * deviation)
    return mean, jnp.sqrt(divide(tree_sum(square), max(count - 1, 1)))


def walk_windows(
    x: Float32[Array, "B L C"],
    n_refresh: int,
    grow: Callable[[Array, Array, Array, Array], tuple[Array, Array]],
    extra: Array,
) -> tuple[Bool[Array, "B L C"], Array]:
    """Walk all windows token by token; `grow(x_t, listed, extra_t, is_token) -> (listed, per-row output)`.

    `extra` is (1, L, ...). The last window may be short: where it is over, `is_token` (1, windows) is False, and what
    `grow` makes of that step is read by nobody. Returns the lists (B, L, C) and the outputs (B, L).
    """
    B, L, C = x.shape
    n = min(n_refresh, L)
    windows = -(-L // n)
    starts = n * jnp.arange(windows, dtype=jnp.int32)
    count = jnp.int8 if n <= 127 else jnp.int32  # the narrower, the less memory crosses the caches

    def step(i, carry):
        unlisted, rows = carry
        tokens = jnp.minimum(starts + i, L - 1)  # past the end the last token comes again
        x_t, extra_t = (values.at[:, tokens].get(mode="promise_in_bounds") for values in (x, extra))
        listed, row = grow(x_t, unlisted < i.astype(count), extra_t, (starts + i < L)[None])
        return unlisted + (~listed).astype(count), lax.dynamic_update_index_in_dim(rows, row, i, 2)

    # A channel that is listed stays listed, so the number of its tokens before that holds a window's whole mask.
    start = jnp.zeros((B, windows, C), count), jnp.zeros((B, windows, n), jnp.float32)
    unlisted, rows = lax.fori_loop(jnp.int32(0), jnp.int32(n), step, start)
    mask = lax.broadcasted_iota(count, (B, windows, n, C), 2) >= unlisted[:, :, None]
    return mask.reshape(B, -1, C)[:, :L], rows.reshape(B, -1)[:, :L]
