"""What the selective scan's kernels read of u and delta."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Int32

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


@partial(jax.tree_util.register_dataclass, data_fields=["words", "column"], meta_fields=["dtype"])
@dataclass(frozen=True)
class Factor:
    """The weight of a product that the scan makes.

    Attributes:
      words: (words, E), four inputs' levels in each.
      column: (E,), their steps.
      dtype: to which the product is rounded.
    """

    words: Int32[Array, "words E"]
    column: Float32[Array, " E"]
    dtype: Any

    @classmethod
    def of(cls, levels: Int8[Array, "K E"], column: Float32[Array, " E"], dtype: Any) -> "Factor":
        return cls(pack_words(levels.T).T, column, dtype)


def pack_words(levels: Int8[Array, "... K"]) -> Int32[Array, "... words"]:
    """Four levels to a word, with zeros up to whole ones."""
    levels = jnp.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, -levels.shape[-1] % 4)])
    return lax.bitcast_convert_type(levels.reshape(*levels.shape[:-1], -1, 4), jnp.int32)


def unpack_words(words: Int32[Array, "... words"]) -> Int8[Array, "... K"]:
    """Inverse of `pack_words`."""
    return lax.bitcast_convert_type(words, jnp.int8).reshape(*words.shape[:-1], -1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["low", "high", "scale", "numbers", "factor"],
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
      factor: where these floats are a product: of levels, whose words `low` and `high` then hold.
      rule: how it splits, with tokens in scan order; None otherwise.
      route: of floats, where the scan finds its tokens, if not in their order.
      segments: into which samples are cut. With a rule or a route it is the scan that cuts them, and no array here is.
    """

    low: Float[Array, "B L E"] | Int8[Array, "B L E"] | Int32[Array, "B L words"]
    high: Int8[Array, "B L E"] | Int32[Array, "B L words"] | None = None
    scale: Float32[Array, "segments L"] | None = None
    numbers: tuple[Array, ...] = ()
    factor: Factor | None = None
    rule: Rule | None = None
    route: Route | None = None
    segments: int = 1

    def merge(self) -> Float[Array, "B L E"]:
        """In floats, cut in segments."""
        if self.rule is not None or self.route is not None:
            x = self.low if self.factor is None else self._product(self.factor)
            if self.route is not None:
                x = x[:, self.route.place(jnp.arange(x.shape[1]))]
            x = x if self.rule is None else _split(x, self.rule, self.numbers)
            return x.reshape(-1, x.shape[1] // self.segments, x.shape[2])
        if self.scale is None:
            return self.low
        levels = self.low.astype(jnp.float32)
        if self.high is not None:
            levels = levels + 256.0 * self.high.astype(jnp.float32)
        segments = self.scale.shape[0]
        by_segment = levels.reshape(-1, segments, *levels.shape[1:]) * self.scale[None, :, :, None]
        return by_segment.reshape(levels.shape)

    def _product(self, factor: Factor) -> Float[Array, "B L E"]:
        levels = unpack_words(self.low).astype(jnp.int32)
        if self.high is not None:
            levels = levels + 256 * unpack_words(self.high).astype(jnp.int32)
        total = levels @ unpack_words(factor.words.T).T.astype(jnp.int32)
        assert self.scale is not None  # a product's levels have steps
        x = total.astype(jnp.float32) * factor.column[None, None] * self.scale[0][None, :, None]
        return x.astype(factor.dtype)


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
