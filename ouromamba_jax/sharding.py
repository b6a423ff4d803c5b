"""Spreading a batch over all devices, of one host or many: a mesh with the one axis "data"."""

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh
from jaxtyping import Array

_KEEP = ((-8, 1), (-4, 0), (-1, 2**31 - 1))
"""glibc's M_ARENA_MAX: one heap for all threads; M_MMAP_MAX: no mappings of their own; M_TRIM_THRESHOLD: no return."""


def use_all_cores() -> None:
    """Makes a CPU device of every core that this process may use, since XLA runs most loops on one core per device.

    JAX must not have run yet, or nothing changes; nor does it where the user chose a number: by JAX_NUM_CPU_DEVICES,
    `jax.config`, or --xla_force_host_platform_device_count in XLA_FLAGS.

    Examples:
      >>> from ouromamba_jax.sharding import use_all_cores
      >>> use_all_cores()  # before the first computation of the process
    """
    if "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if jax.config.jax_num_cpu_devices > 0:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", cores)


def keep_freed_memory() -> None:
    """Lets glibc keep what XLA frees, for the next call: new pages for every temporary take a quarter of the time.

    Of VMamba-T's at batch 4 on one core (876 against 653 ms); the process holds 100 MB more. Elsewhere it does nothing.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in _KEEP:
            mallopt(option, value)


def without_mesh[**P, T](function: Callable[P, T]) -> Callable[P, T]:
    """The function, run outside of the mesh that its caller has set: it spreads its batches over meshes of its own."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if get_abstract_mesh().empty:
            return function(*args, **kwargs)
        with jax.set_mesh(Mesh(np.empty((), object), ())):
            return function(*args, **kwargs)

    return run


def data_mesh(batch: int) -> Mesh:
    """A mesh over as many devices as share `batch` samples evenly: at least one, at best all.

    Of several hosts either all devices, or each host has a mesh of its own devices and computes the whole batch.

    Examples:
      >>> import jax
      >>> from ouromamba_jax.sharding import data_mesh
      >>> data_mesh(4 * jax.device_count()).size == jax.device_count()
      True
    """
    devices = jax.devices() if batch % jax.device_count() == 0 else jax.local_devices()
    count = next(n for n in range(len(devices), 0, -1) if batch % n == 0)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def split_samples(mesh: Mesh, tree: Any) -> Any:
    """Arrays cut along their first axis, a part per device; scalars everywhere.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ouromamba_jax.sharding import data_mesh, split_samples
      >>> split_samples(data_mesh(4), jnp.zeros((4, 2))).sharding.spec[0]
      'data'
    """

    def place(x: Any) -> Array:
        return _place(x, NamedSharding(mesh, PartitionSpec("data") if np.ndim(x) else PartitionSpec()))

    return jax.tree.map(place, tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A whole copy of every array on every device."""
    return jax.tree.map(lambda x: _place(x, NamedSharding(mesh, PartitionSpec())), tree)


def _place(x: Any, sharding: NamedSharding) -> Array:
    if isinstance(x, jax.Array) and x.is_fully_addressable and not sharding.is_fully_addressable:
        x = np.asarray(x)  # which every host has: JAX would send it from one host to the others
    return jax.device_put(x, sharding)


@partial(jax.jit, static_argnums=0)
def _gather(mesh: Mesh, x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def on_one_device(mesh: Mesh, tree: Any) -> Any:
    """All parts of every array on the first device of each host."""

    def place(x: Array) -> Array:
        x = x if x.is_fully_addressable else _gather(mesh, x).addressable_data(0)
        return jax.device_put(x, jax.local_devices()[0])

    return jax.tree.map(place, tree)


def to_host(mesh: Mesh, x: Array) -> np.ndarray:
    """All parts of x as one NumPy array, on every host."""
    return np.asarray(x if x.is_fully_addressable else _gather(mesh, x))
