"""Which site of a stage is the first to meet, or to make, a value that is not finite."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ouromamba_jax.ops.split_calibration import NOT_FINITE
from ouromamba_jax.quantize.sites import iter_sites, set_module


def check_finite(name: str, stage: nnx.Module, x: jax.Array, batch_size: int) -> None:
    """Runs a float stage step by step on x (N, ...), which is finite, to say where that ends.

    Args:
      name: the stage's path in the model.

    Raises:
      ValueError: naming the first site in the order of the forward pass that meets or makes a NaN or an infinity.
    """
    watched = nnx.clone(stage)
    for path, site in list(iter_sites(watched)):
        set_module(watched, path, _Watched(f"{name}.{path}", site))
    for start in range(0, len(x), batch_size):
        watched(x[start : start + batch_size])


class _Watched:
    """A site, in and out of which only finite values go."""

    def __init__(self, path: str, site: Any):
        self._path, self._site = path, site

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _is_finite(args):
            raise ValueError(f"{self._path} cannot be calibrated: {NOT_FINITE}")
        out = self._site(*args, **kwargs)
        if not _is_finite(out):
            raise ValueError(
                f"{self._path} cannot be calibrated: it makes NaN or infinity of finite activations; check its weights "
                "and the model's dtype."
            )
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._site, name)


def _is_finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))
