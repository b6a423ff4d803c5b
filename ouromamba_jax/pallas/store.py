"""Stores from registers that Pallas does not offer, or not in every version of JAX."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, scf, vector
from jaxtyping import Array, Int8, Int32


def store(ref: Any, value: Any) -> None:
    """Writes `value` to global memory in ref's type, thread by thread as it lies in registers."""
    value = value.astype(ref.dtype)
    if hasattr(plgpu, "store"):  # jax 0.11 has no `store`, 0.12 refuses the plain one
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def store_listed(row: Any, places: Int32[Array, " width"], values: Int8[Array, " width"], *, emulated: Any) -> None:
    """Writes each value with a place to row[place - 1], byte by byte; places are from 1 on and differ, or 0.

    Args:
      row: a reference to int8 (width,).
      emulated: not None if this is interpreted, which writes zeros to all other places.
    """
    (width,) = places.shape
    if emulated is not None:
        row[...] = jnp.zeros_like(values).at[jnp.where(places > 0, places - 1, width)].set(values, mode="drop")
        return
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=1)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    def scatter(_, row, places, values):
        word = ir.IntegerType.get_signless(32)
        one = arith.constant(word, ir.IntegerAttr.get(word, 1))  # type: ignore[arg-type]
        first = ir.DenseI64ArrayAttr.get([0])
        for place, value in zip(places.registers, values.registers, strict=True):
            number, byte = (vector.extract(x, dynamic_position=[], static_position=first) for x in (place, value))
            is_listed = scf.IfOp(arith.cmpi(arith.CmpIPredicate.sge, number, one))  # type: ignore[call-arg]
            with ir.InsertionPoint(is_listed.then_block):
                index = arith.index_cast(ir.IndexType.get(), arith.subi(number, one))
                memref.store(byte, row, [index])
                scf.yield_([])

    scatter(row, places, values)
