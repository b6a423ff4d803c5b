"""What makes an activation and its split in one GPU kernel: the activation itself need not be written.

A producer gives one token at a time, rounded to the model's type before it is split, as it is without the kernel.
Either every channel is made on its own (`by_channel`: a thread owns one and walks the tokens of a window), or a token
is normalised over its channels (`by_row`: a program owns a window with all channels).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ouromamba_jax.pallas import lanes
from ouromamba_jax.pallas.lanes import LANES
from ouromamba_jax.pallas.outlier_split import AHEAD, Rule


class Site(NamedTuple):
    """How an activation (B, L, C) is split: the rule, its numbers for every token, and the activation's shape."""

    rule: Rule
    numbers: tuple[Array, ...]
    shape: tuple[int, int, int]


class Row(NamedTuple):
    """Loads channels of a token in float32: those of my block, of `width` ones beginning at `start` of a reference."""

    first: Any
    width: int
    emulated: bool

    def __call__(self, ref: Any, *index: Any, start: Any = 0) -> Array:
        row = ref.at[*index, pl.ds(start, self.width)]
        return lanes.load(row, self.first, emulated=self.emulated).astype(jnp.float32)


def by_channel(
    name: str,
    value: Callable[..., Array],
    arrays: tuple[Any, ...],
    site: Site,
    *,
    dtype: Any,
    parts: int = 1,
    keep: bool = False,
    interpret: Any = None,
) -> list[Array]:
    """Splits value(refs, row, sample, t, part), float32 of my 128 channels of token t, after rounding it to `dtype`.

    Returns the low bytes of the levels, the high ones if there are any, and the activation if it is kept.

    Args:
      name: of the kernel, as profilers show it.
      arrays: what the kernel reads, a pytree, whose references `value` gets.
      parts: equal parts of the channels, one after the other, each with its own numbers of blocks.
      keep: whether the activation is wanted, too.
    """
    rule, numbers, (B, L, C) = site
    width, emulated = C // parts, interpret is not None
    blocks = lanes.count_blocks(width)
    kept = [jax.ShapeDtypeStruct((B, L, C), dtype)] if keep else []
    operands, structure = jax.tree.flatten((arrays, numbers))

    def body(*refs):
        arrays, numbers = jax.tree.unflatten(structure, refs[: len(operands)])
        results = refs[len(operands) :]
        sample, window = lax.axis_index("sample"), lax.axis_index("window")
        block = lax.axis_index("block")
        part, row = block // blocks, Row(lanes.first_channel(lax.rem(block, blocks), width), width, emulated)
        of_part = pl.ds(part * width, width)

        def walk(k, first):
            tokens = []
            for i in (k * AHEAD + i for i in range(min(AHEAD, rule.window))):
                # Past a window's or the sample's end the last token comes again, which changes nothing.
                t = jnp.minimum(window * rule.window + jnp.minimum(i, rule.window - 1), L - 1)
                tokens.append((i, t, value(arrays, row, sample, t, part).astype(dtype).astype(jnp.float32)))
            for i, t, x in tokens:
                level, first = rule.level(x, i, first, tuple(ref[t] for ref in numbers))
                for ref, values in zip(results, (*rule.bytes(level), *([x] * len(kept))), strict=True):
                    lanes.store(ref.at[sample, t, of_part], row.first, values, emulated=emulated)
            return first

        nothing = jnp.full((LANES,), rule.window, jnp.int32)
        lax.fori_loop(0, -(-rule.window // AHEAD), walk, nothing)

    grid = (parts * blocks, -(-L // rule.window), B)
    return _launch(name, body, operands, site, kept, grid, ("block", "window", "sample"), interpret)


def by_row(
    name: str,
    value: Callable[..., Array],
    normalise: Callable[..., list[Array]],
    arrays: tuple[Any, ...],
    site: Site,
    *,
    dtype: Any,
    interpret: Any = None,
) -> list[Array]:
    """Splits normalise(refs, rows, values, total), after rounding it to `dtype`; returns bytes as `by_channel` does.

    Args:
      value: value(refs, row, sample, t) -> float32 to be normalised, a block of channels.
      normalise: of all blocks' values, with `total(list of vectors)` for a sum over the token's channels.
    """
    rule, numbers, (B, L, C) = site
    emulated = interpret is not None
    blocks = lanes.count_blocks(C)
    operands, structure = jax.tree.flatten((arrays, numbers))

    def body(*refs):
        arrays, numbers = jax.tree.unflatten(structure, refs[: len(operands)])
        planes = refs[len(operands) :]
        sample, window = lax.axis_index("sample"), lax.axis_index("window")
        start = window * rule.window
        count = jnp.minimum(rule.window, L - start)
        rows = [Row(min(i * LANES, max(C - LANES, 0)), C, emulated) for i in range(blocks)]
        again = blocks * LANES - C  # channels that the last block shares with its neighbour, or has not

        def total(vectors):
            *whole, last = vectors
            if again:
                mine = lanes.lane() >= again if blocks > 1 else lanes.lane() < C
                last = jnp.where(mine, last, 0.0)
            return jnp.sum(sum(whole, last))

        def load(i):
            t = start + jnp.minimum(i, count - 1)
            return [value(arrays, row, sample, t) for row in rows]

        def token(i, carry):
            firsts, loaded = carry
            following, t = load(i + 1), start + i  # which arrives while this token is split
            values = normalise(arrays, rows, loaded, total)
            numbers_here = tuple(ref[t] for ref in numbers)
            listed = []
            for row, x, first in zip(rows, values, firsts, strict=True):
                x = x.astype(dtype).astype(jnp.float32)
                level, first = rule.level(x, i, first, numbers_here)
                listed.append(first)
                for ref, vector in zip(planes, rule.bytes(level), strict=True):
                    lanes.store(ref.at[sample, t], row.first, vector, emulated=emulated)
            return listed, following

        nothing = [jnp.full((LANES,), rule.window, jnp.int32) for _ in rows]
        lax.fori_loop(0, count, token, (nothing, load(0)))

    grid = (-(-L // rule.window), B)
    return _launch(name, body, operands, site, [], grid, ("window", "sample"), interpret)


def copied_width(channels: int) -> int:
    """Channels that a product's copies of a token cover: what follows its own is not written, and meets no weight."""
    return channels if channels < LANES else channels + -channels % 32


def _launch(name, body, operands, site: Site, kept, grid, grid_names, interpret) -> list[Array]:
    batch, tokens, channels = site.shape
    levels = site.rule.planes(batch, tokens, copied_width(channels))
    body.__name__ = name
    results = plgpu.kernel(
        body,
        out_type=(*levels, *kept),
        grid=grid,
        grid_names=grid_names,
        # No memory is both read and written.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=8192),
        **({"interpret": interpret} if interpret is not None else {}),
    )(*operands)
    return list(results)
