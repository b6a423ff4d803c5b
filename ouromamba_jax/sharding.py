"""Spreading a batch over all devices, of one host or many: a mesh with the one axis "data"."""

import os
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array


def use_all_cores() -> None:
    """Makes a CPU device of every core that this process may use, since XLA runs most loops on one core per device.

    JAX must not have run yet, or nothing changes; nor does it where the user chose a number: by JAX_NUM_CPU_DEVICES,
    `jax.config`, or --xla_force_host_platform_device_count in XLA_FLAGS.
    """
    if "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if jax.config.jax_num_cpu_devices > 0:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", cores)


def data_mesh(batch: int) -> Mesh:
    """A mesh over as many devices as share `batch` samples evenly: at least one, at best all."""
    count = next(n for n in range(jax.device_count(), 0, -1) if batch % n == 0)
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
    return np.asarray(x if x.is_fully_addressable else _gather(mesh, x))
