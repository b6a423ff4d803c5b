"""The selective scan's backward pass on NVIDIA GPUs: short pieces in reverse, their states recomputed in registers.

A program walks 128 channels of one sample. The forward pass has saved the state before every chunk; a chunk is a few
pieces, and a piece walks forward from its chunk's start, keeps its own states, then walks back. Sums over all channels
of a group, for dB and dC, leave as one part per program.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from ouromamba_jax.pallas.selective_scan_forward import LOG2_E, PARAMETERS, softplus
from ouromamba_jax.pallas.selective_scan_registers import registers
from ouromamba_jax.pallas.store import store
from ouromamba_jax.pallas.tiles import SCAN_CHANNELS as CHANNELS
from ouromamba_jax.pallas.tiles import ScanTiles


class Gradients(NamedTuple):
    """By argument of `forward`; D's, z's and delta_bias's are None where the argument is."""

    u: Float[Array, "B L D"]
    delta: Float[Array, "B L D"]
    A: Float32[Array, "D N"]
    B: Float32[Array, "B L G N"]
    C: Float32[Array, "B L G N"]
    h0: Float32[Array, "B D N"]
    D: Float32[Array, " D"] | None = None
    z: Float[Array, "B L D"] | None = None
    delta_bias: Float32[Array, " D"] | None = None


def backward(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    A: Float32[Array, "D N"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    D: Float32[Array, " D"] | None,
    starts: Float32[Array, "B chunks N D"],
    dy: Float[Array, "B L D"],
    dh_last: Float32[Array, "B D N"],
    d_starts: Float32[Array, "B chunks N D"] | None = None,
    *,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float32[Array, " D"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    tiles: ScanTiles,
    interpret: Any = None,
) -> Gradients:
    """Gradients of `forward`'s arguments from those of what it returns; `starts` are of `tiles.chunk` tokens.

    With g_t = dloss/dh_t and w_t = g_t exp(delta_t A): g_t = w_{t+1} + C_t dy_t, and dloss/d(delta_t A) = w_t h_{t-1}.
    """
    batch, length, channels = u.shape
    groups, states = B.shape[2:]
    blocks, piece = channels // CHANNELS, tiles.piece
    pieces = tiles.chunk // piece
    tile = registers(states)
    optional = {"D": D, "delta_bias": delta_bias, "z": z}
    outputs = [name for name, x in optional.items() if x is not None]
    optional = {name: x for name, x in {**optional, "d_starts": d_starts}.items() if x is not None}

    def selective_scan_backward(u, delta, A, B, C, starts, dy, dh_last, *rest):
        given = dict(zip(optional, rest, strict=False))
        d_u, d_delta, d_A, d_B, d_C, d_h0, *more = rest[len(given) :]
        d_optional = dict(zip(outputs, more, strict=True))
        sample, block = lax.axis_index("sample"), lax.axis_index("block")
        here = pl.ds(block * CHANNELS, CHANNELS)
        group = block // (blocks // groups)

        def per_channel(ref, *index):
            return tile.load_channels(ref.at[*index, here])

        def projection(ref, t):
            return tile.load_states(ref.at[sample, t, group])

        def saved(ref, k):
            return tile.load_transposed(ref.at[sample, k, :, here])

        skip, bias = (per_channel(given[n]) if n in given else None for n in ("D", "delta_bias"))

        def token(i):
            """Position, u, step size and its derivative, and 1, or 0 past the end, where all but u is 0."""
            present = jnp.where(i < length, jnp.float32(1), jnp.float32(0))
            t = jnp.minimum(i, length - 1)
            t = length - 1 - t if reverse else t
            d = per_channel(delta, sample, t)
            d = d if bias is None else d + bias
            d, slope = softplus(d) if delta_softplus else (d, jnp.ones_like(d))
            return t, per_channel(u, sample, t), d * present, slope * present, present

        def decay(d):
            # The rates are loaded again each time: kept, or shared with the way back, the decays would spill.
            return jnp.exp2(tile.across(d) * (tile.load(A.at[here]) * LOG2_E))

        def advance(i, h):
            t, x, d, _, _ = token(i)
            return decay(d) * h + tile.across(d * x) * projection(B, t)

        def walk(i, carry):
            at = pl.cdiv(length, piece) - 1 - i
            k, first = at // pieces, at * piece
            h = [lax.fori_loop(k * pieces * piece, first, advance, saved(starts, k))]
            for j in range(piece):
                h.append(advance(first + j, h[j]))
            for j in reversed(range(piece)):
                carry = retreat(first + j, h[j], h[j + 1], *carry)
            if "d_starts" in given:
                w, *sums = carry
                is_start = jnp.where(lax.rem(at, pieces) == 0, jnp.float32(1), jnp.float32(0))
                carry = (w + saved(given["d_starts"], k) * is_start, *sums)
            return carry

        def retreat(i, before, after, w, sum_A, sum_D, sum_bias):
            t, x, d, slope, present = token(i)
            rate, b, c = tile.load(A.at[here]), projection(B, t), projection(C, t)
            g_y = per_channel(dy, sample, t) * present
            if "z" in given:
                gate = per_channel(given["z"], sample, t)
                sigmoid = 1.0 / (1.0 + jnp.exp(-gate))
                out = tile.over_states(after * c)
                out = out if skip is None else out + x * skip
                store(d_optional["z"].at[sample, t, here], g_y * out * sigmoid * (1.0 + gate * (1.0 - sigmoid)))
                g_y = g_y * gate * sigmoid
            g = w + c * tile.across(g_y)
            tile.store_states(d_C.at[sample, t, block], tile.over_channels(after * tile.across(g_y)))
            tile.store_states(d_B.at[sample, t, block], tile.over_channels(g * tile.across(d * x)))
            g_dx = tile.over_states(g * b)
            w = g * decay(d)
            g_exponent = w * before
            g_delta = (tile.over_states(g_exponent * rate) + g_dx * x) * slope
            store(d_delta.at[sample, t, here], g_delta)
            store(d_u.at[sample, t, here], g_dx * d if skip is None else g_dx * d + g_y * skip)
            return w, sum_A + g_exponent * tile.across(d), sum_D + g_y * x, sum_bias + g_delta

        zero = tile.zeros()
        start = (tile.load(dh_last.at[sample, here]), tile.across(zero), zero, zero)
        w, *sums = lax.fori_loop(0, pl.cdiv(length, piece), walk, start)
        tile.store(d_h0.at[sample, here], w)
        tile.store(d_A.at[sample, here], sums[0])
        for name, total in zip(("D", "delta_bias"), sums[1:], strict=True):
            if name in given:
                store(d_optional[name].at[sample, here], total)

    state = jax.ShapeDtypeStruct((batch, channels, states), jnp.float32)
    part = jax.ShapeDtypeStruct((batch, length, blocks, states), jnp.float32)
    sums = {name: jax.ShapeDtypeStruct((batch, channels), jnp.float32) for name in outputs}
    sums |= {} if z is None else {"z": jax.ShapeDtypeStruct(z.shape, z.dtype)}
    like_u, like_delta = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (u, delta))
    d_u, d_delta, d_A, d_B, d_C, d_h0, *more = plgpu.kernel(
        selective_scan_backward,
        out_type=(like_u, like_delta, state, part, part, state, *sums.values()),
        grid=(blocks, batch),
        grid_names=("block", "sample"),
        compiler_params=PARAMETERS,
        **({"interpret": interpret} if interpret is not None else {}),
    )(u, delta, A, B, C, starts, dy, dh_last, *optional.values())
    d_B, d_C = (jnp.sum(x.reshape(batch, length, groups, -1, states), axis=3) for x in (d_B, d_C))
    rest = {name: x if name == "z" else jnp.sum(x, axis=0) for name, x in zip(outputs, more, strict=True)}
    return Gradients(d_u, d_delta, jnp.sum(d_A, axis=0), d_B, d_C, d_h0, **rest)
