"""The outlier matmul on 4-bit tensor cores (A100, L40S): when it applies, and its operands.

The published split: entries that fit 4 bits, and of each tile of rows the channels that hold larger ones, in 8 bits.
Where a tile has more such channels than there is room for, the dense kernel runs: results do not depend on which.

Models take it within `bench.preferring("mosaic_gpu_int4")`, not by themselves: packing is a pass of XLA's over the
levels, and the weights of every tile's channels must be gathered first: 59 MB at the largest layer of Vim-B (50 tiles
of 3072 x 384), written and read again, where a dense product moves 46.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.pallas import outlier_matmul as dense
from ouromamba_jax.pallas.device import device_target, int4_reason
from ouromamba_jax.pallas.kernel_weight import KernelWeight, pack_halves
from ouromamba_jax.pallas.outlier_matmul import first_rows, pad_to, periodic
from ouromamba_jax.pallas.tiles import TILE_K, MatmulTiles, Target, matmul_tiles

if TYPE_CHECKING:
    from ouromamba_jax.ops.split import Split

BLOCK = 2 * TILE_K
"""Channels are padded to so many: whole K-steps of bytes of two channels each."""


def supports(split: "Split", weight: QTensor | KernelWeight, bias: Any, dtype: Any) -> str | None:
    """Why this call cannot run here, from shapes, dtypes and the device; None if it can."""
    return unsuitable(split, weight, dtype) or int4_reason()


def unsuitable(split: "Split", weight: QTensor | KernelWeight, dtype: Any) -> str | None:
    """Why the kernel cannot take these, whatever the device; None if it can."""
    if 0 in split.shape:
        return dense.NOTHING
    if split.high is not None:
        return "levels of two bytes have no 4-bit part"
    if weight.bits > 4:
        return f"its weights must fit 4 bits, not {weight.bits}"
    return dense.unsuitable(weight, dtype)


def capacity_of(channels: int) -> int:
    """Room for half the channels in whole K-steps: of more, the dense product takes less time anyway."""
    return -(-channels // (2 * TILE_K)) * TILE_K


def run(
    split: "Split",
    weight: QTensor | KernelWeight,
    bias: Float[Array, " O"] | None = None,
    dtype: Any = jnp.float32,
    *,
    capacity: int | None = None,
    target: Target | None = None,
    tiles: MatmulTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "B L O"]:
    """S * s_w * (large @ W + small @ W) + bias, exact integers in int32; large and small entries make up the levels.

    Args:
      dtype: of the result, float32 or bfloat16.
      capacity: channels with large entries that a tile has room for, whole K-steps; None takes `capacity_of`.
      target, tiles, interpret: as of the dense `launch`.
    """
    # Imported here: Mosaic takes a while, and most processes never run a kernel.
    from ouromamba_jax.pallas import int4_matmul_sm80

    (B, L, K), O = split.shape, weight.shape[1]
    target = target or device_target()
    tiles = tiles or matmul_tiles(target, O, 8)
    capacity = capacity or capacity_of(K)
    levels = pad_to(split.low.reshape(B * L, K), (tiles.tile_m if tiles.tile_m > B * L else 8, BLOCK))
    tile_rows = first_rows(len(levels), tiles.tile_m)[:, None] + np.arange(tiles.tile_m)
    small = jnp.where(jnp.abs(levels) <= 7, levels, 0)
    large = (levels - small)[tile_rows]
    found = jnp.any(large != 0, axis=1)
    count = jnp.sum(found, axis=1)

    def compact():
        channels = jax.vmap(partial(jnp.nonzero, size=capacity, fill_value=found.shape[1]))(found)[0]
        # Beyond a list's end entries are 0, and weights whatever they may be.
        blocks = jax.vmap(partial(jnp.take, axis=1, mode="fill", fill_value=0))(large, channels)
        values = pad_to(weight.values.T, (tiles.tile_n, BLOCK))
        block_weights = jax.vmap(partial(jnp.take, values, axis=1, mode="clip"))(channels)
        y = int4_matmul_sm80.matmul(
            pack_halves(small, small.shape[1]),
            blocks,
            -(-count // TILE_K),
            periodic(split.scale, tiles.tile_m),
            pack_halves(values, values.shape[1]),
            block_weights,
            *(pad_to(x, (tiles.tile_n,)) for x in (weight.scale[0], bias) if x is not None),
            tiles=tiles,
            dtype=dtype,
            interpret=interpret,
        )
        return y[: B * L, :O].reshape(B, L, O)

    def full():
        return dense.launch(split, weight, bias, dtype, target=target, interpret=interpret)

    return lax.cond(jnp.all(count <= capacity), compact, full)
