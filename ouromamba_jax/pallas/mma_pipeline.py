"""Products of levels on Ampere and Ada: K-steps arrive by cp.async, mma.sync adds them to accumulators in registers."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxtyping import Array, Int8, Int32

from ouromamba_jax.pallas.tiles import TILE_K

Levels = Literal["int8", "packed", "int4"]
"""One to a byte; 4-bit weights two to a byte, unpacked in registers; weights and activations two to a byte."""
HALF = TILE_K // 2
ACCUMULATOR = plgpu.Layout.MMA_ACC(jnp.int8)
"""Of either product: a 4-bit one has the same."""


def zeros(rows: int, columns: int) -> Int32[Array, "rows columns"]:
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.int32), ACCUMULATOR)


def multiply_add(
    planes: Sequence[Any],
    weight: Any,
    accumulators: tuple[Int32[Array, "rows columns"], ...],
    *,
    levels: Levels,
    stages: int,
    emulated: bool,
    steps: Int32[Array, ""] | None = None,
) -> tuple[Int32[Array, "rows columns"], ...]:
    """Adds each plane @ weight^T to its accumulator; packed weights count sixteenfold.

    Args:
      planes: references to int8 (rows, bytes), whole steps of `TILE_K` bytes.
      weight: a reference to int8 (columns, bytes), half as many if "packed". Nibbles are those of `pack_halves`, "int4"
        of any block that both operands share.
      stages: steps in flight.
      emulated: whether this is interpreted, without mma.
      steps: how many of the steps count; None takes all.
    """
    columns, width = weight.shape[0], HALF if levels == "packed" else TILE_K
    tiling = plgpu.TilingTransform((8, width))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(width)  # type: ignore[abstract]

    def step(indices, *blocks):
        *refs, accs = blocks
        if steps is None:
            return products(*refs, accs)
        return lax.cond(indices[0] < steps, lambda: products(*refs, accs), lambda: accs)

    def products(*blocks):
        *lefts, right, accs = blocks
        if emulated:
            rhs = right[...].T
        else:
            rhs = plgpu.load(right.transpose((1, 0)), layout=plgpu.Layout.MMA_RHS(jnp.int8), optimized=False)
        if levels != "packed":
            return tuple(accumulate(acc, left, rhs) for acc, left in zip(accs, lefts, strict=True))
        for half in range(2):
            unpacked, part = _nibbles(rhs, high=half == 1, emulated=emulated), pl.ds(half * HALF, HALF)
            accs = tuple(accumulate(acc, left.at[:, part], unpacked) for acc, left in zip(accs, lefts, strict=True))
        return accs

    def accumulate(acc, left, rhs):
        if emulated:
            pairs = [(left[...], rhs)]
            if levels == "int4":
                pairs = [[_nibbles(x, high=high, emulated=True) >> 4 for x in pairs[0]] for high in (False, True)]
            return acc + sum(jnp.matmul(a, b, preferred_element_type=jnp.int32) for a, b in pairs)
        lhs = plgpu.load(left, layout=plgpu.Layout.MMA_LHS(jnp.int8), optimized=False)
        if levels == "int4":
            lhs, rhs = _as_int4(lhs, axis=1), _as_int4(rhs, axis=0)
        return plgpu.mma(acc, lhs, rhs)

    def column(step):
        """Of a step that does not count, that of the last which does: it is near."""
        return step if steps is None else jnp.clip(steps - 1, 0, step)

    def spec(height, width):
        return plgpu.BlockSpec(
            (height, width),
            lambda step: (0, column(step)),
            transforms=(tiling, swizzle),
            oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        )

    pipeline = plgpu.emit_pipeline(
        step,
        grid=(planes[0].shape[1] // TILE_K,),
        in_specs=[*(spec(plane.shape[0], TILE_K) for plane in planes), spec(columns, width)],
        max_concurrent_steps=stages,
        init_carry=accumulators,
    )
    return pipeline(*planes, weight)


def _nibbles(both: Int8[Array, "..."], *, high: bool, emulated: bool) -> Int8[Array, "..."]:
    """16 times the levels in the high or low nibbles. Four to a word, since there is no 8-bit shift."""
    if emulated:
        return both & jnp.int8(-16) if high else lax.shift_left(both, jnp.int8(4))
    layout = plgpu.Layout.MMA_RHS(jnp.int8)
    result = plgpu.ShapeDtypeStruct(both.shape, both.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def unpack(_, both):
        word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))

        def constant(value):
            splat = ir.DenseElementsAttr.get_splat(word, ir.IntegerAttr.get(word.element_type, value))
            return arith.constant(word, splat)  # type: ignore[arg-type]

        four, mask = constant(4), constant(0xF0F0F0F0 - 2**32)
        registers = np.empty_like(both.registers)
        for index, register in np.ndenumerate(both.registers):
            value = vector.bitcast(word, register)
            value = arith.andi(value if high else arith.shli(value, four), mask)
            registers[index] = vector.bitcast(register.type, value)
        return type(both)(_registers=registers, _layout=both.layout, _is_signed=True)

    return unpack(both)


def _as_int4(both: Int8[Array, "..."], *, axis: int) -> Array:
    """Bytes along K as the two levels in each; a register of either product holds the same bytes."""
    operand = plgpu.Layout.MMA_RHS if axis == 0 else plgpu.Layout.MMA_LHS
    shape = tuple(size * (2 if i == axis else 1) for i, size in enumerate(both.shape))
    int4 = operand(jnp.int4)
    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.int4), layout=int4)

    @plgpu.inline_mgpu(arg_types=(operand(jnp.int8),), return_type=result)
    def reinterpret(_, both):
        eight = ir.VectorType.get((8,), ir.IntegerType.get_signless(4))
        registers = np.empty_like(both.registers)
        for index, register in np.ndenumerate(both.registers):
            registers[index] = vector.bitcast(eight, register)
        return type(both)(_registers=registers, _layout=int4.to_mgpu(), _is_signed=True)

    return reinterpret(both)
