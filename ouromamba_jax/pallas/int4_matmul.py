"""The outlier matmul on 4-bit tensor cores (A100, L40S): when it applies, and its operands.

The published split: 4-bit inliers, and of each tile of rows the channels that a window in it lists, in 8 bits. Where a
tile lists more than there is room for, or a shift is too large for the accumulator, the dense kernel runs: results
depend on neither.

Models take it within `bench.preferring("mosaic_gpu_int4")`, not by themselves. 4-bit products save a quarter of the
dense kernel's time at best (`scripts/outlier_columns.py`), and the weights of every tile's list must be gathered first:
59 MB at the largest layer of Vim-B (50 tiles of 3072 x 384), written and read again, where a dense product moves 46
(`scripts/bench_kernels.py --dry-run`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int16

from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.pallas import outlier_matmul as dense
from ouromamba_jax.pallas.device import device_target, int4_reason
from ouromamba_jax.pallas.kernel_weight import KernelWeight, pack_halves
from ouromamba_jax.pallas.outlier_matmul import first_rows, pad_to
from ouromamba_jax.pallas.packed_split import BLOCK, PackedSplit, levels_at
from ouromamba_jax.pallas.tiles import TILE_K, MatmulTiles, Target, matmul_tiles


def supports(split: Any, weight: QTensor | KernelWeight, bias: Any, dtype: Any) -> str | None:
    """Why this call cannot run here, from shapes, dtypes and the device; None if it can."""
    if not isinstance(split, PackedSplit):
        return "it takes what split_for_product(..., packed=True) returns"
    if 0 in split.shape:
        return dense.NOTHING
    return unsuitable(weight, dtype) or int4_reason()


def unsuitable(weight: QTensor | KernelWeight, dtype: Any) -> str | None:
    """Why the kernel cannot multiply this weight or write this type, whatever the device; None if it can."""
    if weight.bits > 4:
        return f"its weights must fit 4 bits, not {weight.bits}"
    return dense.unsuitable(weight, dtype)


def capacity_of(channels: int) -> int:
    """Room for half the channels in whole K-steps: of more, the dense product takes less time anyway."""
    return -(-channels // (2 * TILE_K)) * TILE_K


def run(
    split: PackedSplit,
    weight: QTensor | KernelWeight,
    bias: Float[Array, " O"] | None = None,
    dtype: Any = jnp.float32,
    *,
    capacity: int | None = None,
    target: Target | None = None,
    tiles: MatmulTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "B L O"]:
    """row_scale * s_w * (2^shift * outliers @ W + inliers @ W) + bias, exact integers in int32.

    Args:
      dtype: of the result, float32 or bfloat16.
      capacity: listed channels of a tile that there is room for, whole K-steps; None takes `capacity_of`.
      target, tiles, interpret: as of the dense `run`.
    """
    # Imported here: Mosaic takes a while, and most processes never run a kernel.
    from ouromamba_jax.pallas import int4_matmul_sm80

    (B, L, K), O = split.shape, weight.shape[1]
    target = target or device_target()
    tiles = tiles or matmul_tiles(target, O, 8)
    capacity = capacity or capacity_of(K)
    height = (tiles.tile_m if tiles.tile_m > B * L else 8,)
    inliers, outliers = (pad_to(x.reshape(B * L, -1), (*height, 1)) for x in (split.inliers, split.outliers))
    counts, shift, row_scale = (pad_to(x.reshape(B * L), height) for x in (split.counts, split.shift, split.row_scale))
    columns = [pad_to(x, (tiles.tile_n,)) for x in (weight.scale[0], bias) if x is not None]
    values = pad_to(weight.values.T, (tiles.tile_n, BLOCK))
    tile_rows = first_rows(len(inliers), tiles.tile_m)[:, None] + np.arange(tiles.tile_m)
    places, window = places_in_tiles(split, tile_rows)
    listed = jnp.any(places > 0, axis=1)
    count = jnp.sum(listed, axis=1)

    def compact():
        channels = jax.vmap(partial(jnp.nonzero, size=capacity, fill_value=listed.shape[1]))(listed)[0]
        # Beyond a list's end places are 0, so outliers too, and weights whatever they may be.
        of_listed = jax.vmap(partial(jnp.take, axis=1, mode="fill", fill_value=0))(places, channels)
        of_rows = jax.vmap(partial(jnp.take, axis=0))(of_listed, window)
        blocks = levels_at(of_rows, outliers[tile_rows], counts[tile_rows])
        block_weights = jax.vmap(partial(jnp.take, values, axis=1, mode="clip"))(channels)
        weights = pack_halves(values, values.shape[1]), block_weights
        launch = partial(int4_matmul_sm80.matmul, tiles=tiles, dtype=dtype, interpret=interpret)
        y = launch(inliers, blocks, -(-count // TILE_K), shift, row_scale, *weights, *columns)
        return y[: B * L, :O].reshape(B, L, O)

    def full():
        return dense.run(split.planes(), weight, bias, dtype=dtype, target=target, interpret=interpret)

    fits = jnp.all(count <= capacity) & jnp.all(split.shift <= dense.largest_shift(K, weight.bits))
    return lax.cond(fits, compact, full)


def places_in_tiles(
    split: PackedSplit, tile_rows: np.ndarray
) -> tuple[Int16[Array, "tiles windows width"], np.ndarray]:
    """Of each tile the places of all windows of which it holds a row, and of each of its rows the window among these.

    Args:
      tile_rows: (tiles, tile_m) rows of the batch's tokens; those beyond the last one count as the last one.
    """
    B, L, _ = split.shape
    windows = split.places.shape[1]
    row = np.minimum(tile_rows, B * L - 1)
    window = row // L * windows + row % L // split.window
    first, last = window[:, :1], window[:, -1:]
    members = np.minimum(first + np.arange(np.max(last - first) + 1), last)
    return split.places.reshape(B * windows, -1)[members], window - first
