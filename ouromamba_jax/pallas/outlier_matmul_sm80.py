"""Ampere and Ada kernel of the outlier matmul: mma.sync, one int32 accumulator in registers for both bytes of levels.

One warpgroup per output tile. As on Hopper a second plane's steps come first, then the accumulator is shifted left by
8. Levels are dense int8 although these GPUs multiply 4-bit integers at twice the speed; `int4_matmul` does that.

4-bit weights may travel packed and are unpacked in registers. A stage in flight is then a quarter to a third smaller,
so that two programs share a multiprocessor and one can load while the other multiplies.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8

from ouromamba_jax.pallas.accumulators import epilogue
from ouromamba_jax.pallas.mma_pipeline import ACCUMULATOR, multiply_add, zeros
from ouromamba_jax.pallas.store import store
from ouromamba_jax.pallas.tiles import MatmulTiles


def matmul(
    planes: Sequence[Int8[Array, "M K"]],
    row_scale: Float32[Array, " more"],
    weight: Int8[Array, "N columns"],
    columns: Sequence[Float[Array, " N"]],
    added: Sequence[Float32[Array, "M N"]] = (),
    *,
    tiles: MatmulTiles,
    dtype: Any = jnp.float32,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """planes @ W^T * column_scale * row_scale + bias. Arguments as of the Hopper kernel, K whole steps."""
    M, (N,) = planes[0].shape[0], columns[0].shape
    tile_m, tile_n = tiles.tile_m, tiles.tile_n
    period = row_scale.shape[0] - tile_m
    emulated = interpret is not None
    operands = list(planes), row_scale, weight, list(columns), list(added)
    structure = jax.tree.structure((*operands, 0))

    def outlier_matmul(*refs):
        planes, row_scale, weight, columns, added, out = jax.tree.unflatten(structure, refs)
        # The last tile of a ragged M or N starts early: what it shares with its neighbour is written twice, alike.
        first = jnp.minimum(lax.axis_index("row_tile") * tile_m, M - tile_m)
        here = pl.ds(jnp.minimum(lax.axis_index("column_tile") * tile_n, N - tile_n), tile_n)

        def add(plane, acc):
            return multiply_add(
                plane.at[pl.ds(first, tile_m)],
                weight.at[here],
                acc,
                packing="packed" if tiles.packed else "int8",
                stages=tiles.stages,
                emulated=emulated,
            )

        *high, low = planes
        acc = zeros(tile_m, tile_n)
        for plane in high:
            acc = lax.shift_left(add(plane, acc), 8)
        acc = add(low, acc)
        rows = pl.ds(lax.rem(first, period), tile_m)
        scale = plgpu.load(row_scale.at[rows], layout=ACCUMULATOR.reduce(1), optimized=False)
        w, *offset = (plgpu.load(ref.at[here], layout=ACCUMULATOR.reduce(0), optimized=False) for ref in columns)
        y = epilogue(acc, scale * 0.0625 if tiles.packed else scale, w, *offset)
        for ref in added:
            x = plgpu.load(ref.at[pl.ds(first, tile_m), here], layout=ACCUMULATOR, optimized=False)
            y = x + y.astype(dtype).astype(jnp.float32)
        store(out.at[pl.ds(first, tile_m), here], y)

    return plgpu.kernel(
        outlier_matmul,
        out_type=jax.ShapeDtypeStruct((M, N), jnp.float32 if added else dtype),
        grid=(pl.cdiv(M, tile_m), pl.cdiv(N, tile_n)),
        grid_names=("row_tile", "column_tile"),
        **({"interpret": interpret} if emulated else {}),
    )(*jax.tree.leaves(operands))
