"""The selective scan's forward pass on NVIDIA GPUs: one thread per channel, its N states in registers.

A program walks the tokens of 128 channels of one sample. Delta's bias and softplus, the D skip and the silu(z) gate
are part of the walk, so u, delta, z and y cross memory once. exp(delta A) is 2^(delta A log2 e).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

CHANNELS = 128
AHEAD = 2
"""Tokens whose inputs are loaded while as many before them are computed; 4 of them take 246 registers, 2 take 161."""
_LOG2_E = 1.4426950408889634


def forward(
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    A: Float32[Array, "D N"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    D: Float32[Array, " D"] | None = None,
    *,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float32[Array, " D"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    interpret: Any = None,
) -> tuple[Float[Array, "B L D"], Float32[Array, "B D N"]]:
    """y and the last state; arguments as in `scan.selective_scan`, D / G a multiple of 128, N at most 16."""
    batch, length, channels = u.shape
    groups, states = B.shape[2:]
    if states > 16 or channels % (groups * CHANNELS):
        raise ValueError(
            f"the kernel holds up to 16 states of {CHANNELS} channels of one group at a time, not {states} states and "
            f"{channels} channels in {groups} groups: use the XLA implementation"
        )
    optional = [v for v in (D, delta_bias, z) if v is not None]

    def body(u, delta, A, B, C, *rest):
        *given, y, h_last = rest
        refs = iter(given)
        skip, bias, gate = (next(refs) if v is not None else None for v in (D, delta_bias, z))
        sample, block = lax.axis_index("sample"), lax.axis_index("block")
        here = pl.ds(block * CHANNELS, CHANNELS)
        group = block * CHANNELS // (channels // groups)
        rates = [A[n, here] for n in range(states)]

        inputs = [ref for ref in (u, delta, gate) if ref is not None]

        def position(i):
            """Past the end the last token comes again; with a step size of 0 it changes nothing."""
            i = jnp.minimum(i, length - 1)
            return length - 1 - i if reverse else i

        def fetch(chunk):
            tokens = [position(chunk * AHEAD + i) for i in range(AHEAD)]
            return tuple(tuple(ref[sample, t, here].astype(jnp.float32) for ref in inputs) for t in tokens)

        def step_size(d, i):
            if bias is not None:
                d = d + bias[here]
            if delta_softplus:
                e = jnp.exp(-jnp.abs(d))
                series = e * (1.0 - e * (0.5 - e * (1 / 3 - e * 0.25)))  # where 1 + e would lose e
                d = jnp.maximum(d, 0.0) + jnp.where(e < 0.03, series, jnp.log(1.0 + e))
            return d * jnp.where(i < length, jnp.float32(1), jnp.float32(0))

        def chunk(k, carry):
            h, loaded = carry
            following = fetch(k + 1)
            outs = []
            for i, (x, d, *g) in enumerate(loaded):
                t, d = position(k * AHEAD + i), step_size(d, k * AHEAD + i)
                dx = d * x
                decays = [jnp.exp2(d * rate) for rate in rates]
                inflow = [dx * B[sample, t, group, n].astype(jnp.float32) for n in range(states)]
                h = tuple(a * h_n + b for a, h_n, b in zip(decays, h, inflow, strict=True))
                out = jnp.zeros((CHANNELS,), jnp.float32) if skip is None else x * skip[here]
                for n in range(states):
                    out = out + h[n] * C[sample, t, group, n].astype(jnp.float32)
                if g:
                    out = out * (g[0] / (1.0 + jnp.exp(-g[0])))
                outs.append((t, out))
            for t, out in outs:
                y[sample, t, here] = out.astype(y.dtype)
            return h, following

        start = tuple(jnp.zeros((CHANNELS,), jnp.float32) for _ in range(states))
        h, _ = lax.fori_loop(0, pl.cdiv(length, AHEAD), chunk, (start, fetch(0)))
        for n in range(states):
            h_last[sample, n, here] = h[n]

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct((batch, states, channels), jnp.float32),
        ),
        grid=(channels // CHANNELS, batch),
        grid_names=("block", "sample"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": interpret} if interpret is not None else {}),
    )
    y, h_last = kernel(u, delta, A.T * _LOG2_E, B, C, *optional)
    return y, jnp.swapaxes(h_last, 1, 2)
