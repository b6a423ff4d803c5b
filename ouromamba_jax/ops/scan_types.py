"""What every implementation of the selective scan takes and returns."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Float32, Int, Int8, PyTree

from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.ops.split import OutlierConfig, Split, rounded, split_outliers

Collect = Callable[[Float[Array, "B D N"]], PyTree]
StateTransform = Callable[[Float[Array, "B D N"], Int[Array, ""]], Float[Array, "B D N"]]


@partial(jax.tree_util.register_dataclass, data_fields=["value", "split", "weight"], meta_fields=["dtype"])
@dataclass(frozen=True)
class Product:
    """`outlier_matmul(split, weight, dtype=dtype)`, (B, L, E), which a GPU's scan makes itself of its few inputs.

    Then nobody reads `value`, and a compiled program does not compute it. Gradients take it.
    """

    value: Float[Array, "B L E"]
    split: Split
    weight: QTensor
    dtype: DTypeLike

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, L, E)."""
        return self.value.shape


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "scale", "theta", "shift", "channels"],
    meta_fields=["config"],
)
@dataclass(frozen=True)
class Unsplit:
    """Floats (B, L, E), or the product that they are, in scan order, for their split: a GPU's scan splits as it reads.

    Fields as the arguments of `split_outliers`.
    """

    x: Float[Array, "B L E"] | Product
    scale: Float32[Array, " L"]
    config: OutlierConfig
    theta: Float32[Array, " L"] | None = None
    shift: Int8[Array, " L"] | None = None
    channels: Bool[Array, " C"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, L, E)."""
        return self.x.shape

    def floats(self) -> Float[Array, "B L E"]:
        """x, computed."""
        return self.x.value if isinstance(self.x, Product) else self.x

    def split(self) -> Split:
        """The split itself."""
        return split_outliers(self.floats(), self.scale, self.config, **self._calibrated)

    def merge(self) -> Float32[Array, "B L E"]:
        """What the scan takes; differentiable as `split.rounded`."""
        return rounded(self.floats(), self.scale, self.config, **self._calibrated)

    @property
    def _calibrated(self) -> dict[str, Any]:
        return dict(theta=self.theta, shift=self.shift, channels=self.channels)


@partial(jax.tree_util.register_dataclass, data_fields=["x"], meta_fields=["grid", "transpose", "reverse"])
@dataclass(frozen=True)
class Routed:
    """Tokens of a map, which x (B, L, E) holds by rows, in the order of `producers.route`; `grid` is rows, columns."""

    x: Float[Array, "B L E"]
    grid: tuple[int, int]
    transpose: bool
    reverse: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, L, E)."""
        return self.x.shape

    def merge(self) -> Float[Array, "B L E"]:
        """The tokens in that order."""
        x = self.x.reshape(self.x.shape[0], *self.grid, -1)
        tokens = (x.swapaxes(1, 2) if self.transpose else x).reshape(self.x.shape)
        return jnp.flip(tokens, axis=1) if self.reverse else tokens


Wide = Float[Array, "B L D"] | tuple[Float[Array, "B L E"] | Split | Unsplit | Routed, ...]
"""An input of D channels: floats, or for each group of E channels, in order, floats, a `Split` or what will be one."""


def floats(x: Wide, dtype: DTypeLike) -> Float[Array, "B L D"]:
    """All channels in floats, those that are split in `dtype`."""
    if not isinstance(x, tuple):
        return x
    parts = [part.merge().astype(dtype) if isinstance(part, Split | Unsplit | Routed) else part for part in x]
    return jnp.concatenate(parts, axis=2)


class ScanOutput(NamedTuple):
    """What a selective scan returns: `y (B, L, D)`, `h_last (B, D, N)` float32, and `states`.

    `states` is what `collect` returned for each step, stacked on axis 1 in scan order, or None without `collect`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> u, A, B = jnp.ones((1, 3, 2)), -jnp.ones((2, 4)), jnp.ones((1, 3, 4))
      >>> y, h_last, states = om.selective_scan(u, u, A, B, B)
      >>> y.shape, h_last.shape, states
      ((1, 3, 2), (1, 2, 4), None)
    """

    y: Float[Array, "B L D"]
    h_last: Float[Array, "B D N"]
    states: PyTree
