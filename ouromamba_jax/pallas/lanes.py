"""128 channels of a token, one for each thread of a warpgroup, whatever the number of channels is.

The last block of more than 128 channels starts early: what it shares with its neighbour is computed twice, alike. Of
fewer channels there is one block, whose other threads load zeros and store nothing.
"""

from typing import Any, cast

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, scf, vector
from jaxtyping import Array, Int32

LANES = 128
_LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)


def count_blocks(channels: int) -> int:
    return -(-channels // LANES)


def first_channel(block: Any, channels: int) -> Any:
    """Of a block, static or not."""
    return 0 if channels <= LANES else jnp.minimum(block * LANES, channels - LANES)


def lane() -> Int32[Array, "128"]:
    """Each thread's number."""
    return plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=_LAYOUT)


def load(row: Any, first: Any, *, emulated: bool) -> Array:
    """Channels first..first + 127 of a reference to a row; zeros where it has fewer."""
    (channels,) = row.shape
    if channels >= LANES:
        return row[pl.ds(first, LANES)]
    if emulated:
        return jnp.pad(row[...], (0, LANES - channels))
    result = plgpu.ShapeDtypeStruct((LANES,), row.dtype, layout=_LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT), return_type=result)
    def run(_, row, lanes):
        (position,) = (_scalar(x) for x in lanes.registers.flat)
        kind = row.type.element_type
        number: Any = ir.FloatAttr.get(kind, 0.0) if _is_float(kind) else ir.IntegerAttr.get(kind, 0)
        zero, branch = arith.constant(kind, number), cast(Any, scf.IfOp)
        found = branch(_below(position, channels), [kind], has_else=True)
        with ir.InsertionPoint(found.then_block):
            scf.yield_([memref.load(row, [_index(position)])])
        with ir.InsertionPoint(found.else_block):
            scf.yield_([zero])
        registers = lanes.registers.copy()
        registers.flat[0] = vector.broadcast(ir.VectorType.get((1,), kind), found.results[0])
        return type(lanes)(_registers=registers, _layout=lanes.layout, _is_signed=None if _is_float(kind) else True)

    return run(row, lane())


def where(condition: Any, x: Array, otherwise: Array | float) -> Array:
    """`jnp.where` of one condition for all channels, which Mosaic does not broadcast."""
    return jnp.where(jnp.full(x.shape, condition.astype(jnp.int32)) != 0, x, otherwise)


def dot(row: Any, weights: list[Int32[Array, "128"]], *, emulated: bool) -> Int32[Array, "128"]:
    """The product of a row of int8, four to an int32 word, with those in as many words of each channel."""
    if emulated:
        total = jnp.zeros((LANES,), jnp.int32)
        for w, mine in enumerate(weights):
            for shift in (24, 16, 8, 0):
                level, weight = (lax.shift_right_arithmetic(lax.shift_left(x, shift), 24) for x in (row[w], mine))
                total = total + level * weight
        return total
    result = plgpu.ShapeDtypeStruct((LANES,), jnp.dtype("int32"), layout=_LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[_LAYOUT] * len(weights)), return_type=result)
    def run(_, row, *weights):
        kind = ir.IntegerType.get_signless(32)
        text = {"asm_string": "dp4a.s32.s32 $0, $1, $2, $3;", "constraints": "=r,r,r,r"}
        attributes: Any = {name: ir.StringAttr.get(value) for name, value in text.items()}
        total = _word(0)
        for w, mine in enumerate(_scalar(x) for array in weights for x in array.registers.flat):
            operands = [memref.load(row, [_index(_word(w))]), mine, total]
            made = ir.Operation.create("llvm.inline_asm", results=[kind], operands=operands, attributes=attributes)
            total = made.results[0]
        like = weights[0]
        registers = like.registers.copy()
        registers.flat[0] = vector.broadcast(ir.VectorType.get((1,), kind), total)
        return type(like)(_registers=registers, _layout=like.layout, _is_signed=True)

    return run(row, *weights)


def store(row: Any, first: Any, values: Array, *, emulated: bool) -> None:
    """Writes what `load` would read, in the row's type."""
    (channels,) = row.shape
    values = values.astype(row.dtype)
    if channels >= LANES:
        row[pl.ds(first, LANES)] = values
    elif emulated:
        row[...] = lax.slice(values, (0,), (channels,))
    else:

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT, _LAYOUT))
        def run(_, row, lanes, values):
            (position,), (value,) = ([_scalar(x) for x in array.registers.flat] for array in (lanes, values))
            present = cast(Any, scf.IfOp)(_below(position, channels))
            with ir.InsertionPoint(present.then_block):
                memref.store(value, row, [_index(position)])
                scf.yield_([])

        run(row, lane(), values)


def _is_float(kind: ir.Type) -> bool:
    return not isinstance(kind, ir.IntegerType)


def _scalar(register: ir.Value) -> ir.Value:
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))


def _word(value: int) -> ir.Value:
    kind = ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value))  # type: ignore[arg-type]


def _below(position: ir.Value, bound: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, position, _word(bound))


def _index(position: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), position)
