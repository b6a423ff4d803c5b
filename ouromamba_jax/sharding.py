"""Spreading a batch over all devices, of one host or many: a mesh with the one axis "data"."""

import math
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array


def data_mesh(batch: int) -> Mesh:
    """A mesh over as many devices as divide a batch of `batch` samples evenly: at least one, at best all."""
    count = math.gcd(batch, jax.device_count())
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def split_samples(mesh: Mesh, tree: Any) -> Any:
    """Arrays cut along their first axis, a part per device; scalars everywhere."""

    def place(x: Any) -> Array:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data") if np.ndim(x) else PartitionSpec()))

    return jax.tree.map(place, tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A whole copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


@partial(jax.jit, static_argnums=0)
def _gather(mesh: Mesh, x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def to_host(mesh: Mesh, x: Array) -> np.ndarray:
    """All parts of x as one NumPy array, on every host."""
    return np.asarray(_gather(mesh, x))
