"""Random arguments of `selective_scan`."""

import jax.numpy as jnp
import numpy as np


def make_inputs(batch, length, channels, d_state, *, groups=None, dtype=jnp.float32, drop=(), seed=0):
    """Random arguments of a scan; `groups=None` gives the (B, L, N) form of B and C."""
    rng = np.random.default_rng(seed)
    projection = (batch, length, d_state) if groups is None else (batch, length, groups, d_state)
    shapes = {
        "u": (batch, length, channels), "delta": (batch, length, channels), "B": projection, "C": projection,
        "D": (channels,), "z": (batch, length, channels), "delta_bias": (channels,), "h0": (batch, channels, d_state),
    }  # fmt: skip
    inputs = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    inputs["delta"] = inputs["delta"] * 0.5 - 1
    inputs["A"] = -jnp.exp(jnp.asarray(rng.normal(size=(channels, d_state)), jnp.float32) * 0.5)
    return {name: value for name, value in inputs.items() if name not in drop}
