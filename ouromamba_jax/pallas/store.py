"""A store from registers that Pallas does not offer in every version of JAX."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def store(ref: Any, value: Any) -> None:
    """Writes `value` to global memory in ref's type, thread by thread as it lies in registers."""
    value = value.astype(ref.dtype)
    if hasattr(plgpu, "store"):  # jax 0.11 has no `store`, 0.12 refuses the plain one
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
