"""What a forward pass exposes: the operands of every selective scan, and where its tokens lie in the image."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclass(frozen=True)
class ScanOrder:
    """Where the tokens of a scan come from.

    A row-major (height, width) grid of patches, read column by column if `transpose`, with a class token inserted
    at `class_index` if there is one (or several, each at its place among all tokens), and then read from the end if
    `reverse`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ouromamba_jax.models import ScanOrder
      >>> order = ScanOrder(height=2, width=2, class_index=2, reverse=True)
      >>> order.to_image(jnp.arange(5), axis=0).tolist()  # 2, in the middle, is the class token
      [4, 3, 1, 0]
      >>> grid, class_tokens = order.to_map(jnp.arange(5), axis=0)
      >>> order.direction, grid.tolist(), class_tokens.tolist()
      ('backwards', [[4, 3], [1, 0]], [2])
    """

    height: int
    width: int
    class_index: int | tuple[int, ...] | None = None
    transpose: bool = False
    reverse: bool = False

    @property
    def length(self) -> int:
        """Number of tokens in the scan, the class token included."""
        return self.height * self.width + len(self._class_indices)

    @property
    def _class_indices(self) -> tuple[int, ...]:
        if self.class_index is None:
            return ()
        return self.class_index if isinstance(self.class_index, tuple) else (self.class_index,)

    @property
    def direction(self) -> str:
        """ "forwards" or "backwards", and "by columns" where it is not by rows."""
        return ("backwards" if self.reverse else "forwards") + (" by columns" if self.transpose else "")

    def to_map(self, x: Array, axis: int = 1) -> tuple[Array, Array]:
        """`axis` of x as a row-major map (..., height, width, ...), and the class tokens apart (..., tokens, ...)."""
        axis %= x.ndim
        grid = self.to_image(x, axis).reshape(*x.shape[:axis], self.height, self.width, *x.shape[axis + 1 :])
        places = np.asarray(self._class_indices, int)
        return grid, jnp.take(x, self.length - 1 - places if self.reverse else places, axis)

    def to_image(self, x: Array, axis: int = 1) -> Array:
        """Brings `axis` of x from scan order to row-major image order, without the class token."""
        axis %= x.ndim
        if x.shape[axis] != self.length:
            raise ValueError(f"axis {axis} of x has {x.shape[axis]} tokens, but this scan has {self.length}.")
        if self.reverse:
            x = jnp.flip(x, axis)
        for index in reversed(self._class_indices):
            before, rest = jnp.split(x, [index], axis)
            x = jnp.concatenate([before, jax.lax.slice_in_dim(rest, 1, None, axis=axis)], axis)
        if self.transpose:
            grid = x.reshape(*x.shape[:axis], self.width, self.height, *x.shape[axis + 1 :])
            x = jnp.swapaxes(grid, axis, axis + 1).reshape(x.shape)
        return x


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScanTrace:
    """One selective scan in one direction; every array with L is in scan order.

    `delta` is after bias and softplus, `y` before any gate: y = <C, h> + D * u. `states` is what `collect` returned
    for h(t), stacked on axis 1, or None.
    """

    u: Float[Array, "B L D"]
    delta: Float[Array, "B L D"]
    A: Float[Array, "D N"]
    B: Float[Array, "B L N"]
    C: Float[Array, "B L N"]
    D: Float[Array, " D"]
    y: Float[Array, "B L D"]
    states: Any
    order: ScanOrder = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerTrace:
    """One block: its scans, one per direction; what enters the mixer, and what the mixer returns.

    `mixer_out` is before layer scale and MLP. Tokens are row-major, or per window (see `WindowOrder`).
    """

    scans: tuple[ScanTrace, ...]
    mixer_in: Float[Array, "B L C"]
    mixer_out: Float[Array, "B L C"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionTrace(LayerTrace):
    """An attention block: no scans, but the attention between its tokens; `order` says where they lie in the image."""

    attention: Float[Array, "B heads L L"]
    order: ScanOrder = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trace:
    """A whole forward pass: tokens entering the first block, one LayerTrace per block, and the head's input.

    Examples:
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> logits, trace = om.load("vim_micro").trace(jnp.zeros((1, 32, 32, 3)))
      >>> trace.layers[2].scans[0].delta.shape  # third block, forward direction: 64 patches and a class token
      (1, 65, 128)
    """

    tokens: Float[Array, "B L C"]
    layers: tuple[LayerTrace, ...]
    features: Float[Array, "B C"]
