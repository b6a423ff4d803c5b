"""Hopper kernel of the outlier matmul: TMA, int8 wgmma, one int32 accumulator for both bytes of the levels.

A program walks tiles of the output. One warpgroup copies K-steps into shared memory, two multiply, 64 rows each. A
second plane's steps come first; then the accumulator is shifted left by 8.

4-bit weights may travel packed. wgmma wants int8 in shared memory, so the copying warpgroup also unpacks each step,
one behind its copies: a byte's high nibble is 16 times its level already, the low one is after a shift.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8

from ouromamba_jax.pallas.accumulators import epilogue
from ouromamba_jax.pallas.nibbles import sixteenfold
from ouromamba_jax.pallas.tiles import TILE_K, MatmulTiles

COMPUTE_WARPGROUPS = 2
EPILOGUE_COLUMNS = 64
HALF = TILE_K // 2
UNPACKED_ROWS = 64
"""At a time: as many as the unpacking warpgroup has registers for."""
PAIRS = 2
"""Unpacked K-steps of a packed weight: one is multiplied while the next is unpacked."""


def _shared(shape: tuple[int, ...], dtype, swizzle_bytes: int = 128) -> plgpu.SMEM:
    """Shared memory in the swizzle of TMA and wgmma."""
    tiling = plgpu.TilingTransform((8, swizzle_bytes // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(swizzle_bytes)  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def matmul(
    planes: Sequence[Int8[Array, "M K"]],
    row_scale: Float32[Array, " more"],
    weight: Int8[Array, "N columns"],
    columns: Sequence[Float[Array, " N"]],
    added: Sequence[Float32[Array, "M N"]] = (),
    *,
    tiles: MatmulTiles,
    outputs: int,
    programs: int,
    dtype: Any = jnp.float32,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """planes @ W^T * column_scale * row_scale + bias, in one int32 accumulator; then perhaps a sum in float32.

    For M >= tile_m; 8, 32 and 16 divide M, K and N, or 16 a K below 128, or 64 K where weights are packed.

    Args:
      planes: of levels: low bytes alone, or high ones before them.
      row_scale: `periodic(scale, tile_m)`.
      weight: whole tiles of outputs, K levels of each with zeros up to whole steps, or half as many bytes of
        `pack_halves` if tiles.packed; unpacked they count sixteenfold.
      columns: column_scale, and a bias of any float type if there is one; at least tile_n of either.
      added: what the result is added to, if anything.
      dtype: to which the result is rounded; a sum is float32.
      outputs: N; copies write nothing beyond it.
      programs: how many run, one per multiprocessor.
      interpret: `plgpu.InterpretGPUParams` to run on CPU.
    """
    (M, K), N = planes[0].shape, outputs
    tile_m, tile_n, stages = tiles.tile_m, tiles.tile_n, tiles.stages
    rows = tile_m // COMPUTE_WARPGROUPS
    n_tiles, k_tiles = pl.cdiv(N, tile_n), pl.cdiv(K, TILE_K)
    tile_count = pl.cdiv(M, tile_m) * n_tiles
    emulated = interpret is not None
    width = HALF if tiles.packed else TILE_K  # bytes of a weight row per step
    # Whole rows of the swizzle make up K, or one is wider; what is copied beyond K is zero.
    swizzle = next(size for size in (128, 64, 32) if size <= width and (K % size == 0 or size > K))
    parts = tile_n // EPILOGUE_COLUMNS  # of an output tile, 1 or even; they take turns at the slots that they leave by
    slots = min(2, parts)
    period = row_scale.shape[0] - tile_m
    written = jnp.float32 if added else dtype
    # Copies to `out` begin at whole rows of the swizzle.
    leaving = next(size for size in (128, 64, 32) if N * jnp.dtype(written).itemsize % size == 0)

    def outlier_matmul(*refs):
        planes, row_scale, weight, columns, added, out, scratch = jax.tree.unflatten(structure, refs)
        a, b, c, full, empty, *unpacking = scratch
        warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")

        def corner(tile):
            """The last tile of a ragged M or N starts early: what two tiles share is written twice, alike."""
            m, n = tile // n_tiles * tile_m, lax.rem(tile, n_tiles) * tile_n
            return jnp.minimum(m, M - tile_m), jnp.minimum(n, max(N - tile_n, 0))

        def each_tile(body):
            mine = pl.cdiv(tile_count - program, programs)
            return lax.fori_loop(0, mine, lambda i, step: body(program + i * programs, step), jnp.int32(0))

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def _copy():
            plgpu.set_max_registers(64 if tiles.packed else 40, action="decrease")

            def unpack(step):
                packed, ready, used = unpacking
                slot, pair = lax.rem(step, stages), lax.rem(step, PAIRS)
                layout = plgpu.Layout.SMEM_GMEM_COPY((UNPACKED_ROWS, HALF), jnp.int8, HALF)
                plgpu.barrier_wait(full.at[slot])

                @pl.when(step >= PAIRS)
                def _():
                    plgpu.barrier_wait(used.at[pair])

                for i in range(tile_n // UNPACKED_ROWS):
                    part = pl.ds(i * UNPACKED_ROWS, UNPACKED_ROWS)
                    both = plgpu.load(packed.at[slot, part], layout=layout)
                    for half in range(2):
                        levels = sixteenfold(both, high=half == 1, layout=None if emulated else layout)
                        b[pair, half, part] = levels
                plgpu.commit_smem()
                plgpu.barrier_arrive(empty.at[slot])
                plgpu.barrier_arrive(ready.at[pair])

            def fetch(plane, m, n, block, step):
                slot = lax.rem(step, stages)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                k, k_weight = pl.ds(block * TILE_K, TILE_K), pl.ds(block * width, width)
                target = unpacking[0] if tiles.packed else b
                plgpu.copy_gmem_to_smem(plane.at[pl.ds(m, tile_m), k], a.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(weight.at[pl.ds(n, tile_n), k_weight], target.at[slot], full.at[slot])
                if tiles.packed:  # the step before this one, whose copy is under way
                    pl.when(step >= 1)(lambda: unpack(step - 1))
                return step + 1

            def tile(index, step):
                m, n = corner(index)
                for plane in planes:
                    step = lax.fori_loop(0, k_tiles, lambda i, step, plane=plane: fetch(plane, m, n, i, step), step)
                return step

            def drain(step, _):
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

            def drain_pairs(step, _):
                plgpu.barrier_wait(unpacking[2].at[lax.rem(step, PAIRS)])

            steps = each_tile(tile)
            if tiles.packed:
                pl.when(steps >= 1)(lambda: unpack(steps - 1))
                lax.fori_loop(jnp.maximum(steps - PAIRS, 0), steps, drain_pairs, None)
            lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(224 if tiles.packed else 232, action="increase")

            def products(acc, first):
                def step(step, _):
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(full.at[slot])
                    a_rows = a.at[slot, pl.ds(warpgroup * rows, rows)]
                    if tiles.packed:
                        _, ready, used = unpacking
                        pair = lax.rem(step, PAIRS)
                        plgpu.barrier_wait(ready.at[pair])
                        for half in range(2):
                            columns = pl.ds(half * HALF, HALF)
                            plgpu.wgmma(acc, a_rows.at[:, columns], b.at[pair, half].transpose((1, 0)))
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(used.at[pair])
                    else:
                        plgpu.wgmma(acc, a_rows, b.at[slot].transpose((1, 0)))
                        plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[slot])

                lax.fori_loop(first, first + k_tiles, step, None)
                return acc[...]

            def tile(index, step):
                m, n = corner(index)
                m = m + warpgroup * rows
                first_token = lax.rem(m, period)
                scale = plgpu.load(
                    row_scale.at[pl.ds(first_token, rows)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
                )
                scale = scale * 0.0625 if tiles.packed else scale
                accumulator = plgpu.ACC((rows, tile_n), jnp.int32)
                steps = [step + i * k_tiles for i in range(len(planes))]
                if emulated:  # the interpreter cannot store to an accumulator: one for each plane, added
                    acc = jnp.zeros((rows, tile_n), jnp.int32)
                    for first in steps:
                        more = pl.run_scoped(lambda acc, first=first: products(acc, first), accumulator)
                        acc = lax.shift_left(acc, 8) + more
                else:
                    acc = pl.run_scoped(partial(accumulate, steps), accumulator)
                for i in range(parts):
                    part = acc[:, i * EPILOGUE_COLUMNS : (i + 1) * EPILOGUE_COLUMNS].astype(jnp.float32)
                    store(part, scale, m, n, i)
                return steps[-1] + k_tiles

            def accumulate(steps, acc):
                for first in steps[:-1]:
                    acc[...] = lax.shift_left(products(acc, first), 8)
                return products(acc, steps[-1])

            def store(part, scale, m, n, i):
                here = pl.ds(n + i * EPILOGUE_COLUMNS, EPILOGUE_COLUMNS)
                per_column = plgpu.Layout.WGMMA.reduce(0)
                w, *offset = (plgpu.load(ref.at[here], layout=per_column, optimized=False) for ref in columns)
                staged = c.at[warpgroup, i % slots]
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                y = epilogue(part, scale, w, *offset).astype(dtype)
                for ref in added:
                    x = plgpu.load(ref.at[pl.ds(m, rows), here], layout=plgpu.Layout.WGMMA, optimized=False)
                    y = x + y.astype(jnp.float32)
                staged[...] = y
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(m, rows), here])

            each_tile(tile)
            plgpu.wait_smem_to_gmem(0)

    operands = list(planes), row_scale, weight, list(columns), list(added)
    unpacking_scratch = [
        _shared((stages, tile_n, HALF), jnp.int8, HALF),
        plgpu.Barrier(num_arrivals=1, num_barriers=PAIRS),
        plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=PAIRS),
    ]
    scratch_types = [
        _shared((stages, tile_m, TILE_K), jnp.int8, swizzle),
        _shared((PAIRS, 2, tile_n, HALF) if tiles.packed else (stages, tile_n, TILE_K), jnp.int8, swizzle),
        _shared((COMPUTE_WARPGROUPS, slots, rows, EPILOGUE_COLUMNS), written, leaving),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS + tiles.packed, num_barriers=stages),
        *(unpacking_scratch if tiles.packed else []),
    ]
    structure = jax.tree.structure((*operands, 0, scratch_types))
    return plgpu.kernel(
        outlier_matmul,
        out_type=jax.ShapeDtypeStruct((M, N), written),
        grid=(programs,),
        grid_names=("program",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch_types,
        # No warpgroup reads what it has written, and commits and waits have barriers of their own.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **({"interpret": interpret} if emulated else {}),
    )(*jax.tree.leaves(operands))
