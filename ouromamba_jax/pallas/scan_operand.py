"""What the selective scan's kernels read of u and delta."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8


class Operand(NamedTuple):
    """Floats, or levels low + 256 * high in units of their token's step.

    Attributes:
      low: (B, L, E), floats or low bytes.
      high: (B, L, E), or None where levels fit one byte.
      scale: (segments, L), the step of every token; samples are segments in turn. None for floats.
    """

    low: Float[Array, "B L E"] | Int8[Array, "B L E"]
    high: Int8[Array, "B L E"] | None = None
    scale: Float32[Array, "segments L"] | None = None

    def merge(self) -> Float[Array, "B L E"]:
        """In floats."""
        if self.scale is None:
            return self.low
        levels = self.low.astype(jnp.float32)
        if self.high is not None:
            levels = levels + 256.0 * self.high.astype(jnp.float32)
        segments = self.scale.shape[0]
        by_segment = levels.reshape(-1, segments, *levels.shape[1:]) * self.scale[None, :, :, None]
        return by_segment.reshape(levels.shape)


Operands = tuple[Operand, ...]
"""One for all channels, or one for each group."""


def merged(operands: Operands) -> Float[Array, "B L D"]:
    """All groups side by side, in floats."""
    first, *others = operands
    return jnp.concatenate([x.merge() for x in operands], axis=2) if others else first.merge()
