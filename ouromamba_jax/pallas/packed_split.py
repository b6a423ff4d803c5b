"""A split for GPUs that multiply 4-bit integers: inliers two to a byte, outliers compacted by the list of their window.

What the paper's kernels multiply. `Planes` put inliers and outliers on one matrix of bytes instead.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8, Int16, Int32

from ouromamba_jax.ops.split_types import OutlierConfig, Planes
from ouromamba_jax.pallas.kernel_weight import unpack_halves

BLOCK = 256
"""Channels are padded to so many: whole 128 threads and K-steps of bytes of two channels each."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inliers", "outliers", "places", "counts", "shift", "row_scale"],
    meta_fields=["channels", "window"],
)
@dataclass(frozen=True)
class PackedSplit:
    """Rows row_scale * (2^shift * outliers + inliers); of the width, what follows the C channels holds none.

    Attributes:
      inliers: int8 (B, L, width / 2), levels of 4 bits, zero at outliers: byte c holds channel c in its low nibble and
        channel width / 2 + c in its high one.
      outliers: int8 (B, L, width), levels on the step row_scale * 2^shift of the channels that the token's window has
        listed so far, in the order of `places`; beyond their count memory that nobody wrote.
      places: int16 (B, windows, width), where an outlier of each channel lies in these rows, from 1 on, in the order in
        which the window listed them; 0 if it never did.
      counts: int32 (B, L), how many channels were listed when the token passed.
      shift: int32 (B, L), j of a pow2 scale, at most 126.
      row_scale: float32 (B, L), NaN for a token that holds a NaN or an infinity.
      channels: C.
      window: tokens per window.
    """

    inliers: Int8[Array, "B L half"]
    outliers: Int8[Array, "B L width"]
    places: Int16[Array, "B windows width"]
    counts: Int32[Array, "B L"]
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
        places = jnp.repeat(self.places, self.window, axis=1)[:, :L]
        outliers = levels_at(places, self.outliers, self.counts)
        near = inliers + jnp.where(self.shift[:, :, None] > 0, 0, outliers)
        return Planes(near, outliers, self.shift, self.row_scale, self.channels)


def levels_at(
    places: Int16[Array, "*rows n"], outliers: Int8[Array, "*rows width"], counts: Int32[Array, "*rows"]
) -> Int8[Array, "*rows n"]:
    """Of rows of a `PackedSplit`: zero for channels that are not listed, or were not when the token passed."""
    places = places.astype(jnp.int32)
    found = jnp.take_along_axis(outliers, jnp.maximum(places - 1, 0), axis=-1)
    return jnp.where((places > 0) & (places <= counts[..., None]), found, 0)


def unsuitable(config: OutlierConfig) -> str | None:
    """Why no activation of this config can be packed; None if it can."""
    if config.act_bits > 4:
        return f"inliers of {config.act_bits} bits do not fit 4"
    if not config.pow2:
        return 'one accumulator takes outlier_scale="pow2" and outliers of at most 8 bits'
    return None
