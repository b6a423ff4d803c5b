"""Ampere and Ada kernel of the outlier matmul: cp.async, int8 mma.sync, one int32 accumulator in registers.

One warpgroup per output tile. As on Hopper the tile's outlier steps come first (`far`, only if one of its rows
holds a shift), then a shift of every row, then the steps of `near`, which every tile has: the integers are exact.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8, Int32

from ouromamba_jax.pallas.store import store
from ouromamba_jax.pallas.tiles import TILE_K, MatmulTiles


def matmul(
    near: Int8[Array, "M K"],
    far: Int8[Array, "M K"],
    shifted: Int32[Array, " tiles"],
    shift: Int32[Array, " M"],
    row_scale: Float32[Array, " M"],
    weight: Int8[Array, "N K"],
    column_scale: Float32[Array, " N"],
    *,
    tiles: MatmulTiles,
    dtype: Any = jnp.float32,
    interpret=None,
) -> Float[Array, "M N"]:
    """((far @ W^T) * 2^shift + near @ W^T) * row_scale * column_scale, for M >= tile_m, K % 128 = 0 = N % tile_n.

    Arguments as in the Hopper kernel.
    """
    (M, K), N = near.shape, weight.shape[0]
    tile_m, tile_n = tiles.tile_m, tiles.tile_n
    k_tiles = K // TILE_K
    emulated = interpret is not None
    accumulator = plgpu.Layout.MMA_ACC(jnp.int8)
    tiling = plgpu.TilingTransform((8, TILE_K))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(TILE_K)  # type: ignore[abstract]

    def multiply(_, a, b, acc):
        if emulated:  # the interpreter has no mma
            contraction = (((1,), (1,)), ((), ()))
            return acc + lax.dot_general(a[...], b[...], contraction, preferred_element_type=jnp.int32)
        lhs = plgpu.load(a, layout=plgpu.Layout.MMA_LHS(jnp.int8), optimized=False)
        rhs = plgpu.load(b.transpose((1, 0)), layout=plgpu.Layout.MMA_RHS(jnp.int8), optimized=False)
        return plgpu.mma(acc, lhs, rhs)

    def body(near, far, shifted, shift, row_scale, weight, column_scale, out):
        row_tile = lax.axis_index("row_tile")
        # The last tile of a ragged M starts early: rows shared with its neighbour are written twice, alike.
        rows = pl.ds(jnp.minimum(row_tile * tile_m, M - tile_m), tile_m)
        columns = pl.ds(lax.axis_index("column_tile") * tile_n, tile_n)

        def products(plane, acc):
            def spec(height):
                return plgpu.BlockSpec(
                    (height, TILE_K),
                    lambda step: (0, step),
                    transforms=(tiling, swizzle),
                    oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )

            pipeline = plgpu.emit_pipeline(
                multiply,
                grid=(k_tiles,),
                in_specs=[spec(tile_m), spec(tile_n)],
                max_concurrent_steps=tiles.stages,
                init_carry=acc,
            )
            return pipeline(plane.at[rows], weight.at[columns])

        acc = plgpu.layout_cast(jnp.zeros((tile_m, tile_n), jnp.int32), accumulator)
        acc = lax.fori_loop(0, shifted[row_tile], lambda _, acc: products(far, acc), acc)
        power = plgpu.load(shift.at[rows], layout=accumulator.reduce(1), optimized=False)
        acc = lax.shift_left(acc, lax.broadcast_in_dim(power, acc.shape, [0]))
        acc = products(near, acc)
        scale = plgpu.load(row_scale.at[rows], layout=accumulator.reduce(1), optimized=False)
        w = plgpu.load(column_scale.at[columns], layout=accumulator.reduce(0), optimized=False)
        y = acc.astype(jnp.float32) * lax.broadcast_in_dim(scale, acc.shape, [0])
        y = y * lax.broadcast_in_dim(w, acc.shape, [1])
        store(out.at[rows, columns], y)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        grid=(pl.cdiv(M, tile_m), N // tile_n),
        grid_names=("row_tile", "column_tile"),
        **({"interpret": interpret} if emulated else {}),
    )(near, far, shifted, shift, row_scale, weight, column_scale)
