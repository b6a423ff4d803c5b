"""The check that no matrix product of a model escapes quantisation unseen."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ouromamba_jax.models.layers import DotProductAttention
from ouromamba_jax.quantize.sites import iter_sites, named_modules, set_module


def check_coverage(stage: nnx.Module, x: jax.ShapeDtypeStruct, name: str) -> jax.ShapeDtypeStruct:
    """Checks that every matrix product of a stage belongs to a site, so that none is left in float unseen.

    The stage is traced, not run, with every site replaced by zeros.

    Returns:
      what the stage makes of `x`.

    Raises:
      ValueError: naming the stage and the first product that no site covers.
    """
    graphdef, state = nnx.split(stage)

    def without_sites(state: nnx.State, x: Array) -> Array:
        stripped = nnx.merge(graphdef, state)
        # The two products of attention take marked tensors only: `operands` says whether those are quantised.
        attention = [(path, m) for path, m in named_modules(stripped) if type(m) is DotProductAttention]
        for path, module in attention:
            set_module(stripped, path, partial(_zeros_like_output, module))
        for name, site in list(iter_sites(stripped)):
            set_module(stripped, name, partial(_zeros_like_output, site))
        return stripped(x)

    jaxpr, shape = jax.make_jaxpr(without_sites, return_shape=True)(state, x)
    left = _matmuls(jaxpr.jaxpr)
    if left:
        raise ValueError(
            f"{name} has {len(left)} matrix products outside of its linear layers and scans ({left[0]}); "
            "make them nnx.Linear layers, so that they can be quantised or named by a rule."
        )
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype)


def _zeros_like_output(site: Any, *args: Array, **kwargs: Any) -> Any:
    shapes = jax.eval_shape(partial(site, **kwargs), *args)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _matmuls(jaxpr: Any) -> list[str]:
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            shapes = " x ".join(str(v.aval.shape) for v in equation.invars)
            found.append(f"{equation.primitive.name} {shapes}")
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, tuple | list) else (parameter,):  # a cond has branches
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    found += _matmuls(inner)
    return found
