"""The selective scan on NVIDIA GPUs: what its Mosaic kernels are given, and the states that `collect` wants to see."""

import jax
import jax.numpy as jnp

from ouromamba_jax.ops import scan_xla
from ouromamba_jax.ops.scan_types import Product, Routed, ScanOutput, Unsplit, floats
from ouromamba_jax.ops.split import Split, detection_limit
from ouromamba_jax.pallas import selective_scan as kernel
from ouromamba_jax.pallas.outlier_split import Rule
from ouromamba_jax.pallas.scan_operand import Factor, Operand, Route, pack_words
from ouromamba_jax.pallas.tiles import ScanTiles


def run(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0, reverse, collect, state_transform, **options
) -> ScanOutput:
    """The GPU kernels. They save the state of every few steps; those between are only for `collect`, walked by XLA."""

    tiles = options.get("tiles") or kernel.tiles_for(A, B)

    def operand(x):
        if isinstance(x, Routed):
            if reverse:
                return Operand(x.merge())
            return Operand(x.x, route=Route(*x.grid, x.transpose, x.reverse))
        if isinstance(x, Unsplit):
            if reverse or x.config.detection == "static":
                return operand(x.split())
            limit = detection_limit(x.scale, x.config, x.theta)
            shift = None if x.config.outlier_bits == 16 else x.shift
            rule = Rule.of(x.config, x.shape[1], shift)
            numbers = rule.numbers(x.scale, limit, shift)
            if isinstance(x.x, Product) and x.x.weight.shape[0] <= kernel.MOST_INPUTS:
                split, weight = x.x.split, x.x.weight
                low, high = pack_words(split.low), None if split.high is None else pack_words(split.high)
                factor = Factor.of(weight.values, weight.scale[0], x.x.dtype)
                return Operand(low, high, split.scale[None], numbers, factor, rule)
            return Operand(x.floats(), numbers=numbers, rule=rule)
        return Operand(x.low, x.high, x.scale[None]) if isinstance(x, Split) else Operand(x)

    def operands(x):
        """Of groups that are not of one kind, all as floats: a program reads those of any group alike."""
        if not isinstance(x, tuple):
            return (operand(x),)
        made = tuple(map(operand, x))
        if len({(part.rule, part.scale is None, part.low.dtype) for part in made}) > 1:
            made = (Operand(floats(x, B.dtype)),)
        return made

    y, h_last, starts = kernel.run(
        operands(u), operands(delta), A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus, h0=h0,
        reverse=reverse, with_starts=collect is not None, **options,
    )  # fmt: skip
    if starts is None:
        return ScanOutput(y, h_last, None)

    def walk(chunk, h0):
        u, delta, B = chunk
        return scan_xla.run(
            u, delta, A, B, B, None, None, delta_bias, delta_softplus, h0, False, collect, None
        ).states  # its y is not used

    inputs = floats(u, B.dtype), floats(delta, B.dtype), B
    return ScanOutput(y, h_last, _walk_chunks(walk, inputs, starts, tiles, reverse))


def _walk_chunks(walk, inputs, starts, tiles: ScanTiles, reverse: bool):
    """`walk(chunk of inputs, state before it)` for the chunks of every segment, put together in scan order."""
    batch, length = inputs[0].shape[:2]
    length //= tiles.segments

    def to_chunks(x):
        x = jnp.flip(x, 1) if reverse else x
        x = x.reshape(batch, tiles.segments, length, *x.shape[2:])
        x = jnp.pad(x, [(0, -length % tiles.chunk if axis == 2 else 0) for axis in range(x.ndim)])
        return x.reshape(batch, -1, tiles.chunk, *x.shape[3:])

    def from_chunks(x):
        x = x.reshape(batch, tiles.segments, -1, *x.shape[3:])[:, :, :length]
        return x.reshape(batch, -1, *x.shape[3:])

    states = jax.vmap(walk, in_axes=1, out_axes=1)(jax.tree.map(to_chunks, inputs), starts)
    return jax.tree.map(from_chunks, states)
