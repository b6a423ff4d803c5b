"""Ampere and Ada kernel of the outlier matmul: cp.async, int8 mma.sync, one int32 accumulator in registers.

One warpgroup per output tile. As on Hopper the tile's outlier steps come first (`far`, only if one of its rows
holds a shift), then a shift of every row, then the steps of `near`, which every tile has: the integers are exact. A
tile with a shift that int32 is too small for takes two accumulators, a few columns at a time.
`near` is dense int8 although these GPUs multiply 4-bit integers at twice the speed: 4-bit inliers and an int8 product
of the outliers' channels (`int4_matmul`) take 0.76 to 1.09 times as long at best (`scripts/outlier_columns.py`;
dt_proj, of few inputs and no outliers, aside), before any channel is gathered.

4-bit weights may travel packed and are unpacked in registers. A stage in flight is then a quarter to a third smaller,
so that two programs share a multiprocessor and one can load while the other multiplies.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8, Int32

from ouromamba_jax.pallas import accumulators
from ouromamba_jax.pallas.mma_pipeline import ACCUMULATOR, multiply_add, zeros
from ouromamba_jax.pallas.store import store
from ouromamba_jax.pallas.tiles import MatmulTiles


def matmul(
    near: Int8[Array, "M K"],
    far: Int8[Array, "M K"],
    largest_shift: Int32[Array, " tiles"],
    shift: Int32[Array, " M"],
    row_scale: Float32[Array, " M"],
    weight: Int8[Array, "N columns"],
    column_scale: Float32[Array, " N"],
    bias: Float[Array, " N"] | None = None,
    *,
    tiles: MatmulTiles,
    limit: int,
    dtype: Any = jnp.float32,
    interpret=None,
) -> Float[Array, "M N"]:
    """((far @ W^T) * 2^shift + near @ W^T) * row_scale * column_scale + bias.

    For M >= tile_m; 8, 128 and tile_n divide M, K and N. Arguments as in the Hopper kernel.
    """
    M, N = near.shape[0], weight.shape[0]
    tile_m, tile_n = tiles.tile_m, tiles.tile_n
    emulated = interpret is not None

    def outlier_matmul(near, far, largest_shift, same_shift, shift, row_scale, weight, column_scale, *rest):
        *biases, out = rest
        row_tile, first_column = lax.axis_index("row_tile"), lax.axis_index("column_tile") * tile_n
        # The last tile of a ragged M starts early: rows shared with its neighbour are written twice, alike.
        rows = pl.ds(jnp.minimum(row_tile * tile_m, M - tile_m), tile_m)

        def products(planes, columns, accs, stages):
            return multiply_add(
                [plane.at[rows] for plane in planes],
                weight.at[columns],
                accs,
                levels="packed" if tiles.packed else "int8",
                stages=stages,
                emulated=emulated,
            )

        def per_row(ref):
            return plgpu.load(ref.at[rows], layout=ACCUMULATOR.reduce(1), optimized=False)

        def scale_of_rows():
            return per_row(row_scale) * 0.0625 if tiles.packed else per_row(row_scale)

        def write(y, columns):
            w, *offset = (
                plgpu.load(ref.at[columns], layout=ACCUMULATOR.reduce(0), optimized=False)
                for ref in (column_scale, *biases)
            )
            store(out.at[rows, columns], accumulators.scaled(y, w, *offset))

        @pl.when(largest_shift[row_tile] <= limit)
        def _one_accumulator():
            columns = pl.ds(first_column, tile_n)

            def add(plane, acc):
                return products([plane], columns, (acc,), tiles.stages)[0]

            # Shifts are at most 126, so once at most; if the compiler knew, it would merge both pipelines and spill.
            rounds = pl.cdiv(same_shift[row_tile], 126)
            acc = lax.fori_loop(0, rounds, lambda _, acc: add(far, acc), zeros(tile_m, tile_n))
            acc = add(near, accumulators.shifted(acc, per_row(shift)))
            write(acc.astype(jnp.float32) * lax.broadcast_in_dim(scale_of_rows(), acc.shape, [0]), columns)

        def two_accumulators(i, _):
            columns = pl.ds(first_column + i * accumulators.COLUMNS, accumulators.COLUMNS)
            outliers, inliers = products([far, near], columns, (zeros(tile_m, accumulators.COLUMNS),) * 2, 1)
            y = accumulators.add(outliers, inliers, per_row(shift), scale_of_rows(), limit)
            write(y, columns)

        # The compiler would unroll a loop whose end it knows, and spill.
        parts = jnp.where(largest_shift[row_tile] > limit, tile_n // accumulators.COLUMNS, 0)
        lax.fori_loop(0, parts, two_accumulators, None)

    kernel = plgpu.kernel(
        outlier_matmul,
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        grid=(pl.cdiv(M, tile_m), N // tile_n),
        grid_names=("row_tile", "column_tile"),
        **({"interpret": interpret} if emulated else {}),
    )
    biases = [] if bias is None else [bias]
    return kernel(near, far, largest_shift, largest_shift, shift, row_scale, weight, column_scale, *biases)
