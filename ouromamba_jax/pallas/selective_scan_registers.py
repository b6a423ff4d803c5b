"""How (channels, states) values of the selective scan's backward pass lie in the 128 threads of a program."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ouromamba_jax.pallas.store import store
from ouromamba_jax.pallas.tiles import SCAN_CHANNELS as CHANNELS


def registers(states: int) -> "OneState | ManyStates":
    """The layout for 1 state or an even number of them."""
    return OneState() if states == 1 else ManyStates(states)


class ManyStates:
    """(128, N) values: 32 channels to a warp, half of a channel's states to a lane.

    With four lanes to a channel, each would take the softplus of twice as many channels; with one, sums over channels
    would take longer.
    """

    def __init__(self, states: int):
        self.shape = (CHANNELS, states)
        tiling = plgpu.Tiling(((CHANNELS, 2), (32, 2), (16, 2), (1,)))
        self.layout = plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)

    def _load(self, ref, *reduced):
        layout = self.layout.reduce(*reduced) if reduced else self.layout
        return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

    def load(self, ref):
        """(128, N), from memory of this shape."""
        return self._load(ref)

    def load_transposed(self, ref):
        """(128, N), from memory of shape (N, 128)."""
        return self._load(ref.transpose((1, 0)))

    def load_channels(self, ref):
        """One value per channel."""
        return self._load(ref, 1)

    def load_states(self, ref):
        """One value per state, for every channel."""
        return lax.broadcast_in_dim(self._load(ref, 0), self.shape, [1])

    def across(self, x):
        """One value per channel, for every state."""
        return lax.broadcast_in_dim(x, self.shape, [0])

    def zeros(self):
        """One zero per channel."""
        return plgpu.layout_cast(jnp.zeros((CHANNELS,), jnp.float32), self.layout.reduce(1))

    def over_states(self, x):
        """Sum, one per channel."""
        return jnp.sum(x, axis=1)

    def over_channels(self, x):
        """Sum, one per state."""
        return jnp.sum(x, axis=0)

    store = store_states = staticmethod(store)


class OneState:
    """(128, 1) values as vectors of 128, a channel to a thread. Methods as above."""

    def load(self, ref):
        return ref[:, 0].astype(jnp.float32)

    def load_transposed(self, ref):
        return ref[0].astype(jnp.float32)

    def load_channels(self, ref):
        return ref[...].astype(jnp.float32)

    load_states = load_transposed

    def across(self, x):
        return x

    def zeros(self):
        return jnp.zeros((CHANNELS,), jnp.float32)

    over_states = across

    def over_channels(self, x):
        return jnp.sum(x)

    def store(self, ref, value):
        ref[:, 0] = value

    def store_states(self, ref, value):
        ref[0] = value
