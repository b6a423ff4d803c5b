"""Hopper kernel of the outlier matmul: TMA, int8 wgmma, one int32 accumulator for outliers and inliers.

A program walks tiles of the output. One warpgroup copies K-steps into shared memory, two multiply, 64 rows each. A
tile's outlier steps come first (`far`, only the K-steps that hold an outlier of the tile), then every row of the
accumulator is shifted left by its own power, then the dense steps follow (`near`). The integers are exact.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int8, Int32

from ouromamba_jax.pallas.tiles import TILE_K, MatmulTiles

COMPUTE_WARPGROUPS = 2
EPILOGUE_COLUMNS = 64
EPILOGUE_SLOTS = 2


def _shared(shape: tuple[int, ...], dtype) -> plgpu.SMEM:
    """Shared memory in the 128-byte swizzle of TMA and wgmma."""
    itemsize = jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((8, 128 // itemsize))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(128)  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def matmul(
    near: Int8[Array, "M K"],
    far: Int8[Array, "M K"],
    far_count: Int32[Array, " tiles"],
    far_blocks: Int32[Array, " tiles*blocks"],
    shift: Int32[Array, " M"],
    row_scale: Float32[Array, " M"],
    weight: Int8[Array, "N K"],
    column_scale: Float32[Array, " N"],
    *,
    tiles: MatmulTiles,
    programs: int,
    interpret=None,
) -> Float32[Array, "M N"]:
    """((far @ W^T) * 2^shift + near @ W^T) * row_scale * column_scale, for M >= tile_m, K % 128 = 0 = N % tile_n.

    Args:
      far_count: for each tile of rows, how many K-blocks of `far` are not zero.
      far_blocks: their indices, K // 128 places per tile.
      programs: how many run, one per multiprocessor.
      interpret: `plgpu.InterpretGPUParams` to run on CPU.
    """
    (M, K), N = near.shape, weight.shape[0]
    tile_m, tile_n, stages = tiles.tile_m, tiles.tile_n, tiles.stages
    rows = tile_m // COMPUTE_WARPGROUPS
    n_tiles, k_tiles = N // tile_n, K // TILE_K
    tile_count = pl.cdiv(M, tile_m) * n_tiles
    emulated = interpret is not None

    def body(near, far, far_count, far_blocks, shift, row_scale, weight, column_scale, out, a, b, c, full, empty):
        warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")

        def corner(tile):
            """The last tile of a ragged M starts early: rows shared with its neighbour are written twice, alike."""
            return jnp.minimum((tile // n_tiles) * tile_m, M - tile_m), lax.rem(tile, n_tiles) * tile_n

        def each_tile(body):
            mine = pl.cdiv(tile_count - program, programs)
            return lax.fori_loop(0, mine, lambda i, step: body(program + i * programs, step), jnp.int32(0))

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def _copy():
            plgpu.set_max_registers(40, action="decrease")

            def fetch(plane, m, n, block, step):
                slot = lax.rem(step, stages)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                k = pl.ds(block * TILE_K, TILE_K)
                plgpu.copy_gmem_to_smem(plane.at[pl.ds(m, tile_m), k], a.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(weight.at[pl.ds(n, tile_n), k], b.at[slot], full.at[slot])
                return step + 1

            def tile(index, step):
                (m, n), row = corner(index), index // n_tiles

                def fetch_far(i, step):
                    return fetch(far, m, n, far_blocks[row * k_tiles + i], step)

                step = lax.fori_loop(0, far_count[row], fetch_far, step)
                return lax.fori_loop(0, k_tiles, lambda i, step: fetch(near, m, n, i, step), step)

            def drain(step, _):
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

            steps = each_tile(tile)
            lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")

            def products(acc, first, count):
                def step(step, _):
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, a.at[slot, pl.ds(warpgroup * rows, rows)], b.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[slot])

                lax.fori_loop(first, first + count, step, None)
                return acc[...]

            def tile(index, step):
                m, n = corner(index)
                m, count = m + warpgroup * rows, far_count[index // n_tiles]
                per_row = plgpu.Layout.WGMMA.reduce(1)
                power = plgpu.load(shift.at[pl.ds(m, rows)], layout=per_row, optimized=False)
                power = lax.broadcast_in_dim(power, (rows, tile_n), [0])
                accumulator = plgpu.ACC((rows, tile_n), jnp.int32)

                def accumulate(acc):
                    acc[...] = lax.shift_left(products(acc, step, count), power)
                    return products(acc, step + count, k_tiles)

                if emulated:  # the interpreter cannot store to an accumulator: two of them, added
                    outliers = pl.run_scoped(lambda acc: products(acc, step, count), accumulator)
                    inliers = pl.run_scoped(lambda acc: products(acc, step + count, k_tiles), accumulator)
                    acc = lax.shift_left(outliers, power) + inliers
                else:
                    acc = pl.run_scoped(accumulate, accumulator)
                scale = plgpu.load(row_scale.at[pl.ds(m, rows)], layout=per_row, optimized=False)
                for i in range(tile_n // EPILOGUE_COLUMNS):
                    store(acc, scale, m, n, i)
                return step + count + k_tiles

            def store(acc, scale, m, n, i):
                shape = (rows, EPILOGUE_COLUMNS)
                y = acc[:, i * EPILOGUE_COLUMNS : (i + 1) * EPILOGUE_COLUMNS].astype(jnp.float32)
                columns = pl.ds(n + i * EPILOGUE_COLUMNS, EPILOGUE_COLUMNS)
                per_column = plgpu.Layout.WGMMA.reduce(0)
                w = plgpu.load(column_scale.at[columns], layout=per_column, optimized=False)
                y = y * lax.broadcast_in_dim(scale, shape, [0]) * lax.broadcast_in_dim(w, shape, [1])
                staged = c.at[warpgroup, i % EPILOGUE_SLOTS]
                plgpu.wait_smem_to_gmem(EPILOGUE_SLOTS - 1, wait_read_only=True)
                staged[...] = y
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(m, rows), columns])

            each_tile(tile)
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((M, N), jnp.float32),
        grid=(programs,),
        grid_names=("program",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            _shared((stages, tile_m, TILE_K), jnp.int8),
            _shared((stages, tile_n, TILE_K), jnp.int8),
            _shared((COMPUTE_WARPGROUPS, EPILOGUE_SLOTS, rows, EPILOGUE_COLUMNS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        ],
        **({"interpret": interpret} if emulated else {}),
    )(near, far, far_count, far_blocks, shift, row_scale, weight, column_scale)
