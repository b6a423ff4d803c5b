"""The producers of `ops.producers` on GPUs, each with the split of what it makes in one kernel."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int8

from ouromamba_jax.pallas.device import device_reason
from ouromamba_jax.pallas.outlier_split import Rule

if TYPE_CHECKING:
    from ouromamba_jax.ops.split import OutlierConfig

WIDEST = 2048
"""Channels of a normalised token that a warpgroup's registers have room for."""
ROWS = ("rms_norm", "layer_norm", "merged_routes")
NAMES = (*ROWS, "gelu", "conv_silu", "route", "gated_mean", "beside_conv_silu", "patches3x3")


def supports(producer: Any, arrays: Any, options: Any, scale: Any, config: "OutlierConfig", **call: Any) -> str | None:
    """Why this call cannot run here, from static facts and the device; None if it can."""
    return unsuitable(producer, arrays, options, scale, config, **call) or device_reason()


def unsuitable(
    producer: Any, arrays: Any, options: Any, scale: Any, config: "OutlierConfig", *, keep: bool, **_: Any
) -> str | None:
    """Why there is no kernel for this call, whatever the device; None if there is one."""
    name = getattr(producer, "__name__", "")
    if name not in NAMES:
        return f"there is no kernel for {name}"
    if config.detection == "static":
        return 'a fixed list of channels, detection="static"'
    made = jax.eval_shape(lambda *x: producer(*x, **options), *arrays)
    if made.size == 0:
        return "there is nothing to split"
    if name in ROWS and keep:
        return "the normalised activation itself is not written"
    if name in ROWS and made.shape[-1] > WIDEST:
        return f"{made.shape[-1]} channels do not fit a warpgroup's registers, {WIDEST} do"
    return None


def run(
    name: str,
    arrays: tuple[Any, ...],
    options: dict[str, Any],
    scale: Float32[Array, " L"],
    limit: Float32[Array, " L"],
    config: "OutlierConfig",
    *,
    shift: Int8[Array, " L"] | None,
    keep: bool,
    like: jax.ShapeDtypeStruct,
    interpret: Any = None,
) -> list[Array]:
    """What the producer's kernel makes, as `by_channel` returns it; `like` is what the producer makes."""
    # Imported here: Mosaic takes a while, and most processes never run a kernel.
    from ouromamba_jax.pallas import lanes
    from ouromamba_jax.pallas.producer_split import Site, by_channel, by_row

    batch, *between, channels = like.shape
    tokens = scale.shape[0]
    rule = Rule.of(config, tokens, shift)
    site = Site(rule, rule.numbers(scale, limit, shift), (batch, tokens, channels))
    title = f"outlier_split_{name}"

    def tokens_of(x):
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def rounded(x):
        return x.astype(like.dtype).astype(jnp.float32)

    if name in ROWS:
        norm, eps = "rms_norm" if name == "rms_norm" else "layer_norm", options["eps"]
        x, *parameters = arrays
        if name == "merged_routes":
            height, width = options["grid"]
            narrow = x.dtype
            x = x.reshape(batch, tokens, -1)

            def value(refs, row, sample, t):
                column = lax.rem(t, width) * height + lax.div(t, width)

                def route(at, g):
                    return row(refs[0], sample, at, start=g * channels)

                def add(a, b):
                    return (a + b).astype(narrow).astype(jnp.float32)

                by_row_ = add(route(t, 0), route(tokens - 1 - t, 2))
                return add(by_row_, add(route(column, 1), route(tokens - 1 - column, 3)))
        else:
            x = tokens_of(x)

            def value(refs, row, sample, t):
                return row(refs[0], sample, t)

        def normalise(refs, rows, values, total):
            if norm == "layer_norm":
                mean = total(values) * (1 / channels)
                values = [x - mean for x in values]
            power = lax.rsqrt(total([x * x for x in values]) * (1 / channels) + eps)
            affine = [[row(ref) for ref in refs[1:]] for row in rows]
            return [
                x * power * scale + (bias[0] if bias else 0.0) for x, (scale, *bias) in zip(values, affine, strict=True)
            ]

        return by_row(title, value, normalise, (x, *parameters), site, dtype=like.dtype, interpret=interpret)

    parts = 1
    if name == "gelu":
        arrays = (tokens_of(arrays[0]),)

        def value(refs, row, sample, t, part):
            return _gelu(row(refs[0], sample, t), options["approximate"])
    elif name == "gated_mean":
        y, z = arrays
        arrays = y.reshape(batch, tokens, -1), z
        start = options.get("start", 0)

        def value(refs, row, sample, t, part):
            y, z = refs
            forward, backward = row(y, sample, t), row(y, sample, tokens - 1 - t, start=channels)
            gate = row(z, sample, t, start=start)
            return rounded(rounded(forward + backward) * 0.5) * rounded(_silu(gate))
    elif name == "conv_silu":

        def value(refs, row, sample, t, part):
            return _conv_silu(refs, row, sample, t, tokens, rounded, **options)
    elif name == "route":
        _, height, width, _ = arrays[0].shape
        arrays = (tokens_of(arrays[0]),)

        def value(refs, row, sample, t, part):
            t = tokens - 1 - t if options["reverse"] else t
            return row(refs[0], sample, lax.rem(t, height) * width + lax.div(t, height) if options["transpose"] else t)
    elif name == "beside_conv_silu":
        parts = 2

        def value(refs, row, sample, t, part):
            y, *of_conv = refs

            def conv():
                return _conv_silu(of_conv, row, sample, t, tokens, rounded, **options)

            return lax.cond(part == 0, lambda: row(y, sample, t), conv)
    else:
        parts, stride = 9, options["stride"]
        _, height, width, _ = arrays[0].shape

        def value(refs, row, sample, t, part):
            i = lax.div(t, between[1]) * stride + lax.div(part, 3) - 1
            j = lax.rem(t, between[1]) * stride + lax.rem(part, 3) - 1
            inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            x = row(refs[0], sample, jnp.clip(i, 0, height - 1) * width + jnp.clip(j, 0, width - 1))
            x = _gelu(x, approximate=True) if options.get("tanh_gelu") else x
            return lanes.where(inside, x, 0.0)

        arrays = (tokens_of(arrays[0]),)
    return by_channel(title, value, arrays, site, dtype=like.dtype, parts=parts, keep=keep, interpret=interpret)


def _silu(x):
    return x / (1.0 + jnp.exp(-x))


def _gelu(x, approximate: bool):
    """Mosaic has tanh and exp but no erf: that is Abramowitz and Stegun's 7.1.26, off by 1.5e-7 at most."""
    if approximate:
        return 0.5 * x * (1.0 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    size = jnp.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * size)
    series: Any = 1.061405429
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + coefficient
    half_tail = 0.5 * series * t * jnp.exp(-size * size)  # of the normal distribution beyond |x|
    return x * jnp.where(x < 0.0, half_tail, 1.0 - half_tail)


def _conv_silu(refs, row, sample, t, tokens, rounded, *, start=0, causal=True, reverse=False, dtype):
    from ouromamba_jax.pallas import lanes

    x, taps, bias = refs
    width = taps.shape[0]
    left = width - 1 if causal else (width - 1) // 2
    total: Any = None
    for k in range(width):
        at = t - left + k
        here = jnp.clip(at, 0, tokens - 1)
        tap = rounded(row(x, sample, tokens - 1 - here if reverse else here, start=start))
        term = rounded(lanes.where((at >= 0) & (at < tokens), tap, 0.0) * rounded(row(taps, k)))
        total = term if total is None else rounded(total + term)
    return _silu(total if bias is None else rounded(total + rounded(row(bias))))
