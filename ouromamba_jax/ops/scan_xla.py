"""The selective scan on any device, through XLA: a loop over chunks of steps, with its own VJP."""

from functools import partial

import jax
import jax.numpy as jnp

from ouromamba_jax.ops.meshes import vary_alike
from ouromamba_jax.ops.scan_types import ScanOutput

# Steps between two saved states, one loop body. Chunks of 4 would save twice as many states and be no faster, chunks of
# 16 take almost twice as long to compile.
MAX_CHUNK = 8

# Inside, arrays are time-major, in scan order and cut in chunks: delta, with its bias, and u are (chunks, K, B, G, P)
# with P = D / G; b and c (chunks, K, B, G, N). The state is (B, G, N, P): channels last fill the vector units, and a
# group's B and C broadcast over them. Step sizes d are made of delta in every step: as an array of their own they would
# be written and read once more.
_NO_STEP = -1e30  # softplus makes zero of it


def run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0, reverse, collect, state_transform) -> ScanOutput:
    """`selective_scan` with B and C grouped; supports every call."""
    (batch, length, channels), (groups, d_state) = u.shape, B.shape[2:]
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    delta = f32(delta) if delta_bias is None else f32(delta) + f32(delta_bias)[None, None]
    n_chunks = -(-length // MAX_CHUNK)
    chunk = -(-length // n_chunks)

    def to_chunks(x, padding=0.0):  # the padding's step sizes are 0: they leave the state as it is
        x = jnp.flip(x, 1) if reverse else x
        widths = ((0, 0), (0, n_chunks * chunk - length), (0, 0), (0, 0))
        x = jnp.pad(x.reshape(batch, length, groups, -1), widths, constant_values=padding)
        return x.swapaxes(0, 1).reshape(n_chunks, chunk, *x.shape[:1], *x.shape[2:])

    def from_chunks(x):
        return x.reshape(n_chunks * chunk, *x.shape[2:])[:length].swapaxes(0, 1)

    def to_state(h):
        return h.reshape(*h.shape[:-2], groups, channels // groups, d_state).swapaxes(-1, -2)

    def from_state(h):
        return h.swapaxes(-1, -2).reshape(batch, channels, d_state)

    xs = (to_chunks(delta, _NO_STEP if delta_softplus else 0.0), *map(to_chunks, (f32(u), f32(B), f32(C))))
    h = jnp.zeros((batch, groups, d_state, channels // groups), jnp.float32) if h0 is None else to_state(f32(h0))
    decay_rates, h, *inputs = vary_alike(to_state(f32(A)), h, *xs)
    xs = tuple(inputs)
    if collect is None and state_transform is None:
        y, h = _scan(delta_softplus, decay_rates, *xs, h)
        states = None
    else:
        steps = jnp.arange(n_chunks * chunk, dtype=jnp.int32).reshape(n_chunks, chunk)

        def transform(h, t):
            if state_transform is None:
                return h
            return jnp.where(t < length, to_state(state_transform(from_state(h), t)), h)  # padding is not transformed

        y, states, h = _open_scan(
            partial(_step, delta_softplus, decay_rates),
            xs,
            h,
            steps,
            transform,
            lambda h: None if collect is None else collect(from_state(h)),
        )
        states = jax.tree.map(from_chunks, states)
    y = from_chunks(y).reshape(u.shape)
    y = jnp.flip(y, 1) if reverse else y
    if D is not None:
        y = y + f32(D)[None, None] * f32(u)
    if z is not None:
        y = y * jax.nn.silu(f32(z))
    return ScanOutput(y.astype(u.dtype), from_state(h), states)


def _softplus(x):
    """log(1 + exp(x)), as `jax.nn.softplus` to float rounding, in two thirds of its time on a CPU.

    With e = exp(-|x|) it is max(x, 0) + log(1 + e), and log(1 + e) = 2 artanh(e / (2 + e)), whose argument is at most
    1/3: seven terms of its series are exact to 2e-8.
    """
    e = jnp.exp(-jnp.abs(x))
    z = e / (2 + e)
    series = jnp.full_like(z, 1 / 13)
    for n in (11, 9, 7, 5, 3, 1):
        series = series * (z * z) + 1 / n
    return jnp.maximum(x, 0) + 2 * z * series


def _decay(A, d):
    return jnp.exp(d[:, :, None] * A[None])


def _step(softplus, A, h, x):
    delta, u, b, _ = x
    d = _softplus(delta) if softplus else delta
    d, du = jax.lax.optimization_barrier((d, d * u))  # or both are computed anew for every state
    return _decay(A, d) * h + du[:, :, None] * b[..., None]


def _readout(h, c):
    # A product of matrices, not a reduction: fused with the step, that would compute each state twice.
    return jnp.einsum("bgnp,bgn->bgp", h, c, precision=jax.lax.Precision.HIGHEST)


def _open_scan(recur, xs, h, steps, transform, collect):
    """The scan with user code in every step; autodiff recomputes each chunk from the state before it."""

    def step(h, x):
        *x, t = x
        h = transform(recur(h, x), t)
        return h, (_readout(h, x[3]), collect(h))

    @jax.checkpoint
    def chunk(h, x):
        return jax.lax.scan(step, h, x, unroll=True)

    h, (y, states) = jax.lax.scan(chunk, h, (*xs, steps))
    return y, states, h


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(softplus, A, delta, u, b, c, h0):
    (y, h_last), _ = _scan_fwd(softplus, A, delta, u, b, c, h0)
    return y, h_last


def _scan_fwd(softplus, A, delta, u, b, c, h0):
    def step(h, x):
        h = _step(softplus, A, h, x)
        return h, _readout(h, x[3])

    def chunk(h, x):
        h_last, y = jax.lax.scan(step, h, x, unroll=True)
        return h_last, (y, h)

    h_last, (y, boundaries) = jax.lax.scan(chunk, h0, (delta, u, b, c))
    return (y, h_last), (A, delta, u, b, c, boundaries)


def _scan_bwd(softplus, residuals, cotangents):
    """Walks back chunk by chunk: first the chunk's states again from its boundary, then the adjoint recurrence.

    With g_t = dloss/dh_t and w_t = g_t * exp(delta_t A), g_t = w_{t+1} + C_t dy_t. Only w is formed: the two sums that
    need g are taken over w and completed below by products that have no state axis.
    """
    A, delta, u, b, c, boundaries = residuals
    dy, dh_last = cotangents
    d = _softplus(delta) if softplus else delta
    du = d * u
    length = d.shape[1]

    def chunk(carry, x):
        w, dA = carry
        *x, boundary, dy = x
        states, decays = [boundary], []
        for t in range(length):
            d, du, b, _ = (v[t] for v in x)
            decays.append(_decay(A, d))
            states.append(decays[t] * states[t] + du[:, :, None] * b[..., None])
        out = []
        for t in reversed(range(length)):
            # Without the barriers XLA shares broadcasts with the recurrence, and writes each out as (B, G, N, P).
            d, du, b, g = jax.lax.optimization_barrier((x[0][t], x[1][t], x[2][t], dy[t]))
            d_du = jnp.sum(w * b[..., None], axis=2)
            d_b = jnp.sum(w * du[:, :, None], axis=3)
            d_c = jnp.sum(states[t + 1] * g[:, :, None], axis=3)
            w = (w + x[3][t][..., None] * dy[t][:, :, None]) * decays[t]
            d_exponent = w * states[t]
            d_d = jnp.sum(jax.lax.optimization_barrier(d_exponent) * A[None], axis=2)
            dA = dA + d_exponent * d[:, :, None]
            out.append((d_d, d_du, d_b, d_c))
        return (w, dA), tuple(jnp.stack(v[::-1]) for v in zip(*out, strict=True))

    carry = (dh_last, jnp.zeros_like(dh_last))
    (dh0, dA), (d_d, d_du, d_b, d_c) = jax.lax.scan(chunk, carry, (d, du, b, c, boundaries, dy), reverse=True)
    d_du = d_du + dy * jnp.sum(b * c, axis=-1, keepdims=True)
    d_b = d_b + c * jnp.sum(dy * du, axis=-1, keepdims=True)
    d_delta = (d_d + d_du * u) * (jax.nn.sigmoid(delta) if softplus else 1.0)
    return jnp.sum(dA, axis=0), d_delta, d_du * d, d_b, d_c, dh0


_scan.defvjp(_scan_fwd, _scan_bwd)
