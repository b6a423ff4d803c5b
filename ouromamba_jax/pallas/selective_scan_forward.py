"""The selective scan's forward pass on NVIDIA GPUs: one thread per channel, its N states in registers.

A program walks the tokens of 128 channels of one sample. Delta's bias and softplus, the D skip and the silu(z) gate
are part of the walk, so u, delta, z and y cross memory once. exp(delta A) is 2^(delta A log2 e).

u and delta may come as an array for every group, so that nobody has to copy them side by side; a program then branches
to the arrays of its group.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8

from ouromamba_jax.pallas.selective_scan import Steps, Wide, parts
from ouromamba_jax.pallas.tiles import SCAN_CHANNELS as CHANNELS

AHEAD = 2
"""Tokens whose inputs are loaded while as many before them are computed; 4 of them take 246 registers, 2 take 161."""
LOG2_E = 1.4426950408889634
# No memory is both read and written, so nothing needs the barriers that Pallas puts around every store.
PARAMETERS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=8192)


def softplus(x):
    """softplus(x) and its derivative."""
    e = jnp.exp(-jnp.abs(x))
    series = e * (1.0 - e * (0.5 - e * (1 / 3 - e * 0.25)))  # where 1 + e would lose e
    value = jnp.maximum(x, 0.0) + jnp.where(e < 0.03, series, jnp.log(1.0 + e))
    return value, jnp.where(x < 0.0, e, 1.0) / (1.0 + e)


def forward(
    u: Wide,
    delta: Wide,
    A: Float32[Array, "D N"],
    B: Float[Array, "B L G N"] | Int8[Array, "B L G N"],
    C: Float[Array, "B L G N"] | Int8[Array, "B L G N"],
    D: Float32[Array, " D"] | None = None,
    *,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float32[Array, " D"] | None = None,
    h0: Float32[Array, "B D N"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    chunk: int | None = None,
    levels: Steps | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "B L D"], Float32[Array, "B D N"], Float32[Array, "B chunks N D"] | None]:
    """y, the last state, and with `chunk` (an even number of tokens) the state before each chunk, in scan order.

    Arguments as in `scan.selective_scan`, D / G a multiple of 128, N at most 16. y has u's type, float32 for levels.
    """
    u, delta = parts(u), parts(delta)
    (batch, length, _), channels = u[0].shape, A.shape[0]
    groups, states = B.shape[2:]
    per_group = channels // groups // CHANNELS  # programs of a sample
    steps = pl.cdiv(length, AHEAD)
    inputs = {"u": u, "delta": delta} | ({} if z is None else {"gate": (z,)})
    far, numbers = {}, {}
    for name, step in (levels or Steps())._asdict().items():
        if step is not None:
            numbers[f"{name}_size"] = step.size
        if step is not None and step.far is not None:
            far[name], numbers[f"{name}_shift"] = parts(step.far), step.shift
    optional = {"skip": D, "bias": delta_bias, "h0": None if h0 is None else jnp.swapaxes(h0, 1, 2)}
    optional = {name: x for name, x in optional.items() if x is not None}
    operands, structure = jax.tree.flatten((inputs, far, numbers, A.T * LOG2_E, B, C, optional))
    apart = any(len(arrays) > 1 for arrays in (*inputs.values(), *far.values()))

    def selective_scan(*refs):
        inputs, far, numbers, A, B, C, given = jax.tree.unflatten(structure, refs[: len(operands)])
        y, h_last, *starts = refs[len(operands) :]
        sample, block = lax.axis_index("sample"), lax.axis_index("block")
        here = pl.ds(block * CHANNELS, CHANNELS)
        within = pl.ds(lax.rem(block, per_group) * CHANNELS, CHANNELS)
        group = block // per_group
        rates = [A[n, here] for n in range(states)]

        def position(i):
            """Past the end the last token comes again; with a step size of 0 it changes nothing."""
            i = jnp.minimum(i, length - 1)
            return length - 1 - i if reverse else i

        def vector(arrays, t, index):
            array, channels = (arrays[0], here) if len(arrays) == 1 else (arrays[index], within)
            return array[sample, t, channels].astype(jnp.float32)

        def number(arrays, t, index):
            return arrays[index][sample, t] if isinstance(arrays, tuple) else arrays[sample, t, group]

        def of_my_group(read, first=0, count=groups if apart else 1):
            """read(group), one of `count`: between two, the compiler selects addresses instead."""
            if count == 1:
                return read(first)
            half = count // 2
            lower, upper = (
                partial(of_my_group, read, first, half),
                partial(of_my_group, read, first + half, count - half),
            )
            return lax.cond(group < first + half, lower, upper)

        def fetch(k):
            """Inputs and numbers of the tokens of a step."""

            def read(index):
                return tuple(
                    (
                        {name: vector(arrays, t, index) for name, arrays in inputs.items()},
                        {name: number(arrays, t, index) for name, arrays in numbers.items()},
                    )
                    for t in (position(k * AHEAD + i) for i in range(AHEAD))
                )

            return of_my_group(read)

        def finished(name, values, numbers, t):
            """An input in floats. Outliers of its own are rare, and only loaded here."""
            x = values[name]
            if name in far:
                shift = numbers[f"{name}_shift"]

                def with_far():
                    power = lax.bitcast_convert_type(jnp.full((CHANNELS,), shift + 127) << 23, jnp.float32)
                    return x + power * of_my_group(partial(vector, far[name], t))

                x = lax.cond(shift > 0, with_far, lambda: x)
            return scaled(name, x, numbers)

        def scaled(name, x, numbers):
            return x * numbers[f"{name}_size"] if f"{name}_size" in numbers else x

        def step_size(d, i):
            d = d + given["bias"][here] if "bias" in given else d
            d = softplus(d)[0] if delta_softplus else d
            return d * jnp.where(i < length, jnp.float32(1), jnp.float32(0))

        def walk(k, carry):
            h, loaded = carry
            if chunk is not None:

                @pl.when(lax.rem(k, chunk // AHEAD) == 0)
                def _():
                    for n in range(states):
                        starts[0][sample, k * AHEAD // chunk, n, here] = h[n]

            following = fetch(k + 1)
            outs = []
            for i, (values, sizes) in enumerate(loaded):
                t = position(k * AHEAD + i)
                x, d = finished("u", values, sizes, t), finished("delta", values, sizes, t)
                d = step_size(d, k * AHEAD + i)
                dx = scaled("B", d * x, sizes)
                decays = [jnp.exp2(d * rate) for rate in rates]
                inflow = [dx * B[sample, t, group, n].astype(jnp.float32) for n in range(states)]
                h = tuple(a * h_n + b for a, h_n, b in zip(decays, h, inflow, strict=True))
                out = jnp.zeros((CHANNELS,), jnp.float32)
                for n in range(states):
                    out = out + h[n] * C[sample, t, group, n].astype(jnp.float32)
                out = scaled("C", out, sizes)
                if "skip" in given:
                    out = out + x * given["skip"][here]
                if "gate" in values:
                    gate = values["gate"]
                    out = out * (gate / (1.0 + jnp.exp(-gate)))
                outs.append((t, out))
            for t, out in outs:
                y[sample, t, here] = out.astype(y.dtype)
            return h, following

        zeros = jnp.zeros((CHANNELS,), jnp.float32)
        start = tuple(given["h0"][sample, n, here] if "h0" in given else zeros for n in range(states))
        h, _ = lax.fori_loop(0, steps, walk, (start, fetch(0)))
        for n in range(states):
            h_last[sample, n, here] = h[n]

    state = (batch, states, channels)
    dtype = jnp.float32 if u[0].dtype == jnp.int8 else u[0].dtype
    shapes = [jax.ShapeDtypeStruct((batch, length, channels), dtype), jax.ShapeDtypeStruct(state, jnp.float32)]
    if chunk is not None:
        shapes.append(jax.ShapeDtypeStruct((batch, pl.cdiv(length, chunk), *state[1:]), jnp.float32))
    y, h_last, *starts = plgpu.kernel(
        selective_scan,
        out_type=tuple(shapes),
        grid=(channels // CHANNELS, batch),
        grid_names=("block", "sample"),
        compiler_params=PARAMETERS,
        **({"interpret": interpret} if interpret is not None else {}),
    )(*operands)
    return y, jnp.swapaxes(h_last, 1, 2), starts[0] if starts else None
