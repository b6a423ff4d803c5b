"""4-bit levels in registers, a word of them at a time: Pallas has no operations of its own for them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxtyping import Array, Int8


def sixteenfold(both: Int8[Array, "..."], *, high: bool, layout: Any) -> Int8[Array, "..."]:
    """16 times the levels in the low or high nibbles of bytes.

    Args:
      layout: of the bytes' registers, four or a multiple of it to each; None in the interpreter.
    """
    if layout is None:
        return both & jnp.int8(-16) if high else lax.shift_left(both, jnp.int8(4))

    def unpack(register):
        (size,) = register.type.shape
        words = ir.VectorType.get((size // 4,), ir.IntegerType.get_signless(32))

        def constant(value):
            splat = ir.DenseElementsAttr.get_splat(words, ir.IntegerAttr.get(words.element_type, value))
            return arith.constant(words, splat)  # type: ignore[arg-type]

        value = vector.bitcast(words, register)
        value = value if high else arith.shli(value, constant(4))  # there is no 8-bit shift
        return vector.bitcast(register.type, arith.andi(value, constant(0xF0F0F0F0 - 2**32)))

    result = plgpu.ShapeDtypeStruct(both.shape, both.dtype, layout=layout)
    return _each_register(unpack, layout, result)(both)


def as_int4(both: Int8[Array, "..."], *, axis: int) -> Array:
    """Bytes along K as the two levels in each; a register of either product holds the same bytes."""
    operand = plgpu.Layout.MMA_RHS if axis == 0 else plgpu.Layout.MMA_LHS
    shape = tuple(size * (2 if i == axis else 1) for i, size in enumerate(both.shape))
    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.int4), layout=operand(jnp.int4))

    def reinterpret(register):
        return vector.bitcast(ir.VectorType.get((8,), ir.IntegerType.get_signless(4)), register)

    return _each_register(reinterpret, operand(jnp.int8), result)(both)


def _each_register(
    function: Callable[[ir.Value], ir.Value], layout: Any, result: plgpu.ShapeDtypeStruct
) -> Callable[[Array], Array]:
    """An operation on arrays of this layout, register by register."""

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def run(_, array):
        registers = np.empty_like(array.registers)
        for index, register in np.ndenumerate(array.registers):
            registers[index] = function(register)
        return type(array)(_registers=registers, _layout=result.layout.to_mgpu(), _is_signed=True)

    return run
