"""A quantised weight as the GPU kernels of the outlier matmul read it."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8

from ouromamba_jax.ops.qtensor import QTensor, max_level
from ouromamba_jax.pallas.tiles import TILE_K, MatmulTiles

INT32_MAX = 2**31 - 1
_LARGEST_LEVEL = 127 * 256 + 127  # of two bytes


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "scale"], meta_fields=["bits", "inputs", "wide"])
@dataclass(frozen=True)
class KernelWeight:
    """A `QTensor` without groups, laid out for a kernel. It can stand for that QTensor anywhere.

    Attributes:
      rows: int8 (N, bytes), one row of inputs per output, with zeros up to whole tiles of outputs and whole K-steps: a
        byte for each level, or for two 4-bit ones as `pack_halves` puts them.
      scale: float32 (1, O).
      bits: of a level.
      inputs: K.
      wide: whether int32 holds every product with levels of two bytes: every column's sum of |W| * 32639.
    """

    rows: Int8[Array, "N bytes"]
    scale: Float32[Array, "1 O"]
    bits: int
    inputs: int
    wide: bool = False
    group = None

    @property
    def shape(self) -> tuple[int, int]:
        """(K, O)."""
        return self.inputs, self.scale.shape[1]

    @property
    def packed(self) -> bool:
        return self.rows.shape[1] < self.inputs + -self.inputs % TILE_K

    @property
    def values(self) -> Int8[Array, "K O"]:
        """The levels as a QTensor holds them."""
        K, O = self.shape
        return (unpack_halves(self.rows) if self.packed else self.rows)[:O, :K].T


def arrange(weight: QTensor | KernelWeight, tiles: MatmulTiles) -> KernelWeight:
    """`weight` for kernels of these tiles; as it is, if it was made for such."""
    if isinstance(weight, KernelWeight) and weight.packed == tiles.packed and weight.rows.shape[0] % tiles.tile_n == 0:
        return weight
    K, O = weight.shape
    rows = jnp.pad(weight.values.T, [(0, -O % tiles.tile_n), (0, -K % TILE_K)])
    return KernelWeight(pack_halves(rows) if tiles.packed else rows, weight.scale, weight.bits, K, is_wide(weight))


def is_wide(weight: QTensor | KernelWeight) -> bool:
    """`KernelWeight.wide`: known of one, else by the largest levels that there could be."""
    known = isinstance(weight, KernelWeight) and weight.wide
    return known or weight.shape[0] * max_level(weight.bits) * _LARGEST_LEVEL <= INT32_MAX


def measured(weight: KernelWeight) -> KernelWeight:
    """`weight` with `wide` by its levels, which are read: not inside `jax.jit`."""
    largest = int(jnp.max(jnp.sum(jnp.abs(weight.values.astype(jnp.int32)), axis=0)))
    return replace(weight, wide=largest * _LARGEST_LEVEL <= INT32_MAX)


def pack_halves(rows: Int8[Array, "N K"], block: int = TILE_K) -> Int8[Array, "N half"]:
    """4-bit levels two to a byte: the first half of every `block` inputs in low nibbles, the others in high ones."""
    N, K = rows.shape
    low, high = jnp.moveaxis(rows.reshape(N, K // block, 2, block // 2), 2, 0)
    return ((low & jnp.int8(15)) | (high << jnp.int8(4))).reshape(N, K // 2)


def unpack_halves(packed: Int8[Array, "N half"], block: int = TILE_K) -> Int8[Array, "N K"]:
    """Inverse of `pack_halves`."""
    N, half = packed.shape
    blocks = packed.reshape(N, -1, 1, block // 2)
    levels = jnp.concatenate([blocks << jnp.int8(4), blocks], axis=2) >> jnp.int8(4)
    return levels.reshape(N, 2 * half)
