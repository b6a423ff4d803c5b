"""The selective scan on NVIDIA GPUs: when it applies, and its two kernels as one differentiable function."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Shaped

from ouromamba_jax.pallas.device import device_reason
from ouromamba_jax.pallas.tiles import SCAN_CHANNELS, ScanTiles, scan_tiles

STATES = (1, 8, 16)

Wide = Float[Array, "B L D"] | Int8[Array, "B L D"] | tuple[Float[Array, "B L E"] | Int8[Array, "B L E"], ...]
"""Values of every channel, as one array or as one for each group."""


PerGroup = Shaped[Array, "B L G"] | tuple[Shaped[Array, "B L"], ...]
"""A number per sample, token and group, as one array or as one for each group."""


class Step(NamedTuple):
    """What the levels of an input stand for: size * level.

    u and delta can have outliers in units of their own, size * (level + 2^shift * far). They are `Planes` then: far is
    read where shift is not 0.
    """

    size: PerGroup
    far: Wide | None = None
    shift: PerGroup | None = None


class Steps(NamedTuple):
    """The steps of inputs that are levels; None for the others."""

    u: Step | None = None
    delta: Step | None = None
    B: Step | None = None
    C: Step | None = None


def parts(x: Wide) -> tuple[Array, ...]:
    """The arrays: one, or one for each group."""
    return x if isinstance(x, tuple) else (x,)


def joined(x: Wide) -> Float[Array, "B L D"] | Int8[Array, "B L D"]:
    """All groups side by side."""
    return jnp.concatenate(x, axis=2) if isinstance(x, tuple) else x


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
    u: Wide,
    delta: Wide,
    A: Float[Array, "D N"],
    B: Float[Array, "B L G N"] | Int8[Array, "B L G N"],
    C: Float[Array, "B L G N"] | Int8[Array, "B L G N"],
    D: Float[Array, " D"] | None = None,
    *,
    z: Float[Array, "B L D"] | None = None,
    delta_bias: Float[Array, " D"] | None = None,
    delta_softplus: bool = False,
    h0: Float[Array, "B D N"] | None = None,
    reverse: bool = False,
    with_starts: bool = False,
    levels: Steps | None = None,
    tiles: ScanTiles | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "B L D"], Float32[Array, "B D N"], Float32[Array, "B chunks D N"] | None]:
    """y, the last state and, `with_starts`, the states before the chunks of every segment; reverse-differentiable.

    Groups are padded to a multiple of 128 channels, and states to 1, 8 or 16. `tiles` are `tiles_for(A, B)` if None.
    y has u's type, float32 for int8.
    """
    groups, states = B.shape[2:]
    channels = A.shape[0] // groups
    more = -channels % SCAN_CHANNELS
    spare = next(n for n in STATES if n >= states) - states

    def pad(x, *, channel_axis=None, state_axis=None):
        if x is None:
            return None
        if isinstance(x, tuple):
            whole = channels + more  # which planes have already
            return tuple(part if part.shape[2] == whole else pad(part, channel_axis=channel_axis) for part in x)
        if channel_axis is not None and more:
            split = x.reshape(*x.shape[:channel_axis], -1, channels, *x.shape[channel_axis + 1 :])
            padded = jnp.pad(split, [(0, more if i == channel_axis + 1 else 0) for i in range(split.ndim)])
            x = padded.reshape(*x.shape[:channel_axis], -1, *x.shape[channel_axis + 1 :])
        if state_axis is not None and spare:
            x = jnp.pad(x, [(0, spare if i == state_axis else 0) for i in range(x.ndim)])
        return x

    def crop(x, *, channel_axis, states_too=False):
        split = x.reshape(*x.shape[:channel_axis], groups, channels + more, *x.shape[channel_axis + 1 :])
        x = jax.lax.slice_in_dim(split, 0, channels, axis=channel_axis + 1)
        x = x.reshape(*x.shape[:channel_axis], groups * channels, *x.shape[channel_axis + 2 :])
        return x[..., :states] if states_too else x

    def f32(x):
        return None if x is None else x.astype(jnp.float32)

    def pad_far(step):
        return None if step is None else step._replace(far=pad(step.far, channel_axis=2))

    y, h_last, starts = _segments(
        _Options(delta_softplus, reverse, with_starts, tiles or tiles_for(A, B), interpret),
        pad(u, channel_axis=2),
        pad(delta, channel_axis=2),
        pad(f32(A), channel_axis=0, state_axis=1),
        pad(B, state_axis=3),
        pad(C, state_axis=3),
        pad(f32(D), channel_axis=0),
        pad(z, channel_axis=2),
        pad(f32(delta_bias), channel_axis=0),
        pad(f32(h0), channel_axis=1, state_axis=2),
        Steps(*map(pad_far, levels or Steps())),
    )
    if starts is not None:
        starts = crop(jnp.swapaxes(starts, 2, 3), channel_axis=2, states_too=True)
    return crop(y, channel_axis=2), crop(h_last, channel_axis=1, states_too=True), starts


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
    u, delta, A, B, C, D, z, delta_bias, h0, levels = arguments
    batch, length = B.shape[:2]

    def cut(x):
        return jax.tree.map(lambda x: x.reshape(batch * count, length // count, *x.shape[2:]), x)

    def by_segment(x):
        return jnp.moveaxis(x.reshape(batch, count, *x.shape[1:]), 1, 0)

    tokens = cut(u), cut(delta), A, cut(B), cut(C), D, cut(z), delta_bias
    cut_levels = cut(levels)
    _, h, _ = _scan(options._replace(with_starts=False), *tokens[:5], None, None, delta_bias, None, cut_levels)
    steps = _scaled(delta, levels.delta).astype(jnp.float32)
    steps = steps if delta_bias is None else steps + delta_bias[None, None]
    steps = jax.nn.softplus(steps) if options.softplus else steps
    decay = jnp.exp(jnp.sum(cut(steps), axis=1)[:, :, None] * A[None])

    def follow(first, segment):
        last, decay = segment
        return last + decay * first, first

    segments = by_segment(h), by_segment(decay)
    h0 = jnp.zeros((batch, *A.shape), jnp.float32) if h0 is None else h0
    h_last, first = jax.lax.scan(follow, h0, segments, reverse=options.reverse, unroll=True)  # a few additions
    y, _, starts = _scan(options, *tokens, jnp.moveaxis(first, 0, 1).reshape(h.shape), cut_levels)
    if starts is not None:
        starts = starts.reshape(batch, count, *starts.shape[1:])
        starts = jnp.flip(starts, 1) if options.reverse else starts  # in scan order, as each segment's are
        starts = starts.reshape(batch, -1, *starts.shape[3:])
    return y.reshape(batch, length, -1), h_last, starts


def _scaled(x, step):
    """An input in floats, its groups side by side."""
    x = joined(x)
    if step is None:
        return x

    def stacked(numbers):
        return jnp.stack(numbers, axis=2) if isinstance(numbers, tuple) else numbers

    size = stacked(step.size)

    def by_group(levels):
        return levels.astype(jnp.float32).reshape(*size.shape, -1)

    value = by_group(x) * size[..., None]
    if step.far is not None:
        shift = stacked(step.shift)
        far = jnp.where(shift[..., None] > 0, by_group(joined(step.far)), 0.0)
        value = value + far * jnp.ldexp(size, shift)[..., None]
    return value.reshape(x.shape)


class _Options(NamedTuple):
    softplus: bool
    reverse: bool
    with_starts: bool
    tiles: ScanTiles
    interpret: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, *arguments):
    return _launch(options, arguments, options.tiles.chunk if options.with_starts else None)


def _launch(options, arguments, chunk):
    # Imported here: Mosaic takes a while, and most processes never run a kernel.
    from ouromamba_jax.pallas.selective_scan_forward import forward

    u, delta, A, B, C, D, z, delta_bias, h0, levels = arguments
    return forward(
        u, delta, A, B, C, D, z=z, delta_bias=delta_bias, h0=h0, levels=levels,
        delta_softplus=options.softplus, reverse=options.reverse, chunk=chunk, interpret=options.interpret,
    )  # fmt: skip


def _scan_fwd(options, *arguments):
    y, h_last, starts = _launch(options, arguments, options.tiles.chunk)
    return (y, h_last, starts if options.with_starts else None), (arguments, starts)


def _scan_bwd(options, residuals, cotangents):
    from ouromamba_jax.pallas.selective_scan_backward import backward

    (u, delta, A, B, C, D, z, delta_bias, h0, levels), starts = residuals
    (u, delta, B, C), pull_back = jax.vjp(lambda *x: tuple(map(_scaled, *x)), (u, delta, B, C), levels)
    d = backward(
        u, delta, A, B, C, D, starts, *cotangents, z=z, delta_bias=delta_bias,
        delta_softplus=options.softplus, reverse=options.reverse, tiles=options.tiles, interpret=options.interpret,
    )  # fmt: skip
    (d_u, d_delta, d_B, d_C), d_levels = pull_back((d.u, d.delta, d.B.astype(B.dtype), d.C.astype(C.dtype)))
    return d_u, d_delta, d.A, d_B, d_C, d.D, d.z, d.delta_bias, None if h0 is None else d.h0, d_levels


_scan.defvjp(_scan_fwd, _scan_bwd)
