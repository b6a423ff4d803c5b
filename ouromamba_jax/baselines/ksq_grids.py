"""Grids and searches of kSQ-VMM: signed levels, clusters of channels or tokens, scales of the largest cosine.

Levels run from -2^(b-1) to 2^(b-1) - 1. A scale has shape (1, 1), (1, C) or (L, 1) and broadcasts over samples.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from ouromamba_jax.ops.qtensor import MIN_SCALE

FRACTIONS = tuple(0.01 + i * 1.19 / 100 for i in range(100))
"""Candidate scales, as parts of the one that covers the range."""

WIDE = 8
"""Bits of hidden states and of weights outside of linear layers."""

Axis = Literal["tensor", "channel", "token"]


class Grid(NamedTuple):
    """Signed levels of `bits` bits, times `scale`."""

    scale: Float[Array, "l c"]
    bits: int


def interval(largest: Float[Array, "..."], bits: int) -> Float32[Array, "..."]:
    """max|x| / (2^(bits - 1) - 0.5): the scale that covers a range."""
    return jnp.maximum(largest.astype(jnp.float32) / (2 ** (bits - 1) - 0.5), MIN_SCALE)


def levels_of(x: Float[Array, "..."], scale: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """Signed levels, as floats; x and scale of one rank."""
    top = 2.0 ** (bits - 1)
    return jnp.clip(jnp.round(x / scale), -top, top - 1)


def round_to(x: Float[Array, "B L C"], scale: Float[Array, "l c"], bits: int) -> Float32[Array, "B L C"]:
    """x on the grid of `scale`."""
    x = x.astype(jnp.float32)
    return levels_of(x, scale[None], bits) * scale[None]


def cosine(a: Float[Array, "... C"], b: Float[Array, "... C"]) -> Float[Array, "..."]:
    """Cosine similarity over the last axis; 0 where a vector is zero."""
    norms = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return jnp.sum(a * b, axis=-1) * lax.rsqrt(norms + 1e-24)


def best_fraction(similarity: Callable[[Array], Array]) -> Float32[Array, "..."]:
    """The first of `FRACTIONS` at which `similarity`, of any shape, is largest, entry by entry."""
    fractions = jnp.asarray(FRACTIONS, jnp.float32)

    def step(i, best):
        score, fraction = best
        new = similarity(fractions[i])
        return jnp.where(new > score, new, score), jnp.where(new > score, fractions[i], fraction)

    shape = jax.eval_shape(similarity, fractions[0]).shape
    start = jnp.full(shape, -jnp.inf), jnp.ones(shape, jnp.float32)
    return lax.fori_loop(0, len(FRACTIONS), step, start)[1]


def kmeans(values: Float[np.ndarray, " n"], k: int, *, seed: int = 0) -> Int[np.ndarray, " n"]:
    """Cluster of every value: Lloyd's algorithm from k random values, at most 100 rounds; clusters ascend."""
    values = np.asarray(values, np.float64)
    distinct = np.unique(values)
    centroids = np.sort(np.random.default_rng(seed).choice(distinct, min(k, len(distinct)), replace=False))
    for _ in range(100):
        member = np.argmin(np.abs(values[:, None] - centroids[None]), axis=1)
        moved = np.array([values[member == c].mean() if (member == c).any() else m for c, m in enumerate(centroids)])
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    rank = np.argsort(np.argsort(centroids, kind="stable"), kind="stable")
    return rank[member].astype(np.int32)


def find_clusters(output: Float[Array, "B L C"], axis: Axis, k: int) -> Int[np.ndarray, "l c"]:
    """The cluster of every channel (1, C) or token (L, 1) by its mean magnitude; (1, 1) for the whole tensor."""
    if axis == "tensor":
        return np.zeros((1, 1), np.int32)
    over = (0, 1) if axis == "channel" else (0, 2)
    member = kmeans(np.asarray(jnp.mean(jnp.abs(output), axis=over)), k)
    return member[None] if axis == "channel" else member[:, None]


@partial(jax.jit, static_argnames=("k", "bits", "pow2"))
def search_output_scale(
    exact: Float[Array, "B L C"],
    output: Float[Array, "B L C"],
    member: Int[Array, "l c"],
    *,
    k: int,
    bits: int,
    pow2: bool,
) -> Float32[Array, "l c"]:
    """Scales of an output's clusters, one cluster after the other, for the largest mean cosine to `exact`.

    With `pow2` the scales are then moved to s_0 times a power of two, so that going from one to another is a shift.
    """
    by_cluster = jnp.broadcast_to(member, output.shape[1:]).reshape(-1)
    highest = jax.ops.segment_max(jnp.max(jnp.abs(output), axis=0).reshape(-1), by_cluster, k)
    start = interval(highest, bits)

    def search(c, scales):
        def similarity(fraction: Array) -> Array:
            tried = scales.at[c].set(start[c] * fraction)
            return jnp.mean(cosine(exact, round_to(output, tried[member], bits)))

        return scales.at[c].set(start[c] * best_fraction(similarity))

    scales = lax.fori_loop(0, k, search, start)
    if pow2:
        scales = scales[0] * jnp.exp2(jnp.round(jnp.log2(scales / scales[0])))
    return scales[member]


def output_scale(x: Float[Array, "B L C"], axis: Axis, *, k: int, bits: int, pow2: bool) -> Float32[Array, "l c"]:
    """Clusters and scales of an output that is rounded but otherwise exact."""
    x = x.astype(jnp.float32)
    member = find_clusters(x, axis, k)
    return search_output_scale(x, x, member, k=int(member.max()) + 1, bits=bits, pow2=pow2)
