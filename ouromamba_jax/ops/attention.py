"""Implicit attention of a selective scan (Ali et al. 2024) and the patched hidden state of OuroMamba (Algorithm 1).

A scan maps u to y = alpha @ u + D * u with one causal matrix alpha per channel. Summing the hidden states of a spatial
neighbourhood before the readout C gives the patched form, which is no longer causal. Functions take plain arrays, or a
`ScanTrace` or `LayerTrace` of a model's trace. Steps of a scan are in scan order; tokens of a grid are in row-major
image order, without class token.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ouromamba_jax.ops.meshes import by_samples, vary_alike

Weighting = Literal["delta", "uniform"]


def neighbourhood_mask(grid: tuple[int, int], neighbourhood: int) -> Bool[np.ndarray, "M M"]:
    """mask[t, k]: does token k lie in the window around token t, clipped at the border? Static, row-major."""
    _check_window(neighbourhood)
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    distance = np.maximum(abs(rows[:, None] - rows[None]), abs(columns[:, None] - columns[None]))
    return distance <= neighbourhood // 2


def token_weights(delta: Float[Array, "B L E"], *, weighting: Weighting = "delta") -> Float[Array, "B L"]:
    """Weight of every hidden state in the patched sum: the mean of delta over channels, or 1."""
    return jnp.mean(delta, axis=-1) if weighting == "delta" else jnp.ones(delta.shape[:2], delta.dtype)


def patched_readout(scan: Any, *, neighbourhood: int = 5, weighting: Weighting = "delta") -> Float[Array, "B M E"]:
    """f_t = C_t h_p(t) in image order: what the patched attention makes of u, without the attention of any channel.

    h_p(t) = sum over k in N(t) of w_k h(k), N the window around a token, cut at the border (OuroMamba, Algorithm 1).

    Args:
      scan: a `ScanTrace` whose `states` are the hidden states (B, L, E, N), traced with `collect=lambda h: h`.
      neighbourhood: odd side of the window.
      weighting: see `token_weights`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> from ouromamba_jax.ops.attention import patched_readout
      >>> _, trace = om.load("vim_micro").trace(jnp.zeros((1, 32, 32, 3)), collect=lambda h: h)
      >>> patched_readout(trace.layers[2].scans[0]).shape
      (1, 64, 128)
    """
    if scan.states is None:
        raise ValueError("this trace has no hidden states; trace the model with collect=lambda h: h.")
    order = scan.order
    h = scan.states.swapaxes(2, 3)  # (B, L, N, E)
    C = order.to_image(scan.C.astype(jnp.float32))
    mix = order.to_image(_mixing(scan, neighbourhood, weighting))
    # Window, weights and C make one matrix (t; k, n), so that h is read once and h_p never written.
    mix = (mix[..., None] * C[:, :, None]).reshape(*C.shape[:2], -1)
    return jnp.matmul(mix, h.reshape(h.shape[0], -1, h.shape[3]))


def scan_attention(
    scan: Any, *, neighbourhood: int | None = None, weighting: Weighting = "delta", per_channel: bool = False
) -> Float[Array, "B ... L L"]:
    """Implicit attention of one scan, rows and columns in scan order, class token included.

    alpha[t, j] = C_t (prod_{m=j+1..t} Abar_m) Bbar_j for j <= t, so that y = alpha @ u + D * u (Ali et al. 2024).
    With a neighbourhood, alpha_p[t, j] = sum over k in N(t), k >= j, of w_k C_t (prod_{m=j+1..k} Abar_m) Bbar_j, so
    that alpha_p @ u = C_t h_p(t); the class token is no neighbour of anything and its row is zero.

    Args:
      scan: a `ScanTrace`; its states are not needed.
      neighbourhood: odd side of the window, or None for the plain form.
      weighting: see `token_weights`; used with a neighbourhood only.
      per_channel: return (B, E, L, L) instead of the mean over channels (B, L, L), which needs E times less memory.
    """
    delta, A = scan.delta.astype(jnp.float32), scan.A.astype(jnp.float32)
    B, C = scan.B.astype(jnp.float32), scan.C.astype(jnp.float32)
    batch, length, channels = delta.shape
    causal = jnp.tril(jnp.ones((length, length), bool))[None]
    mix = None if neighbourhood is None else _mixing(scan, neighbourhood, weighting)

    def transition(delta: Float[Array, "B L"], A: Float[Array, " N"]) -> Float[Array, "B L L N"]:
        # exp(A (S_k - S_j)) is the product of Abar over j+1..k. Above the diagonal it would overflow: mask first.
        total = jnp.cumsum(delta, axis=1)
        gap = jnp.where(causal, total[:, :, None] - total[:, None], 0.0)
        decay = jnp.exp(gap[..., None] * A[None, None, None])
        return jnp.where(causal[..., None], decay * delta[:, None, :, None], 0.0)

    def readout(transition: Float[Array, "B L L N"]) -> Float[Array, "B L L"]:
        if mix is not None:
            transition = jnp.einsum("btk,bkjn->btjn", mix, transition)
        return jnp.einsum("btn,btjn,bjn->btj", C, transition, B)

    delta = jnp.moveaxis(delta, 2, 0)
    if per_channel:
        return jnp.moveaxis(jax.lax.map(lambda channel: readout(transition(*channel)), (delta, A)), 0, 1)

    # The readout is linear, so one pass over the channels sums their transitions; each is recomputed for its gradient.
    add = jax.checkpoint(lambda total, channel: (total + transition(*channel), None))
    start = jnp.zeros((batch, length, length, A.shape[1]), jnp.float32)
    start, *each = vary_alike(start, delta, A)
    total, _ = jax.lax.scan(add, start, tuple(each))
    return readout(total / channels)


def implicit_attention(
    trace_layer: Any,
    *,
    neighbourhood: int | None = None,
    weighting: Weighting = "delta",
    per_channel: bool = False,
) -> Float[Array, "B ... M M"]:
    """Implicit attention of a layer between image tokens: the mean over its scan directions (and channels).

    Every direction is brought to row-major image order before the mean, without the class token's row and column.

    Args:
      trace_layer: a `LayerTrace` from `model.trace(images)`.
      neighbourhood, weighting, per_channel: as in `scan_attention`.

    Returns:
      (B, M, M), or (B, E, M, M) per channel; row t says where token t's output comes from.

    Examples:
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> _, trace = om.load("vim_micro").trace(jnp.zeros((1, 32, 32, 3)))
      >>> om.implicit_attention(trace.layers[2]).shape  # 64 image tokens
      (1, 64, 64)
    """

    def mean(scans: tuple[Any, ...]) -> Array:
        maps = []
        for scan in scans:
            alpha = scan_attention(scan, neighbourhood=neighbourhood, weighting=weighting, per_channel=per_channel)
            maps.append(scan.order.to_image(scan.order.to_image(alpha, axis=-1), axis=-2))
        return jnp.mean(jnp.stack(maps), axis=0)

    return by_samples(mean, _scans(trace_layer))


def _scans(trace_layer: Any) -> tuple[Any, ...]:
    if not trace_layer.scans:
        raise ValueError("this layer has no selective scan, so it has no implicit attention; pick another layer.")
    return trace_layer.scans


def _mixing(scan: Any, neighbourhood: int, weighting: Weighting) -> Float[Array, "B L L"]:
    """mix[t, k] = w_k if k is in N(t), else 0, in scan order."""
    order = scan.order
    steps = order.to_image(jnp.arange(order.length), axis=0)  # scan step of every image token
    mask = jnp.asarray(neighbourhood_mask((order.height, order.width), neighbourhood), jnp.float32)
    mask = jnp.zeros((order.length, order.length), jnp.float32).at[steps[:, None], steps[None]].set(mask)
    return mask[None] * token_weights(scan.delta.astype(jnp.float32), weighting=weighting)[:, None]


def _check_window(neighbourhood: int) -> None:
    if neighbourhood < 1 or neighbourhood % 2 == 0:
        raise ValueError(f"neighbourhood is {neighbourhood}, but a window around a token has an odd side; use 3 or 5.")
