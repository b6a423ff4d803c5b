"""The scan of kSQ-VMM: rounded u, step sizes, hidden states and y; and how their scales are found."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from ouromamba_jax.baselines.ksq_grids import (
    WIDE,
    Axis,
    best_fraction,
    cosine,
    interval,
    levels_of,
    output_scale,
    round_to,
)
from ouromamba_jax.baselines.scans import RoundedScan, Step, add_skip, read_state, walk_scan
from ouromamba_jax.models.layers import SelectiveScan, merge_groups
from ouromamba_jax.ops.qtensor import MIN_SCALE
from ouromamba_jax.ops.scan import selective_scan
from ouromamba_jax.ops.scan_types import ScanOutput
from ouromamba_jax.quantize.activation import Calibrated


class Factors(NamedTuple):
    """Rank-one scaling of one scan's hidden states: h' = h / (channel (G, E) * token (G, L) * state (G, N))."""

    channel: Float32[Array, "G E"]
    token: Float32[Array, "G L"]
    state: Float32[Array, "G N"]


def reparameterisation(
    over_channels: Float[Array, "G E"], over_tokens: Float[Array, "G L"], over_states: Float[Array, "G N"]
) -> Factors:
    """Factors from the mean magnitude of h along each axis: rep^p + 1e-15.

    p is the share of an axis in the sum of the three standard deviations, so the axis that varies most gives most.
    """
    reps = (over_channels, over_tokens, over_states)
    spread = [jnp.std(rep, axis=1, keepdims=True) for rep in reps]
    total = jnp.maximum(spread[0] + spread[1] + spread[2], MIN_SCALE)
    return Factors(
        *(rep ** jnp.broadcast_to(s / total, rep.shape) + 1e-15 for rep, s in zip(reps, spread, strict=True))
    )


class KSQScan(RoundedScan):
    """A selective scan with rounded u, step sizes, hidden states and y.

    Hidden states are rounded as h' = h / (r_C r_L r_D) and scaled back at once: in exact arithmetic the recurrence on
    h' with the factors moved into exp(delta A), B x and C, which is how the paper runs it. As every token has a scale
    of its own, r_L is part of it: `state_scale` is the scale of h' times r_L.
    """

    def __init__(self, scan: SelectiveScan, scales: dict[str, Array], factors: Factors, bits: int):
        super().__init__(scan, scales["h"], bits)
        self.u_scale = Calibrated(scales["u"])
        self.delta_scale = Calibrated(scales["delta"])
        self.y_scale = Calibrated(scales["y"])
        self.channel_factor = Calibrated(factors.channel)
        self.state_factor = Calibrated(factors.state)

    def scan(self, u, delta, A, B, C, D, *, collect=None, state_transform=None) -> ScanOutput:
        """As `SelectiveScan.scan`."""
        self._check(u)
        u = _round_groups(u, self.u_scale[...], self.bits)
        delta = _round_groups(self.step_sizes(delta), self.delta_scale[...], self.bits)
        out = selective_scan(
            merge_groups(u), merge_groups(delta), A, B, C, collect=collect, state_transform=self._round_states
        )
        y = _round_groups(out.y.reshape(u.shape), self.y_scale[...], self.bits)
        return out._replace(y=add_skip(y, D, u))

    def _round_states(self, h: Float[Array, "B D N"], t: Array) -> Float[Array, "B D N"]:
        at_t = lax.dynamic_index_in_dim(self.state_scale[...], t, axis=1)  # (G, 1)
        channels, states = self.channel_factor[...], self.state_factor[...]
        scale = ((at_t * channels)[..., None] * states[:, None]).reshape(1, *h.shape[1:])
        return levels_of(h, scale, WIDE) * scale


def _round_groups(x: Float[Array, "B L G C"], scale: Float[Array, "G l c"], bits: int) -> Array:
    groups = [round_to(x[:, :, g], scale[g], bits) for g in range(x.shape[2])]
    return jnp.stack(groups, axis=2).astype(x.dtype)


def calibrate_scan(scan: SelectiveScan, u: Array, delta: Array, B: Array, C: Array, *, k: int, bits: int) -> KSQScan:
    """The quantised scan, everything found on the float scan's operands (B, L, G, E) and (B, L, G, N)."""
    _, _, A, _, _, _ = scan.operands(u, delta, B, C)
    sizes = scan.step_sizes(delta)
    y, factors = _mean_states(u, sizes, A, B, C)
    found = {"h": search_state_scales(u, sizes, A, B, C, factors)}
    clustered: tuple[tuple[str, Array, Axis], ...] = (
        ("u", u, "channel"),
        ("delta", sizes, "channel"),
        ("y", y, "token"),
    )
    for name, x, axis in clustered:
        scale = partial(output_scale, axis=axis, k=k, bits=bits, pow2=axis == "token")
        found[name] = jnp.stack([scale(x[:, :, g]) for g in range(scan.directions)])
    return KSQScan(scan, found, factors, bits)


@jax.jit
def _mean_states(u, delta, A, B, C) -> tuple[Array, Factors]:
    """(y without the skip, the factors)."""

    def observe(step: Step):
        size = jnp.mean(jnp.abs(step.h), axis=0)
        return jnp.mean(size, axis=2), jnp.mean(size, axis=1)

    y, _, (channels, states) = walk_scan(u, delta, A, B, C, observe=observe)  # (L, G, E), (L, G, N)
    return y, reparameterisation(jnp.mean(channels, axis=0), jnp.mean(channels, axis=2).T, jnp.mean(states, axis=0))


@jax.jit
def search_state_scales(u, delta, A, B, C, factors: Factors) -> Float32[Array, "G L"]:
    """Calibrated of h / (r_C r_D) after every token, by direction.

    For the largest cosine, over channels, of the next token's y; of the last token's own y at the end.
    """
    rank_one = (factors.channel[:, :, None] * factors.state[:, None])[None]  # (1, G, E, N)

    def search(h: Array, decay: Array, add: Array, C: Array) -> Array:
        scaled = h / rank_one
        start = interval(jnp.max(jnp.abs(scaled), axis=(0, 2, 3)), WIDE)
        exact = read_state(decay * h + add, C)

        def similarity(fraction: Array) -> Array:
            scale = (start * fraction)[None, :, None, None]
            rounded = levels_of(scaled, scale, WIDE) * scale * rank_one
            return jnp.mean(cosine(exact, read_state(decay * rounded + add, C)), axis=0)

        return start * best_fraction(similarity)

    def observe(step: Step):
        return search(step.h_before, step.decay, step.add, step.C)

    _, last, scales = walk_scan(u, delta, A, B, C, observe=observe)  # (L, G), of the state before each token
    last = last.reshape(last.shape[0], *rank_one.shape[1:])
    one, none = jnp.ones_like(last), jnp.zeros_like(last)
    of_last = search(last, one, none, C[:, -1].astype(jnp.float32))
    return jnp.concatenate([scales[1:], of_last[None]]).T
