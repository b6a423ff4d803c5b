"""Ampere and Ada kernel of the outlier matmul: cp.async, int8 mma.sync, one int32 accumulator in registers.

One warpgroup per output tile. As on Hopper the tile's outlier steps come first (`far`, only if one of its rows
holds a shift), then a shift of every row, then the steps of `near`, which every tile has: the integers are exact. A
tile with a shift that int32 is too small for takes two accumulators, a few columns at a time.
`near` is dense int8 although these GPUs multiply 4-bit integers at twice the speed: 4-bit inliers and an int8 product
of the outliers' channels take 0.76 to 1.09 times as long at best (`scripts/outlier_columns.py`; dt_proj, of few inputs
and no outliers, aside), before any channel is gathered.

4-bit weights may travel packed and are unpacked in registers. A stage in flight is then a quarter to a third smaller,
so that two programs share a multiprocessor and one can load while the other multiplies.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxtyping import Array, Float, Float32, Int8, Int32

from ouromamba_jax.pallas import accumulators
from ouromamba_jax.pallas.store import store
from ouromamba_jax.pallas.tiles import TILE_K, MatmulTiles

HALF = TILE_K // 2


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
    (M, K), N = near.shape, weight.shape[0]
    tile_m, tile_n = tiles.tile_m, tiles.tile_n
    k_tiles = K // TILE_K
    emulated = interpret is not None
    accumulator = plgpu.Layout.MMA_ACC(jnp.int8)
    width = HALF if tiles.packed else TILE_K  # bytes of a weight row per step, and the swizzle that suits them
    tiling = plgpu.TilingTransform((8, width))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(width)  # type: ignore[abstract]

    def multiply(_, *blocks):
        """Adds each plane's product with a block of weights to its accumulator."""
        *planes, b, accs = blocks
        if emulated:
            rhs = b[...].T
        else:
            rhs = plgpu.load(b.transpose((1, 0)), layout=plgpu.Layout.MMA_RHS(jnp.int8), optimized=False)
        if not tiles.packed:
            return tuple(accumulate(acc, a, rhs) for acc, a in zip(accs, planes, strict=True))
        for half in range(2):
            levels, part = _nibbles(rhs, high=half == 1, emulated=emulated), pl.ds(half * HALF, HALF)
            accs = tuple(accumulate(acc, a.at[:, part], levels) for acc, a in zip(accs, planes, strict=True))
        return accs

    def accumulate(acc, a, rhs):
        if emulated:  # the interpreter has no mma
            return acc + jnp.matmul(a[...], rhs, preferred_element_type=jnp.int32)
        return plgpu.mma(acc, plgpu.load(a, layout=plgpu.Layout.MMA_LHS(jnp.int8), optimized=False), rhs)

    def outlier_matmul(near, far, largest_shift, same_shift, shift, row_scale, weight, column_scale, *rest):
        *biases, out = rest
        row_tile, first_column = lax.axis_index("row_tile"), lax.axis_index("column_tile") * tile_n
        # The last tile of a ragged M starts early: rows shared with its neighbour are written twice, alike.
        rows = pl.ds(jnp.minimum(row_tile * tile_m, M - tile_m), tile_m)

        def products(planes, columns, accs, stages):
            def spec(height, columns):
                return plgpu.BlockSpec(
                    (height, columns),
                    lambda step: (0, step),
                    transforms=(tiling, swizzle),
                    oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )

            pipeline = plgpu.emit_pipeline(
                multiply,
                grid=(k_tiles,),
                in_specs=[*[spec(tile_m, TILE_K)] * len(planes), spec(columns.size, width)],
                max_concurrent_steps=stages,
                init_carry=accs,
            )
            return pipeline(*(plane.at[rows] for plane in planes), weight.at[columns])

        def zeros(columns):
            return plgpu.layout_cast(jnp.zeros((tile_m, columns.size), jnp.int32), accumulator)

        def per_row(ref):
            return plgpu.load(ref.at[rows], layout=accumulator.reduce(1), optimized=False)

        def write(y, columns):
            w, *offset = (
                plgpu.load(ref.at[columns], layout=accumulator.reduce(0), optimized=False)
                for ref in (column_scale, *biases)
            )
            w = w * 0.0625 if tiles.packed else w
            store(out.at[rows, columns], accumulators.scaled(y, w, *offset))

        @pl.when(largest_shift[row_tile] <= limit)
        def _one_accumulator():
            columns = pl.ds(first_column, tile_n)

            def add(plane, acc):
                return products([plane], columns, (acc,), tiles.stages)[0]

            # Shifts are at most 126, so once at most; if the compiler knew, it would merge both pipelines and spill.
            rounds = pl.cdiv(same_shift[row_tile], 126)
            acc = lax.fori_loop(0, rounds, lambda _, acc: add(far, acc), zeros(columns))
            acc = add(near, accumulators.shifted(acc, per_row(shift)))
            write(acc.astype(jnp.float32) * lax.broadcast_in_dim(per_row(row_scale), acc.shape, [0]), columns)

        def two_accumulators(i, _):
            columns = pl.ds(first_column + i * accumulators.COLUMNS, accumulators.COLUMNS)
            outliers, inliers = products([far, near], columns, (zeros(columns),) * 2, 1)
            y = accumulators.add(outliers, inliers, per_row(shift), per_row(row_scale), limit)
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


def _nibbles(both: Int8[Array, "half N"], *, high: bool, emulated: bool) -> Int8[Array, "half N"]:
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
