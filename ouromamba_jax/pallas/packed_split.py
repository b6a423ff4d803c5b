"""A split for GPUs that multiply 4-bit integers: inliers two to a byte, outliers with lists of their channels.

What the paper's kernels multiply: INT4 inliers, and of each tile of rows the listed channels in INT8. `Planes` put both
on one matrix of bytes instead.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8, Int32

from ouromamba_jax.outlier_types import OutlierConfig, Planes
from ouromamba_jax.pallas.kernel_weight import unpack_halves

BLOCK = 256
"""Channels are padded to so many: whole 128 threads and K-steps of bytes of two channels each."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inliers", "outliers", "lists", "shift", "row_scale"],
    meta_fields=["channels", "window"],
)
@dataclass(frozen=True)
class PackedSplit:
    """Rows row_scale * (2^shift * outliers + inliers); whatever follows the C channels is zero.

    Attributes:
      inliers: int8 (B, L, width / 2), levels of 4 bits, zero at outliers: byte c holds channel c in its low nibble and
        channel width / 2 + c in its high one.
      outliers: int8 (B, L, width), levels on the step row_scale * 2^shift, zero at inliers.
      lists: int8 (B, windows, width), not 0 for channels that are outliers in any token of the window.
      shift: int32 (B, L), j of a pow2 scale, at most 126.
      row_scale: float32 (B, L), NaN for a token that holds a NaN or an infinity.
      channels: C.
      window: tokens per window.
    """

    inliers: Int8[Array, "B L half"]
    outliers: Int8[Array, "B L width"]
    lists: Int8[Array, "B windows width"]
    shift: Int32[Array, "B L"]
    row_scale: Float32[Array, "B L"]
    channels: int
    window: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, L, C)."""
        B, L, _ = self.outliers.shape
        return B, L, self.channels

    def planes(self) -> Planes:
        """The same levels as dense products take them."""
        B, L, width = self.outliers.shape
        inliers = unpack_halves(self.inliers.reshape(B * L, -1), width).reshape(B, L, width)
        near = inliers + jnp.where(self.shift[:, :, None] > 0, 0, self.outliers)
        return Planes(near, self.outliers, self.shift, self.row_scale, self.channels)


def unsuitable(config: OutlierConfig) -> str | None:
    """Why no activation of this config can be packed; None if it can."""
    if config.act_bits > 4:
        return f"inliers of {config.act_bits} bits do not fit 4"
    if not config.pow2:
        return 'one accumulator takes outlier_scale="pow2" and outliers of at most 8 bits'
    return None
