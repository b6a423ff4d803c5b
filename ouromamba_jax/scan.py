"""The selective scan of Mamba (Gu and Dao, 2023, section 3.2): the XLA implementation and the choice of a backend.

h_t = exp(delta_t * A) * h_{t-1} + (delta_t * B_t) * u_t ;    y_t = (<C_t, h_t> + D * u_t) * silu(z_t)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ouromamba_jax.pallas import selective_scan as kernel
from ouromamba_jax.pallas.dispatch import Backend, choose
from ouromamba_jax.split_operand import SplitOperand, floats

Collect = Callable[[Float[Array, "B D N"]], PyTree]
StateTransform = Callable[[Float[Array, "B D N"], Int[Array, ""]], Float[Array, "B D N"]]

# Steps between two saved states, one loop body. With 4, XLA's CPU threads idle between the steps (1.6x slower);
# 16 is no faster and takes almost twice as long to compile.
MAX_CHUNK = 8


class ScanOutput(NamedTuple):
    """What a selective scan returns: ``y (B, L, D)``, ``h_last (B, D, N)`` float32, and ``states``.

    ``states`` is what ``collect`` returned for each step, stacked on axis 1 in scan order, or None without ``collect``.
    """

    y: Float[Array, "B L D"]
    h_last: Float[Array, "B D N"]
    states: PyTree


def selective_scan(
    u: Float[Array, "B L D"] | SplitOperand,
    delta: Float[Array, "B L D"] | SplitOperand,
    A: Float[Array, "D N"],
    B: Float[Array, "B L N"] | Float[Array, "B L G N"] | SplitOperand,
    C: Float[Array, "B L N"] | Float[Array, "B L G N"] | SplitOperand,
    D: Float[Array, "D"] | None = None,
    *,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, "D"] | None = None,
    delta_softplus: bool = False,
    h0: Float[Array, "B D N"] | None = None,
    reverse: bool = False,
    collect: Collect | None = None,
    state_transform: StateTransform | None = None,
    implementation: str | None = None,
) -> ScanOutput:
    """Runs the selective state-space recurrence over the tokens of a sequence.

    The step sizes are ``delta + delta_bias``, through a softplus if ``delta_softplus``. They, ``exp(delta * A)`` and
    the state are float32 whatever the inputs are. Gradients reach every array in reverse mode; the backward pass keeps
    one state per chunk of up to 8 tokens and recomputes the others.

    A `SplitOperand` is merged into floats first, unless the backend reads its levels.

    Args:
        u: input, ``(B, L, D)``.
        delta: step sizes, ``(B, L, D)``.
        A: decay rates, ``(D, N)``, negative in a trained model.
        B: input projections, ``(B, L, N)``, or ``(B, L, G, N)`` for D channels in G equal groups, group-major.
        C: output projections, of B's shape.
        D: skip weights, ``(D,)``.
        z: gate, ``(B, L, D)``.
        delta_bias: added to delta before the softplus, ``(D,)``.
        delta_softplus: whether the step sizes pass through a softplus.
        h0: state before the first step, ``(B, D, N)``; zeros if None.
        reverse: scan from the last token to the first. ``y`` keeps its positions.
        collect: reduces the state ``(B, D, N)`` after each step to a pytree of arrays with leading axis B. It runs
            inside the scan, so that the ``(L, D, N)`` states exist only if it returns them.
        state_transform: ``(h, t) -> h`` applied to the state after each step, ``t`` the int32 index in scan order.
        implementation: a backend's name; None takes the first one that supports the call.

    Returns:
        ``ScanOutput(y, h_last, states)``, ``y`` in u's dtype, ``states`` in scan order (index 0 is the first step).

    Raises:
        ValueError: shapes that do not fit, an unknown implementation, or a named one that does not support the call.
        TypeError: an input that is not of a floating dtype.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, h0)
    if B.ndim == 3:
        B, C = (x.reshape(*x.shape[:2], 1, -1) for x in (B, C))
    call = dict(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus, h0=h0,
        reverse=reverse, collect=collect, state_transform=state_transform,
    )  # fmt: skip
    return choose("scan", BACKENDS, implementation, **call).run(**call)


def _check(u, delta, A, B, C, D, z, delta_bias, h0) -> None:
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(f"u must be (B, L, D) with no empty axis, but it is {u.shape}.")
    if A.ndim != 2:
        raise ValueError(f"A must be (D, N) = ({u.shape[-1]}, N), but it is {A.shape}.")
    (batch, length, channels), d_state = u.shape, A.shape[1]
    if B.ndim not in (3, 4) or (B.ndim == 4 and (B.shape[2] == 0 or channels % B.shape[2])):
        raise ValueError(
            f"B must be (B, L, N), or (B, L, G, N) with G dividing the {channels} channels, but it is {B.shape}."
        )
    projection = (batch, length, *B.shape[2:-1], d_state)
    wanted = {
        "delta": (delta, u.shape), "A": (A, (channels, d_state)), "B": (B, projection), "C": (C, projection),
        "D": (D, (channels,)), "z": (z, u.shape), "delta_bias": (delta_bias, (channels,)),
        "h0": (h0, (batch, channels, d_state)),
    }  # fmt: skip
    for name, (array, shape) in {"u": (u, u.shape), **wanted}.items():
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(
                f"{name} must be {shape} to go with u {u.shape}, A {A.shape} and B {B.shape}, but it is {array.shape}."
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be of a floating dtype, but it is {array.dtype}; cast it first.")
        groups = B.shape[2] if B.ndim == 4 else 1
        if isinstance(array, SplitOperand) and len(array.splits) != groups:
            raise ValueError(f"{name} must be split in {groups} groups, as many as B has, not in {len(array.splits)}.")


# Inside, arrays are time-major, in scan order and cut in chunks: d = delta and du = delta * u are (chunks, K, B, G, P)
# with P = D / G; b and c (chunks, K, B, G, N). The state is (B, G, N, P): channels last fill the vector units, and a
# group's B and C broadcast over them.


def _xla(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0, reverse, collect, state_transform) -> ScanOutput:
    (batch, length, channels), (groups, d_state) = u.shape, B.shape[2:]
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    u, delta, B, C = map(floats, (u, delta, B, C))
    step_size = f32(delta) if delta_bias is None else f32(delta) + f32(delta_bias)[None, None]
    if delta_softplus:
        step_size = jax.nn.softplus(step_size)
    n_chunks = -(-length // MAX_CHUNK)
    chunk = -(-length // n_chunks)

    def to_chunks(x):  # the padding steps have delta = 0: they leave the state as it is
        x = jnp.flip(x, 1) if reverse else x
        x = jnp.pad(x.reshape(batch, length, groups, -1), ((0, 0), (0, n_chunks * chunk - length), (0, 0), (0, 0)))
        return x.swapaxes(0, 1).reshape(n_chunks, chunk, *x.shape[:1], *x.shape[2:])

    def from_chunks(x):
        return x.reshape(n_chunks * chunk, *x.shape[2:])[:length].swapaxes(0, 1)

    def to_state(h):
        return h.reshape(*h.shape[:-2], groups, channels // groups, d_state).swapaxes(-1, -2)

    def from_state(h):
        return h.swapaxes(-1, -2).reshape(batch, channels, d_state)

    xs = tuple(map(to_chunks, (step_size, step_size * f32(u), f32(B), f32(C))))
    h = jnp.zeros((batch, groups, d_state, channels // groups), jnp.float32) if h0 is None else to_state(f32(h0))
    if collect is None and state_transform is None:
        y, h = _scan(to_state(f32(A)), *xs, h)
        states = None
    else:
        steps = jnp.arange(n_chunks * chunk, dtype=jnp.int32).reshape(n_chunks, chunk)

        def transform(h, t):
            if state_transform is None:
                return h
            return jnp.where(t < length, to_state(state_transform(from_state(h), t)), h)  # padding is not transformed

        y, states, h = _open_scan(
            to_state(f32(A)), xs, h, steps, transform, lambda h: None if collect is None else collect(from_state(h))
        )
        states = jax.tree.map(from_chunks, states)
    y = from_chunks(y).reshape(u.shape)
    y = jnp.flip(y, 1) if reverse else y
    if D is not None:
        y = y + f32(D)[None, None] * f32(u)
    if z is not None:
        y = y * jax.nn.silu(f32(z))
    return ScanOutput(y.astype(u.dtype), from_state(h), states)


def _decay(A, d):
    return jnp.exp(d[:, :, None] * A[None])


def _step(A, h, x):
    d, du, b, _ = x
    return _decay(A, d) * h + du[:, :, None] * b[..., None]


@jax.custom_vjp
def _readout(h, c):
    """<C, h>, one state index after the other.

    Not ``jnp.sum``: XLA's CPU backend picks the order of a reduction by the size of the array, and a sample's bits
    would change with the batch. The VJP is the broadcast that autodiff would build from one padding per state index.
    """
    y = h[:, :, 0] * c[:, :, 0, None]
    for n in range(1, h.shape[2]):
        y = y + h[:, :, n] * c[:, :, n, None]
    return y


def _readout_fwd(h, c):
    return _readout(h, c), (h, c)


def _readout_bwd(residuals, g):
    h, c = residuals
    return c[..., None] * g[:, :, None], jnp.sum(h * g[:, :, None], axis=3)


_readout.defvjp(_readout_fwd, _readout_bwd)


def _open_scan(A, xs, h, steps, transform, collect):
    """The scan with user code in every step; autodiff recomputes each chunk from the state before it."""

    def step(h, x):
        *x, t = x
        h = transform(_step(A, h, x), t)
        return h, (_readout(h, x[3]), collect(h))

    @jax.checkpoint
    def chunk(h, x):
        return jax.lax.scan(step, h, x, unroll=True)

    h, (y, states) = jax.lax.scan(chunk, h, (*xs, steps))
    return y, states, h


@jax.custom_vjp
def _scan(A, d, du, b, c, h0):
    (y, h_last), _ = _scan_fwd(A, d, du, b, c, h0)
    return y, h_last


def _scan_fwd(A, d, du, b, c, h0):
    def step(h, x):
        h = _step(A, h, x)
        return h, _readout(h, x[3])

    def chunk(h, x):
        h_last, y = jax.lax.scan(step, h, x, unroll=True)
        return h_last, (y, h)

    h_last, (y, boundaries) = jax.lax.scan(chunk, h0, (d, du, b, c))
    return (y, h_last), (A, d, du, b, c, boundaries)


def _scan_bwd(residuals, cotangents):
    """Walks back chunk by chunk: first the chunk's states again from its boundary, then the adjoint recurrence.

    With g_t = dloss/dh_t and w_t = g_t * exp(delta_t A), g_t = w_{t+1} + C_t dy_t. Only w is formed: the two sums that
    need g are taken over w and completed below by products that have no state axis.
    """
    A, d, du, b, c, boundaries = residuals
    dy, dh_last = cotangents
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
    return jnp.sum(dA, axis=0), d_d, d_du, d_b, d_c, dh0


_scan.defvjp(_scan_fwd, _scan_bwd)


def _mosaic_gpu(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0, reverse, collect, state_transform, **options
) -> ScanOutput:
    """The GPU kernels. They save the state of every few steps; those between are only for `collect`, walked by XLA.

    Levels are int8 unless a token has shifted outliers. Then the kernel takes all of them in float32: the arithmetic is
    the same, so a sample's result does not depend on its batch mates.
    """
    u, delta, B, C = (x if isinstance(x, SplitOperand) and x.has_levels else floats(x) for x in (u, delta, B, C))
    split = [x for x in (u, delta, B, C) if isinstance(x, SplitOperand)]

    def run(dtype):
        def levels(x):
            return x.levels(dtype) if isinstance(x, SplitOperand) else x

        scales = kernel.Scales(*(x.steps if isinstance(x, SplitOperand) else None for x in (u, delta, B, C)))
        return kernel.run(
            levels(u), levels(delta), A, levels(B), levels(C), D, z=z, delta_bias=delta_bias,
            delta_softplus=delta_softplus, h0=h0, reverse=reverse, with_starts=collect is not None, scales=scales,
            **options,
        )  # fmt: skip

    if split:
        unshifted = jnp.all(jnp.stack([x.unshifted() for x in split]))
        y, h_last, starts = jax.lax.cond(unshifted, lambda: run(jnp.int8), lambda: run(jnp.float32))
    else:
        y, h_last, starts = run(None)
    y = y.astype(u.dtype)
    if starts is None:
        return ScanOutput(y, h_last, None)
    u, delta, B = map(floats, (u, delta, B))
    batch, length, _ = u.shape
    tiles = options.get("tiles") or kernel.tiles_for(u, A, B)
    length //= tiles.segments

    def to_chunks(x):
        x = jnp.flip(x, 1) if reverse else x
        x = x.reshape(batch, tiles.segments, length, *x.shape[2:])
        x = jnp.pad(x, [(0, -length % tiles.chunk if axis == 2 else 0) for axis in range(x.ndim)])
        return x.reshape(batch, -1, tiles.chunk, *x.shape[3:])

    def from_chunks(x):
        x = x.reshape(batch, tiles.segments, -1, *x.shape[3:])[:, :, :length]
        return x.reshape(batch, -1, *x.shape[3:])

    def walk(chunk, h0):
        u, delta, B = chunk
        return _xla(
            u, delta, A, B, B, None, None, delta_bias, delta_softplus, h0, False, collect, None
        ).states  # its y is not used

    states = jax.vmap(walk, in_axes=1, out_axes=1)(jax.tree.map(to_chunks, (u, delta, B)), starts)
    return ScanOutput(y, h_last, jax.tree.map(from_chunks, states))


# In order of preference; B and C come grouped. "xla" supports every call. "mosaic_gpu" compiles for GPUs but has not
# run on one yet: only its name chooses it.
BACKENDS: dict[str, Backend] = {
    "xla": Backend(supports=lambda **call: None, run=_xla),
    "mosaic_gpu": Backend(kernel.supports, _mosaic_gpu),
}
