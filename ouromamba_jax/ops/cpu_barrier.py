"""An array that XLA's CPU backend must write before it is read, where fusing it with its consumers costs more."""

from jax import lax
from jaxtyping import Array


def cpu_barrier(x: Array) -> Array:
    """`x`; on a CPU as an array of its own. Elsewhere it is fused as XLA sees fit, which saves the memory traffic."""
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
