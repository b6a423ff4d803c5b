"""What every implementation of the selective scan takes and returns."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int, PyTree

Collect = Callable[[Float[Array, "B D N"]], PyTree]
StateTransform = Callable[[Float[Array, "B D N"], Int[Array, ""]], Float[Array, "B D N"]]


class ScanOutput(NamedTuple):
    """What a selective scan returns: `y (B, L, D)`, `h_last (B, D, N)` float32, and `states`.

    `states` is what `collect` returned for each step, stacked on axis 1 in scan order, or None without `collect`.
    """

    y: Float[Array, "B L D"]
    h_last: Float[Array, "B D N"]
    states: PyTree
