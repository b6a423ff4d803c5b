"""Algorithm 2 on GPUs: a thread owns a channel and walks a window's tokens with the one number that says since when its
channel is listed. No reduction, no shared memory; every entry is read once.

On a GPU division is the fast one (div.full): a level at an exact tie may differ by one from a CPU's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Int32

from ouromamba_jax.ops.qtensor import divide
from ouromamba_jax.pallas.device import device_reason

if TYPE_CHECKING:
    from ouromamba_jax.ops.split import OutlierConfig

AHEAD = 10
"""Tokens that are loaded before the first of them is split."""


def supports(x: Float[Array, "B L C"], config: "OutlierConfig", **_: Any) -> str | None:
    """Why this call cannot run here, from static facts and the device; None if it can."""
    return unsuitable(x, config) or device_reason()


def unsuitable(x: Float[Array, "B L C"], config: "OutlierConfig", **_: Any) -> str | None:
    """Why the kernel cannot split this, whatever the device; None if it can."""
    if config.detection == "static":
        return 'a fixed list of channels, detection="static"'
    return "there is nothing to split" if x.size == 0 else None


@dataclass(frozen=True)
class Rule:
    """How a kernel splits the tokens of one activation, whoever makes them; entries as vectors of channels.

    Attributes:
      q, Q: largest levels of inliers and outliers.
      window: tokens per window.
      two_bytes: whether levels have a high byte.
      shifted: whether outliers are multiples of a unit of their token's.
    """

    q: float
    Q: float
    window: int
    two_bytes: bool
    shifted: bool

    @classmethod
    def of(cls, config: "OutlierConfig", tokens: int, shift: Int8[Array, " L"] | None) -> "Rule":
        two_bytes = config.outlier_bits == 16 or shift is not None
        q, Q = float(config.largest_inlier), float(config.largest_outlier)
        return cls(q, Q, min(config.n_refresh, tokens), two_bytes, shift is not None)

    def numbers(self, scale: Float32[Array, " L"], limit: Float32[Array, " L"], shift: Any) -> tuple[Array, ...]:
        """What a kernel reads for every token: step, limit, and the outliers' unit with its reciprocal."""
        if shift is None:
            return scale, limit
        exponent = shift.astype(jnp.float32)
        return scale, limit, jnp.exp2(exponent), jnp.exp2(-exponent)

    def planes(self, batch: int, tokens: int, channels: int) -> list[jax.ShapeDtypeStruct]:
        """Of low, and high if there is one."""
        return [jax.ShapeDtypeStruct((batch, tokens, channels), jnp.int8)] * (2 if self.two_bytes else 1)

    def level(
        self, x: Float32[Array, " n"], i: Any, first: Int32[Array, " n"], numbers: tuple[Any, ...]
    ) -> tuple[Float32[Array, " n"], Int32[Array, " n"]]:
        """(levels of a window's token i, `first` after it); `window` means that nothing is listed."""
        scale, limit, *units = numbers
        first = jnp.minimum(first, jnp.where(jnp.abs(x) > limit, i, self.window))
        ratio = divide(x, scale)
        bound: Any = self.q
        if self.q != self.Q or units:
            listed = first < self.window
            bound = jnp.where(listed, jnp.float32(self.Q), jnp.float32(self.q))
        if units:
            unit, reciprocal = units
            ratio = ratio * jnp.where(listed, reciprocal, jnp.float32(1))
        level = jnp.round(jnp.minimum(jnp.maximum(ratio, -bound), bound))
        level = jnp.where(level == level, level, jnp.float32(0))  # NaN
        if units:
            level = level * jnp.where(listed, unit, jnp.float32(1))
        return level, first

    def bytes(self, level: Float32[Array, " n"]) -> list[Array]:
        """low, and high if there is one."""
        if not self.two_bytes:
            return [level]
        high = jnp.round((level + 0.5) * (1 / 256))  # the low byte is in -128..127; Mosaic has no floor
        return [level - 256.0 * high, high]


def split(
    x: Float[Array, "B L C"],
    scale: Float32[Array, " L"],
    limit: Float32[Array, " L"],
    config: "OutlierConfig",
    *,
    shift: Int8[Array, " L"] | None = None,
    interpret: Any = None,
) -> tuple[Int8[Array, "B L C"], Int8[Array, "B L C"] | None, Int8[Array, "B windows C"]]:
    """low, high and first of `ops.split.Split`, for what `supports` accepts; `limit` lists a channel."""
    # Imported here: Mosaic takes a while, and most processes never run a kernel.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from ouromamba_jax.pallas import lanes

    B, L, C = x.shape
    rule = Rule.of(config, L, shift)
    numbers = rule.numbers(scale, limit, shift)
    emulated = interpret is not None

    def outlier_split(x, *rest):
        numbers, (*planes, firsts) = rest[: len(rest) - len(results)], rest[len(rest) - len(results) :]
        sample, window = lax.axis_index("sample"), lax.axis_index("window")
        channel = lanes.first_channel(lax.axis_index("block"), C)

        def position(i):
            """Past a window's or the sample's end the last token comes again, which changes nothing."""
            return jnp.minimum(window * rule.window + jnp.minimum(i, rule.window - 1), L - 1)

        def walk(k, first):
            tokens = [k * AHEAD + i for i in range(AHEAD)]
            loaded = [lanes.load(x.at[sample, position(i)], channel, emulated=emulated) for i in tokens]
            for i, row in zip(tokens, loaded, strict=True):
                t = position(i)
                level, first = rule.level(row.astype(jnp.float32), i, first, tuple(ref[t] for ref in numbers))
                for plane, values in zip(planes, rule.bytes(level), strict=True):
                    lanes.store(plane.at[sample, t], channel, values, emulated=emulated)
            return first

        nothing = jnp.full((lanes.LANES,), rule.window, jnp.int32)
        first = lax.fori_loop(0, -(-rule.window // AHEAD), walk, nothing)
        lanes.store(firsts.at[sample, window], channel, first, emulated=emulated)

    windows = -(-L // rule.window)
    listed = jax.ShapeDtypeStruct((B, windows, C), jnp.int8 if rule.window <= 127 else jnp.int32)
    results = *rule.planes(B, L, C), listed
    low, *high, first = plgpu.kernel(
        outlier_split,
        out_type=results,
        grid=(lanes.count_blocks(C), windows, B),
        grid_names=("block", "window", "sample"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # no memory is both read and written
        **({"interpret": interpret} if emulated else {}),
    )(x, *numbers)
    return low, high[0] if high else None, first
