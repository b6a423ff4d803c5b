"""The selective scan's forward pass on NVIDIA GPUs: one thread per channel, its N states in registers.

A program walks the tokens of 128 channels of one sample. Delta's bias and softplus, the D skip and the silu(z) gate
are part of the walk, so u, delta, z and y cross memory once. exp(delta A) is 2^(delta A log2 e).

u and delta may come as an array for every group, so that nobody has to copy them side by side; a program then branches
to the arrays of its group. Either may be levels in steps of their tokens, or be split here: a thread has its channel
and the tokens in order, which is all that Algorithm 2 asks for. A segment first walks the tokens of a window that began
before it. What is split may be a product of few inputs, of which a thread holds its channel's weights.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from ouromamba_jax.pallas import lanes
from ouromamba_jax.pallas.lanes import LANES
from ouromamba_jax.pallas.scan_operand import Operand, Operands

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
    u: Operands,
    delta: Operands,
    A: Float32[Array, "D N"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    D: Float32[Array, " D"] | None = None,
    *,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float32[Array, " D"] | None = None,
    h0: Float32[Array, "B D N"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    chunk: int | None = None,
    ends: bool = False,
    interpret: Any = None,
) -> tuple[
    Float[Array, "B L D"] | Float32[Array, "B D"], Float32[Array, "B D N"], Float32[Array, "B chunks N D"] | None
]:
    """y, the last state, and with `chunk` (an even number of tokens) the state before each chunk, in scan order.

    With `ends` the sum of the step sizes (B, D) comes in y's place. Arguments as in `scan.selective_scan`, N at most
    16. y has u's type, or B's where u is levels.
    """
    (batch, length, groups, states), channels = B.shape, A.shape[0]
    width = channels // groups
    per_group = lanes.count_blocks(width)  # programs of a sample
    steps = pl.cdiv(length, AHEAD)
    inputs = {"u": u, "delta": delta} | ({} if z is None else {"gate": (Operand(z),)})
    optional = {"skip": D, "bias": delta_bias, "h0": None if h0 is None else jnp.swapaxes(h0, 1, 2)}
    optional = {name: x for name, x in optional.items() if x is not None}
    operands, structure = jax.tree.flatten((inputs, A.T * LOG2_E, B, C, optional))
    rules = {name: x[0].rule for name, x in inputs.items() if x[0].rule is not None}
    factors = {name: x[0].factor for name, x in inputs.items() if x[0].factor is not None}
    apart = any(len(operands) > 1 for operands in inputs.values())
    emulated = interpret is not None

    def selective_scan(*refs):
        inputs, A, B, C, given = jax.tree.unflatten(structure, refs[: len(operands)])
        y, h_last, *starts = refs[len(operands) :]
        sample, block = lax.axis_index("sample"), lax.axis_index("block")
        group = block // per_group
        first, of_group = lanes.first_channel(lax.rem(block, per_group), width), pl.ds(group * width, width)

        def load(ref, *index):
            """Of my channels, from a reference to those of all groups."""
            return lanes.load(ref.at[*index, of_group], first, emulated=emulated)

        def store(ref, *index_and_value):
            *index, value = index_and_value
            lanes.store(ref.at[*index, of_group], first, value, emulated=emulated)

        nothing = jnp.zeros((LANES,), jnp.float32)
        rates = [load(A, n) for n in range(states)]
        skip, bias = (load(given[name]) if name in given else None for name in ("skip", "bias"))

        def position(i):
            """Past the end the last token comes again; with a step size of 0 it changes nothing."""
            i = jnp.minimum(i, length - 1)
            return length - 1 - i if reverse else i

        def vector(ref, t, sample=sample):
            if ref.shape[2] == channels:
                return load(ref, sample, t)
            return lanes.load(ref.at[sample, t], first, emulated=emulated)

        def place(operand, t):
            """(sample, token) where t of my segment lies."""
            if operand.segments == 1:
                whole, at = t, sample
            else:
                whole, at = lax.rem(sample, operand.segments) * length + t, sample // operand.segments
            return at, whole if operand.route is None else operand.route.place(whole)

        def of_my_group(read, start=0, count=groups if apart else 1):
            """read(group), one of `count`: between two, the compiler selects addresses instead."""
            if count == 1:
                return read(start)
            half = count // 2
            lower, upper = (
                partial(of_my_group, read, start, half),
                partial(of_my_group, read, start + half, count - half),
            )
            return lax.cond(group < start + half, lower, upper)

        def held(index, name):
            """My channel's weights and their step."""
            factor = inputs[name][index if len(inputs[name]) > 1 else 0].factor
            words = [lanes.load(factor.words.at[w], first, emulated=emulated) for w in range(factor.words.shape[0])]
            return words, lanes.load(factor.column, first, emulated=emulated)

        weights = {name: of_my_group(partial(held, name=name)) for name in factors}

        def multiplied(operand, name, at, t):
            words, column = weights[name]
            total = lanes.dot(operand.low.at[at, t], words, emulated=emulated)
            if operand.high is not None:
                high = lanes.dot(operand.high.at[at, t], words, emulated=emulated)
                total = total + lax.shift_left(high, jnp.full((LANES,), 8, jnp.int32))
            x = total.astype(jnp.float32) * column * operand.scale[0, t]
            return x.astype(factors[name].dtype).astype(jnp.float32)

        def fetch(indices):
            """Inputs of so many tokens, as they lie in memory but in floats."""

            def token(index, t):
                values = {}
                for name, of_groups in inputs.items():
                    mine = of_groups[index if len(of_groups) > 1 else 0]
                    at, whole = place(mine, t)
                    numbers = tuple(ref[whole] for ref in mine.numbers)
                    if mine.factor is not None:
                        values[name] = [multiplied(mine, name, at, whole)], numbers
                        continue
                    levels = [vector(mine.low, whole, at).astype(jnp.float32)]
                    if any(x.high is not None for x in of_groups):
                        levels += [nothing if mine.high is None else vector(mine.high, t).astype(jnp.float32)]
                    if mine.scale is not None:
                        numbers = (mine.scale[lax.rem(sample, mine.scale.shape[0]), t],)
                    values[name] = levels, numbers
                return values

            return of_my_group(lambda index: tuple(token(index, position(i)) for i in indices))

        def following(k):
            return fetch([k * AHEAD + i for i in range(AHEAD)])

        def finished(name, values, i, lists):
            """An input in floats, and the lists of what is split here after it."""
            levels, numbers = values[name]
            x = levels[0] if len(levels) == 1 else levels[0] + 256.0 * levels[1]
            if name in lists:
                rule = rules[name]
                since = lax.rem(skipped(inputs[name][0]) + i, rule.window)
                listed = lanes.where(since > 0, lists[name], rule.window)
                x, listed = rule.level(x, since, listed, numbers)
                lists = lists | {name: listed}
            return (x * numbers[0] if numbers else x), lists

        def step_size(d, i):
            d = d if bias is None else d + bias
            d = softplus(d)[0] if delta_softplus else d
            return d * jnp.where(i < length, jnp.float32(1), jnp.float32(0))

        def walk(k, carry):
            h, total, lists, loaded = carry
            if chunk is not None:

                @pl.when(lax.rem(k, chunk // AHEAD) == 0)
                def _():
                    for n in range(states):
                        store(starts[0], sample, k * AHEAD // chunk, n, h[n])

            coming = following(k + 1)
            outs = []
            for i, values in enumerate(loaded):
                t = position(k * AHEAD + i)
                x, lists = finished("u", values, k * AHEAD + i, lists)
                d, lists = finished("delta", values, k * AHEAD + i, lists)
                d = step_size(d, k * AHEAD + i)
                total = total + d if ends else total
                dx = d * x
                decays = [jnp.exp2(d * rate) for rate in rates]
                inflow = [dx * B[sample, t, group, n].astype(jnp.float32) for n in range(states)]
                h = tuple(a * h_n + b for a, h_n, b in zip(decays, h, inflow, strict=True))
                if ends:
                    continue
                out = nothing
                for n in range(states):
                    out = out + h[n] * C[sample, t, group, n].astype(jnp.float32)
                if skip is not None:
                    out = out + x * skip
                if "gate" in values:
                    gate, _ = finished("gate", values, 0, {})
                    out = out * (gate / (1.0 + jnp.exp(-gate)))
                outs.append((t, out))
            for t, out in outs:
                store(y, sample, t, out)
            return h, total, lists, coming

        def skipped(operand):
            """Tokens of the sample before my segment."""
            return 0 if operand.segments == 1 else lax.rem(sample, operand.segments) * length

        def catch_up(i, lists):
            (values,) = fetch([i])
            for name in lists:
                _, lists = finished(name, values, i, lists)
            return lists

        start = tuple(load(given["h0"], sample, n) if "h0" in given else nothing for n in range(states))
        lists = {name: jnp.full((LANES,), rule.window, jnp.int32) for name, rule in rules.items()}
        for name, rule in rules.items():
            if inputs[name][0].segments > 1:
                begun = lax.rem(skipped(inputs[name][0]), rule.window)
                lists |= lax.fori_loop(-begun, 0, catch_up, {name: lists[name]})
        h, total, *_ = lax.fori_loop(0, steps, walk, (start, nothing, lists, following(0)))
        for n in range(states):
            store(h_last, sample, n, h[n])
        if ends:
            store(y, sample, total)

    state = (batch, states, channels)
    dtype = B.dtype if u[0].low.dtype == jnp.int8 else u[0].low.dtype
    made = ((batch, channels), jnp.float32) if ends else ((batch, length, channels), dtype)
    shapes = [jax.ShapeDtypeStruct(*made), jax.ShapeDtypeStruct(state, jnp.float32)]
    if chunk is not None:
        shapes.append(jax.ShapeDtypeStruct((batch, pl.cdiv(length, chunk), *state[1:]), jnp.float32))
    y, h_last, *starts = plgpu.kernel(
        selective_scan,
        out_type=tuple(shapes),
        grid=(groups * per_group, batch),
        grid_names=("block", "sample"),
        compiler_params=PARAMETERS,
        **({"interpret": interpret} if interpret is not None else {}),
    )(*operands)
    return y, jnp.swapaxes(h_last, 1, 2), starts[0] if starts else None
