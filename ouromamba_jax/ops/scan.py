"""The selective scan of Mamba (Gu and Dao, 2023, section 3.2), its arguments checked, by the backend that suits it.

h_t = exp(delta_t * A) * h_{t-1} + (delta_t * B_t) * u_t ;    y_t = (<C_t, h_t> + D * u_t) * silu(z_t)
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ouromamba_jax.ops import scan_mosaic, scan_xla
from ouromamba_jax.ops.dispatch import Backend, choose
from ouromamba_jax.ops.meshes import by_samples
from ouromamba_jax.ops.scan_types import Collect, Routed, ScanOutput, StateTransform, Unsplit, Wide, floats
from ouromamba_jax.ops.split import Split
from ouromamba_jax.ops.straight_through import straight_through
from ouromamba_jax.pallas import selective_scan as kernel


def selective_scan(
    u: Wide,
    delta: Wide,
    A: Float[Array, "D N"],
    B: Float[Array, "B L N"] | Float[Array, "B L G N"],
    C: Float[Array, "B L N"] | Float[Array, "B L G N"],
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

    The step sizes are `delta + delta_bias`, through a softplus if `delta_softplus`. They, `exp(delta * A)` and
    the state are float32 whatever the inputs are. Gradients reach every array in reverse mode; the backward pass keeps
    one state per chunk of up to 8 tokens and recomputes the others. Second derivatives need implementation="xla".

    Args:
      u: input, (B, L, D); or a tuple of G arrays (B, L, D / G), `Split`, `Unsplit` or `Routed`, one for each group of
        channels in order, which GPU kernels read where they lie, and levels as levels.
      delta: step sizes, as u.
      A: decay rates, (D, N), negative in a trained model.
      B: input projections, (B, L, N), or (B, L, G, N) for D channels in G equal groups, group-major.
      C: output projections, of B's shape.
      D: skip weights, (D,).
      z: gate, (B, L, D).
      delta_bias: added to delta before the softplus, (D,).
      delta_softplus: whether the step sizes pass through a softplus.
      h0: state before the first step, (B, D, N); zeros if None.
      reverse: scan from the last token to the first. `y` keeps its positions.
      collect: reduces the state (B, D, N) after each step to a pytree of arrays with leading axis B. It runs
        inside the scan, so that the (L, D, N) states exist only if it returns them.
      state_transform: `(h, t) -> h` applied to the state after each step, `t` the int32 index in scan order.
      implementation: a backend's name; None takes the first one that supports the call.

    Returns:
      `ScanOutput(y, h_last, states)`, `y` in u's dtype, or B's if u is split, `states` in scan order (index 0 is the
      first step).

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, or a named one that does not support the call.
      TypeError: an input that is not of a floating dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> u, A, B = jnp.ones((1, 3, 2)), -jnp.ones((2, 4)), jnp.ones((1, 3, 4))
      >>> out = om.selective_scan(u, u, A, B, B, collect=lambda h: h)
      >>> [round(y, 2) for y in out.y[0, :, 0].tolist()]
      [4.0, 5.47, 6.01]
      >>> out.states.shape
      (1, 3, 2, 4)
    """
    _check(u, delta, A, B, C, D, z, delta_bias, h0)
    if B.ndim == 3:
        B, C = (x.reshape(*x.shape[:2], 1, -1) for x in (B, C))
    arrays = dict(delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, h0=h0)
    options: dict[str, Any] = dict(
        delta_softplus=delta_softplus, reverse=reverse, collect=collect, state_transform=state_transform
    )
    backend = choose("scan", BACKENDS, implementation, u=u, **arrays, **options)

    def run(u: Wide, arrays: dict[str, Any]) -> ScanOutput:
        return backend.run(u=u, **arrays, **options)

    def smooth(u: Wide, arrays: dict[str, Any]) -> ScanOutput:
        u, delta = (floats(x, B.dtype) for x in (u, arrays["delta"]))
        return selective_scan(u, **{**arrays, "delta": delta}, **options)

    # Of floats, every backend has derivatives of its own.
    is_float = backend is BACKENDS["xla"] or not any(isinstance(x, tuple) for x in (u, delta))
    return by_samples(run if is_float else straight_through(run, smooth), u, arrays)


def _check(u, delta, A, B, C, D, z, delta_bias, h0) -> None:
    if A.ndim != 2:
        raise ValueError(f"A must be (D, N), but it is {A.shape}.")
    if B.ndim not in (3, 4) or (B.ndim == 4 and (B.shape[2] == 0 or A.shape[0] % B.shape[2])):
        raise ValueError(
            f"B must be (B, L, N), or (B, L, G, N) with G dividing the {A.shape[0]} channels, but it is {B.shape}."
        )
    groups = B.shape[2] if B.ndim == 4 else 1
    shapes = {name: _shape(name, x, groups) for name, x in (("u", u), ("delta", delta))}
    whole = shapes["u"]
    if len(whole) != 3 or 0 in whole:
        raise ValueError(f"u must be (B, L, D) with no empty axis, but it is {whole}.")
    (batch, length, channels), d_state = whole, A.shape[1]
    projection = (batch, length, *B.shape[2:-1], d_state)
    wanted = {
        "delta": whole, "A": (channels, d_state), "B": projection, "C": projection, "D": (channels,), "z": whole,
        "delta_bias": (channels,), "h0": (batch, channels, d_state),
    }  # fmt: skip
    given = {"A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias, "h0": h0}
    shapes |= {name: x.shape for name, x in given.items() if x is not None}
    for name, shape in shapes.items():
        if shape != wanted.get(name, whole):
            raise ValueError(
                f"{name} must be {wanted[name]} to go with u {whole}, A {A.shape} and B {B.shape}, but it is {shape}."
            )
    arrays = [(name, part) for name, x in (("u", u), ("delta", delta)) for part in (x if isinstance(x, tuple) else [x])]
    for name, x in arrays + list(given.items()):
        if not isinstance(x, Split | Unsplit | Routed | None) and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be of a floating dtype, but it is {x.dtype}; cast it first.")


def _shape(name: str, x: Wide, groups: int) -> tuple[int, ...]:
    """Of all groups together."""
    if not isinstance(x, tuple):
        return x.shape
    if len(x) != groups or len({part.shape for part in x}) != 1:
        raise ValueError(f"{name} must be {groups} parts of one shape, as many as B has groups, not {len(x)}.")
    return (*x[0].shape[:2], groups * x[0].shape[2])


def _xla(u, delta, B, **call) -> ScanOutput:
    return scan_xla.run(u=floats(u, B.dtype), delta=floats(delta, B.dtype), B=B, **call)


# In order of preference; B and C come grouped. "xla" is the reference and supports every call.
BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": Backend(kernel.supports, scan_mosaic.run),
    "xla": Backend(supports=lambda **call: None, run=_xla),
}
