"""Scans of the rivals: what they keep of the float scan, and the recurrence walked token by token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.quantize.activation import Calibrated, check_tokens


class RoundedScan(SelectiveScan):
    """A float scan with one scale of h per direction and token; a method adds its own and how `scan` runs.

    Args:
      scan: the float scan, whose parameters are shared.
      state_scale: (G, L), for h after every token.
      bits: of what the method rounds at its config's width.
    """

    def __init__(self, scan: SelectiveScan, state_scale: Float[Array, "G L"], bits: int):
        self.bits = bits
        self.directions, self.dtype = scan.directions, scan.dtype
        self.dt_bias, self.A_log, self.D = scan.dt_bias, scan.A_log, scan.D
        self.state_scale = Calibrated(state_scale)

    def _check(self, u: Array) -> None:
        check_tokens(u, self.state_scale.shape[1])


def add_skip(y: Float[Array, "B L G E"], D: Float[Array, " D"], u: Float[Array, "B L G E"]) -> Float[Array, "B L G E"]:
    """y + D u in float32, returned in u's type."""
    return (y + D.reshape(1, 1, *u.shape[2:]) * u.astype(jnp.float32)).astype(u.dtype)


class Step(NamedTuple):
    """Token t's part of the recurrence h = decay * h_before + add; y = <C, h>. decay, add and both states are
    (B, G, E, N), C is (B, G, N)."""

    t: Array
    h_before: Array
    decay: Array
    add: Array
    h: Array
    C: Array


def walk_scan(
    u: Float[Array, "B L G E"],
    delta: Float[Array, "B L G E"],
    A: Float[Array, "D N"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    *,
    round_decay: Callable[[Array], Array] | None = None,
    round_state: Callable[[Array, Array], Array] | None = None,
    collect: Callable[[Array], Any] | None = None,
    observe: Callable[[Step], Any] | None = None,
) -> tuple[Float[Array, "B L G E"], Array, Any]:
    """The selective scan token by token, for methods that round exp(delta A) or look at each state.

    Args:
      delta: step sizes, after bias and softplus.
      round_decay: applied to exp(delta A), (B, G, E, N).
      round_state: (h (B, G, E, N), token index) -> h, applied before the state is read and carried on.
      collect: as in `selective_scan`: reduces the state (B, D, N), stacked over the tokens on axis 1.
      observe: what else to keep of a step before the state is rounded, stacked over the tokens on axis 0.

    Returns:
      (y without the skip D u, the last state (B, D, N), what was collected, or else observed).
    """
    _, length, groups, channels = u.shape

    def flat(h):
        return h.reshape(h.shape[0], -1, h.shape[-1])

    A = A.reshape(1, groups, channels, -1)

    def step(h, xs):
        u, delta, B, C, t = xs
        decay = jnp.exp(delta[..., None] * A)
        decay = decay if round_decay is None else round_decay(decay)
        add = (delta * u)[..., None] * B[:, :, None, :]
        new = decay * h + add
        kept = new if round_state is None else round_state(new, t)
        seen = None if observe is None else observe(Step(t, h, decay, add, new, C))
        if collect is not None:
            seen = collect(flat(kept))
        return kept, (read_state(kept, C), seen)

    inputs = [jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in (u, delta, B, C)]
    start = jnp.zeros((*u.shape[:1], *A.shape[1:]), jnp.float32)
    last, (y, seen) = jax.lax.scan(step, start, (*inputs, jnp.arange(length, dtype=jnp.int32)))
    if collect is not None:
        seen = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), seen)
    return jnp.moveaxis(y, 0, 1), flat(last), seen


def read_state(h: Float[Array, "B G E N"], C: Float[Array, "B G N"]) -> Float[Array, "B G E"]:
    """<C, h>."""
    return jnp.sum(h * C[:, :, None], axis=-1)
