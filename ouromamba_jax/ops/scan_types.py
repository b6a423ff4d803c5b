"""What every implementation of the selective scan takes and returns."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PyTree

from ouromamba_jax.ops.split import Split

Collect = Callable[[Float[Array, "B D N"]], PyTree]
StateTransform = Callable[[Float[Array, "B D N"], Int[Array, ""]], Float[Array, "B D N"]]

Wide = Float[Array, "B L D"] | tuple[Float[Array, "B L E"] | Split, ...]
"""An input of D channels: floats, or for each group of E channels, in order, floats or a `Split` of its own."""


def floats(x: Wide, dtype: DTypeLike) -> Float[Array, "B L D"]:
    """All channels in floats, those of a `Split` in `dtype`."""
    if not isinstance(x, tuple):
        return x
    return jnp.concatenate([part.merge().astype(dtype) if isinstance(part, Split) else part for part in x], axis=2)


class ScanOutput(NamedTuple):
    """What a selective scan returns: `y (B, L, D)`, `h_last (B, D, N)` float32, and `states`.

    `states` is what `collect` returned for each step, stacked on axis 1 in scan order, or None without `collect`.
    """

    y: Float[Array, "B L D"]
    h_last: Float[Array, "B D N"]
    states: PyTree
