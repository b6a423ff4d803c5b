"""The selective scan of Mamba (Gu and Dao, 2023, section 3.2), its arguments checked, by the backend that suits it.

h_t = exp(delta_t * A) * h_{t-1} + (delta_t * B_t) * u_t ;    y_t = (<C_t, h_t> + D * u_t) * silu(z_t)
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ouromamba_jax.ops import scan_mosaic, scan_xla
from ouromamba_jax.ops.dispatch import Backend, choose
from ouromamba_jax.ops.scan_types import Collect, ScanOutput, StateTransform
from ouromamba_jax.ops.split_operand import SplitOperand, StackedOperand
from ouromamba_jax.pallas import selective_scan as kernel


def selective_scan(
    u: Float[Array, "B L D"] | SplitOperand | StackedOperand,
    delta: Float[Array, "B L D"] | SplitOperand | StackedOperand,
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

    The step sizes are `delta + delta_bias`, through a softplus if `delta_softplus`. They, `exp(delta * A)` and
    the state are float32 whatever the inputs are. Gradients reach every array in reverse mode; the backward pass keeps
    one state per chunk of up to 8 tokens and recomputes the others. Second derivatives need implementation="xla".

    A `SplitOperand` is merged into floats first, unless the backend reads its levels; a `StackedOperand` is its array,
    unless the backend reads group by group.

    Args:
      u: input, (B, L, D).
      delta: step sizes, (B, L, D).
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
      `ScanOutput(y, h_last, states)`, `y` in u's dtype, `states` in scan order (index 0 is the first step).

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
        if isinstance(array, SplitOperand) and len(array.groups) != groups:
            raise ValueError(f"{name} must be split in {groups} groups, as many as B has, not in {len(array.groups)}.")


# In order of preference; B and C come grouped. "xla" is the reference and supports every call.
BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": Backend(kernel.supports, scan_mosaic.run),
    "xla": Backend(supports=lambda **call: None, run=scan_xla.run),
}
