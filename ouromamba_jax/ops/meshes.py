"""What JAX asks of a function that runs over a mesh of devices: inside `jax.shard_map`, or with explicit axes.

There the types of arrays say over which axes of the mesh they vary or are split. A loop must carry such types from its
first step on; most reshapes refuse a split array.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh, use_abstract_mesh
from jaxtyping import Array


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, each varying over every mesh axis of `jax.shard_map` over which any of them does."""
    varying = [jax.typeof(x).mat.varying for x in arrays]
    every = frozenset().union(*varying)
    missing = [tuple(sorted(every - axes, key=str)) for axes in varying]
    return tuple(lax.pcast(x, axes, to="varying") for x, axes in zip(arrays, missing, strict=True))


def by_samples(function: Callable[..., Any], x: Any, *others: Any, shared: tuple[str, ...] = ()) -> Any:
    """function(x, *others), inside which explicit axes of the mesh are automatic: XLA splits what is computed there.

    Args:
      x: arrays, of which the first has samples on its first axis. The results are split by samples as it is, and along
        no other axis.
      shared: fields of the results that belong to no sample, and are whole on every device.
    """
    mesh = get_abstract_mesh()
    if not mesh.explicit_axes:
        return function(x, *others)
    samples = jax.typeof(jax.tree.leaves(x)[0]).sharding.spec[0]
    types = [AxisType.Auto if mesh_type is AxisType.Explicit else mesh_type for mesh_type in mesh.axis_types]
    with use_abstract_mesh(mesh.update(axis_types=tuple(types))):
        out = function(*jax.tree.map(lambda leaf: jax.reshard(leaf, PartitionSpec()), (x, *others)))
    out = jax.tree.map(lambda leaf: jax.reshard(leaf, PartitionSpec()), out)
    return map_samples(lambda leaf: jax.reshard(leaf, PartitionSpec(samples)), out, shared)


def map_samples(change: Callable[[Array], Array], out: Any, shared: tuple[str, ...]) -> Any:
    """`out` with its arrays changed that have samples on their first axis: all but scalars and fields in `shared`."""

    def changed(path: tuple, leaf: Array) -> Array:
        whole = not leaf.ndim or getattr(path[-1] if path else None, "name", None) in shared
        return leaf if whole else change(leaf)

    return jax.tree.map_with_path(changed, out)
