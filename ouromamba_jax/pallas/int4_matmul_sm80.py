"""Ampere and Ada kernel of the published split: INT4 inliers and compacted INT8 outliers in one int32 accumulator.

One warpgroup per output tile. The outliers' steps come first, as many as the tile's list fills; then a shift of every
row, then the inliers' steps at twice the speed.
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
    inliers: Int8[Array, "M half"],
    outliers: Int8[Array, "tiles rows capacity"],
    steps: Int32[Array, " tiles"],
    shift: Int32[Array, " M"],
    row_scale: Float32[Array, " M"],
    weight: Int8[Array, "N half"],
    outlier_weight: Int8[Array, "tiles N capacity"],
    column_scale: Float32[Array, " N"],
    bias: Float[Array, " N"] | None = None,
    *,
    tiles: MatmulTiles,
    dtype: Any = jnp.float32,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """((outliers @ outlier_weight^T) * 2^shift + inliers @ weight^T) * row_scale * column_scale + bias.

    For M >= tile_m; 8, 128, 128 and tile_n divide M, half, capacity and N.

    Args:
      inliers, weight: levels of 4 bits, two to a byte in the same order.
      outliers: of each tile of rows its listed channels, and the weights of these.
      steps: how many 128 channels of a tile's list count.
      tiles: tile_m, tile_n and stages.
    """
    M, N = inliers.shape[0], weight.shape[0]
    tile_m, tile_n = tiles.tile_m, tiles.tile_n
    emulated = interpret is not None

    def int4_matmul(inliers, outliers, steps, shift, row_scale, weight, outlier_weight, column_scale, *rest):
        *biases, out = rest
        tile, columns = lax.axis_index("row_tile"), pl.ds(lax.axis_index("column_tile") * tile_n, tile_n)
        # The last tile of a ragged M starts early: rows shared with its neighbour are written twice, alike.
        rows = pl.ds(jnp.minimum(tile * tile_m, M - tile_m), tile_m)

        def add(levels, left, right, acc, steps=None):
            (acc,) = multiply_add(
                [left], right, (acc,), levels=levels, stages=tiles.stages, emulated=emulated, steps=steps
            )
            return acc

        def per_row(ref):
            x = plgpu.load(ref.at[rows], layout=ACCUMULATOR.reduce(1), optimized=False)
            return lax.broadcast_in_dim(x, (tile_m, tile_n), [0])

        acc = zeros(tile_m, tile_n)
        acc = add("int8", outliers.at[tile], outlier_weight.at[tile].at[columns], acc, steps[tile])
        acc = add("int4", inliers.at[rows], weight.at[columns], lax.shift_left(acc, per_row(shift)))
        per_column = (
            plgpu.load(ref.at[columns], layout=ACCUMULATOR.reduce(0), optimized=False)
            for ref in (column_scale, *biases)
        )
        y = acc.astype(jnp.float32) * per_row(row_scale)
        store(out.at[rows, columns], accumulators.scaled(y, *per_column))

    kernel = plgpu.kernel(
        int4_matmul,
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        grid=(pl.cdiv(M, tile_m), N // tile_n),
        grid_names=("row_tile", "column_tile"),
        **({"interpret": interpret} if emulated else {}),
    )
    biases = [] if bias is None else [bias]
    return kernel(inliers, outliers, steps, shift, row_scale, weight, outlier_weight, column_scale, *biases)
