"""Ampere and Ada kernel of the published split: INT4 entries and compacted INT8 ones in one int32 accumulator.

One warpgroup per output tile. The INT8 steps come first, as many as the tile's list fills; then the others at twice the
speed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8, Int32

from ouromamba_jax.pallas.accumulators import epilogue
from ouromamba_jax.pallas.mma_pipeline import ACCUMULATOR, multiply_add, zeros
from ouromamba_jax.pallas.store import store
from ouromamba_jax.pallas.tiles import MatmulTiles


def matmul(
    small: Int8[Array, "M half"],
    large: Int8[Array, "tiles rows capacity"],
    steps: Int32[Array, " tiles"],
    row_scale: Float32[Array, " more"],
    weight: Int8[Array, "N half"],
    large_weight: Int8[Array, "tiles N capacity"],
    column_scale: Float32[Array, " N"],
    bias: Float[Array, " N"] | None = None,
    *,
    tiles: MatmulTiles,
    dtype: Any = jnp.float32,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """(large @ large_weight^T + small @ weight^T) * column_scale * row_scale + bias.

    For M >= tile_m; 8, 128, 128 and tile_n divide M, half, capacity and N.

    Args:
      small, weight: levels of 4 bits, two to a byte in the same order.
      large, large_weight: of each tile of rows the channels of its list, and the weights of these.
      steps: how many 128 channels of a tile's list count.
      row_scale: `periodic(scale, tile_m)`.
      tiles: tile_m, tile_n and stages.
    """
    M, N = small.shape[0], weight.shape[0]
    tile_m, tile_n = tiles.tile_m, tiles.tile_n
    period = row_scale.shape[0] - tile_m
    emulated = interpret is not None

    def int4_matmul(small, large, steps, row_scale, weight, large_weight, *rest):
        *per_column, out = rest
        tile, columns = lax.axis_index("row_tile"), pl.ds(lax.axis_index("column_tile") * tile_n, tile_n)
        # The last tile of a ragged M starts early: rows shared with its neighbour are written twice, alike.
        first = jnp.minimum(tile * tile_m, M - tile_m)
        rows = pl.ds(first, tile_m)

        def add(packing, left, right, acc, steps=None):
            return multiply_add(left, right, acc, packing=packing, stages=tiles.stages, emulated=emulated, steps=steps)

        acc = zeros(tile_m, tile_n)
        acc = add("int8", large.at[tile], large_weight.at[tile].at[columns], acc, steps[tile])
        acc = add("int4", small.at[rows], weight.at[columns], acc)
        tokens = pl.ds(lax.rem(first, period), tile_m)
        scale = plgpu.load(row_scale.at[tokens], layout=ACCUMULATOR.reduce(1), optimized=False)
        w, *offset = (plgpu.load(ref.at[columns], layout=ACCUMULATOR.reduce(0), optimized=False) for ref in per_column)
        store(out.at[rows, columns], epilogue(acc, scale, w, *offset))

    biases = [] if bias is None else [bias]
    return plgpu.kernel(
        int4_matmul,
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        grid=(pl.cdiv(M, tile_m), N // tile_n),
        grid_names=("row_tile", "column_tile"),
        **({"interpret": interpret} if emulated else {}),
    )(small, large, steps, row_scale, weight, large_weight, column_scale, *biases)
