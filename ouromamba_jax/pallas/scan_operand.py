"""What the selective scan's kernels read of u and delta."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8

from ouromamba_jax.pallas.outlier_split import Rule


class Route(NamedTuple):
    """Where the tokens of a scan lie in a map of height x width: row by row or column by column, perhaps backwards."""

    height: int
    width: int
    transpose: bool
    reverse: bool

    def place(self, t: Any) -> Any:
        """Of token t of the scan."""
        t = self.height * self.width - 1 - t if self.reverse else t
        return lax.rem(t, self.height) * self.width + lax.div(t, self.height) if self.transpose else t


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["low", "high", "scale", "numbers"],
    meta_fields=["rule", "route", "segments"],
)
@dataclass(frozen=True)
class Operand:
    """Floats; or levels low + 256 * high in units of their token's step; or floats that become such in the scan.

    Attributes:
      low: (B, L, E), floats or low bytes.
      high: (B, L, E), or None where levels fit one byte.
      scale: (segments, L), the step of every token; samples are segments in turn. None for floats.
      numbers: `rule.numbers` where the scan itself splits floats.
      rule: how it does that, with tokens in scan order and in one segment; None otherwise.
      route: of floats, where the scan finds its tokens, if not in their order; `low` is then not cut in segments.
      segments: into which samples are cut.
    """

    low: Float[Array, "B L E"] | Int8[Array, "B L E"]
    high: Int8[Array, "B L E"] | None = None
    scale: Float32[Array, "segments L"] | None = None
    numbers: tuple[Array, ...] = ()
    rule: Rule | None = None
    route: Route | None = None
    segments: int = 1

    def merge(self) -> Float[Array, "B L E"]:
        """In floats."""
        if self.rule is not None:
            return _split(self.low, self.rule, self.numbers)
        if self.route is not None:
            tokens = self.low[:, self.route.place(jnp.arange(self.low.shape[1]))]
            return tokens.reshape(-1, self.low.shape[1] // self.segments, self.low.shape[2])
        if self.scale is None:
            return self.low
        levels = self.low.astype(jnp.float32)
        if self.high is not None:
            levels = levels + 256.0 * self.high.astype(jnp.float32)
        segments = self.scale.shape[0]
        by_segment = levels.reshape(-1, segments, *levels.shape[1:]) * self.scale[None, :, :, None]
        return by_segment.reshape(levels.shape)


def _split(x: Float[Array, "B L E"], rule: Rule, numbers: tuple[Array, ...]) -> Float32[Array, "B L E"]:
    """What the scan makes of floats that it splits: all windows side by side, token by token."""
    batch, length, channels = x.shape
    more = -length % rule.window
    windows = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, more), (0, 0))).reshape(batch, -1, rule.window, channels)
    numbers = tuple(jnp.pad(n, (0, more), constant_values=1).reshape(1, -1, rule.window, 1) for n in numbers)
    first = jnp.full((batch, windows.shape[1], channels), rule.window, jnp.int32)
    values = []
    for i in range(rule.window):
        here = tuple(n[:, :, i] for n in numbers)
        level, first = rule.level(windows[:, :, i], i, first, here)
        values.append(level * here[0])
    return jnp.stack(values, axis=2).reshape(batch, -1, channels)[:, :length]


Operands = tuple[Operand, ...]
"""One for all channels, or one for each group."""


def merged(operands: Operands) -> Float[Array, "B L D"]:
    """All groups side by side, in floats."""
    first, *others = operands
    return jnp.concatenate([x.merge() for x in operands], axis=2) if others else first.merge()
