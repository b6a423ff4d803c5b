"""XLA's CPU backend miscompiles a product with a constant inside a reduction: the flag that mends it, and a warning.

Seen in jaxlib 0.11.2 and 0.12.0: `jit(lambda E: ((E @ jnp.full((96, 96), 0.37)) * E).sum(1))` is wrong by any amount.
"""

import functools
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
MENDING_FLAG = f"{_FLAG}=-reduce"


def mend_miscompile() -> None:
    """Adds `MENDING_FLAG` to XLA_FLAGS, unless they already set that flag.

    XLA reads its flags once, before it compiles the first program of the process: call this earlier.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {MENDING_FLAG}".strip()


@functools.cache
def is_miscompiled() -> bool:
    """Whether this process's CPU backend is affected: it runs the reproduction there, once, in half a second."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        ones = np.ones((96, 96), np.float32)
        program = jax.jit(lambda x: ((x @ jnp.full((96, 96), 0.37, x.dtype)) * x).sum(1)).lower(ones).compile()
        return not np.allclose(program(ones), 0.37 * ones.size, rtol=1e-3)


@functools.cache
def warn_if_miscompiled() -> None:
    """Warns, once in a process, if JAX runs on CPUs by default and `is_miscompiled`."""
    if jax.default_backend() == "cpu" and is_miscompiled():
        warnings.warn(
            "this version of XLA computes some products and gradients wrongly on CPUs; set the environment variable "
            f"XLA_FLAGS={MENDING_FLAG} before Python starts.",
            stacklevel=3,
        )
