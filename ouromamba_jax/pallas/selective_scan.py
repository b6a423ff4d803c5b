"""The selective scan on NVIDIA GPUs: when it applies, and its two kernels as one differentiable function."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from ouromamba_jax.pallas.device import device_reason
from ouromamba_jax.pallas.scan_operand import Operand, Operands, merged
from ouromamba_jax.pallas.tiles import SCAN_CHANNELS, ScanTiles, scan_tiles

STATES = (1, 8, 16)
MOST_INPUTS = 64
"""Of a product that the scan makes: 16 words of a channel's weights in a thread's registers."""


def unsuitable(*, A: Float[Array, "D N"], state_transform: Any = None, **_: Any) -> str | None:
    """Why the kernels cannot run this call, whatever the device; None if they can."""
    if state_transform is not None:
        return "a state transform runs between the steps, which the kernel takes without a pause"
    if A.shape[1] > STATES[-1]:
        return f"{A.shape[1]} states of a channel do not fit a thread's registers, {STATES[-1]} do"
    return None


def supports(**call: Any) -> str | None:
    """Why this call cannot run here, from shapes, None-ness and the device; None if it can."""
    return unsuitable(**call) or device_reason()


# Blocks of the same shapes share one lowering of a kernel, which takes a second.
@partial(jax.jit, static_argnames=("delta_softplus", "reverse", "with_starts", "tiles", "interpret"))
def run(
    u: Operands,
    delta: Operands,
    A: Float[Array, "D N"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    D: Float[Array, " D"] | None = None,
    *,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " D"] | None = None,
    delta_softplus: bool = False,
    h0: Float[Array, "B D N"] | None = None,
    reverse: bool = False,
    with_starts: bool = False,
    tiles: ScanTiles | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "B L D"], Float32[Array, "B D N"], Float32[Array, "B chunks D N"] | None]:
    """y, the last state and, `with_starts`, the states before the chunks of every segment; reverse-differentiable.

    States are padded to 1, 8 or 16. `tiles` are `tiles_for(A, B)` if None. y has u's type, or B's where u is levels.
    """
    states = B.shape[3]
    spare = next(n for n in STATES if n >= states) - states

    def pad(x):
        return None if x is None else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)]) if spare else x

    def f32(x):
        return None if x is None else x.astype(jnp.float32)

    y, h_last, starts = _segments(
        _Options(delta_softplus, reverse, with_starts, tiles or tiles_for(A, B), interpret),
        u, delta, pad(f32(A)), pad(B), pad(C), f32(D), z, f32(delta_bias), pad(f32(h0)),
    )  # fmt: skip
    return y, h_last[..., :states], None if starts is None else jnp.swapaxes(starts, 2, 3)[..., :states]


def tiles_for(A: Float[Array, "D N"], B: Float[Array, "B L G N"]) -> ScanTiles:
    """The tiles of a call."""
    (channels, states), (batch, length, groups, _) = A.shape, B.shape
    blocks = groups * -(-channels // (groups * SCAN_CHANNELS))
    return scan_tiles(next(n for n in STATES if n >= states), batch * blocks, length)


def _segments(options, *arguments):
    """All segments at once, as samples of a larger batch, first from zeros, then from the states that this leaves.

    A segment's last state is linear in its first: the factor is exp(A sum(step sizes)).
    """
    count = options.tiles.segments
    if count == 1:
        return _scan(options, *arguments)
    u, delta, A, B, C, D, z, delta_bias, h0 = arguments
    batch, length = B.shape[:2]

    def cut(x):
        return None if x is None else x.reshape(batch * count, length // count, *x.shape[2:])

    def cut_operand(x):
        scale = None if x.scale is None else x.scale.reshape(count, length // count)
        if x.route is not None or x.rule is not None:
            return replace(x, segments=count)
        return Operand(cut(x.low), cut(x.high), scale)

    def by_segment(x):
        return jnp.moveaxis(x.reshape(batch, count, *x.shape[1:]), 1, 0)

    u, delta = (tuple(map(cut_operand, x)) for x in (u, delta))
    tokens = u, delta, A, cut(B), cut(C), D, cut(z), delta_bias
    steps, h = _ends(options._replace(with_starts=False), *tokens[:5], delta_bias)
    decay = jnp.exp(steps[:, :, None] * A[None])

    def follow(first, segment):
        last, decay = segment
        return last + decay * first, first

    segments = by_segment(h), by_segment(decay)
    h0 = jnp.zeros((batch, *A.shape), jnp.float32) if h0 is None else h0
    h_last, first = jax.lax.scan(follow, h0, segments, reverse=options.reverse, unroll=True)  # a few additions
    y, _, starts = _scan(options, *tokens, jnp.moveaxis(first, 0, 1).reshape(h.shape))
    if starts is not None:
        starts = starts.reshape(batch, count, *starts.shape[1:])
        starts = jnp.flip(starts, 1) if options.reverse else starts  # in scan order, as each segment's are
        starts = starts.reshape(batch, -1, *starts.shape[3:])
    return y.reshape(batch, length, -1), h_last, starts


class _Options(NamedTuple):
    softplus: bool
    reverse: bool
    with_starts: bool
    tiles: ScanTiles
    interpret: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, *arguments):
    return _launch(options, arguments, options.tiles.chunk if options.with_starts else None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ends(options, *arguments):
    """(sum of the step sizes, last state) of every segment; nothing else is written."""
    *tokens, delta_bias = arguments
    steps, h_last, _ = _launch(options, (*tokens, None, None, delta_bias, None), None, ends=True)
    return steps, h_last


def _ends_by_scan(options, *arguments):
    """The same, from what can be differentiated."""
    *tokens, delta_bias = arguments
    _, h_last, _ = _scan(options, *tokens, None, None, delta_bias, None)
    steps = merged(tokens[1]).astype(jnp.float32)
    steps = steps if delta_bias is None else steps + delta_bias[None, None]
    steps = jax.nn.softplus(steps) if options.softplus else steps
    return jnp.sum(steps, axis=1), h_last


def _ends_fwd(options, *arguments):
    return jax.vjp(partial(_ends_by_scan, options), *arguments)


def _ends_bwd(options, pull_back, cotangents):
    return pull_back(cotangents)


_ends.defvjp(_ends_fwd, _ends_bwd)


def _launch(options, arguments, chunk, *, ends=False):
    # Imported here: Mosaic takes a while, and most processes never run a kernel.
    from ouromamba_jax.pallas.selective_scan_forward import forward

    u, delta, A, B, C, D, z, delta_bias, h0 = arguments
    return forward(
        u, delta, A, B, C, D, z=z, delta_bias=delta_bias, h0=h0,
        delta_softplus=options.softplus, reverse=options.reverse, chunk=chunk, ends=ends,
        interpret=options.interpret,
    )  # fmt: skip


def _scan_fwd(options, *arguments):
    y, h_last, starts = _launch(options, arguments, options.tiles.chunk)
    return (y, h_last, starts if options.with_starts else None), (arguments, starts)


def _scan_bwd(options, residuals, cotangents):
    from ouromamba_jax.pallas.selective_scan_backward import backward

    (u, delta, A, B, C, D, z, delta_bias, h0), starts = residuals
    (u, delta), pull_back = jax.vjp(lambda *x: tuple(map(merged, x)), u, delta)
    groups, channels = B.shape[2], A.shape[0] // B.shape[2]

    def by_group(x, axis, size):
        return x.reshape(*x.shape[:axis], groups, size, *x.shape[axis + 1 :])

    def pad(x, axis):
        """Its groups to whole programs' channels."""
        if x is None or channels % SCAN_CHANNELS == 0:
            return x
        axis = axis % x.ndim
        widths = [(0, -channels % SCAN_CHANNELS if i == axis + 1 else 0) for i in range(x.ndim + 1)]
        return jnp.pad(by_group(x, axis, channels), widths).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def crop(x, axis):
        if x is None or channels % SCAN_CHANNELS == 0:
            return x
        axis = axis % x.ndim
        split = by_group(x, axis, x.shape[axis] // groups)
        whole = jax.lax.slice_in_dim(split, 0, channels, axis=axis + 1)
        return whole.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    dy, dh_last, d_starts = cotangents
    d = backward(
        pad(u, -1), pad(delta, -1), pad(A, 0), B, C, pad(D, -1), pad(starts, -1), pad(dy, -1), pad(dh_last, 1),
        pad(d_starts, -1), z=pad(z, -1), delta_bias=pad(delta_bias, -1),
        delta_softplus=options.softplus, reverse=options.reverse, tiles=options.tiles, interpret=options.interpret,
    )  # fmt: skip
    d_u, d_delta = pull_back((crop(d.u, -1), crop(d.delta, -1)))
    d_B, d_C = d.B.astype(B.dtype), d.C.astype(C.dtype)
    d_h0 = None if h0 is None else crop(d.h0, 1)
    return d_u, d_delta, crop(d.A, 0), d_B, d_C, crop(d.D, -1), crop(d.z, -1), crop(d.delta_bias, -1), d_h0


_scan.defvjp(_scan_fwd, _scan_bwd)
