"""The check that no matrix product of a model escapes quantisation unseen."""

import operator
from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ouromamba_jax.models.layers import DotProductAttention
from ouromamba_jax.quantize.sites import iter_sites, named_modules, set_module, skipping


def check_coverage(
    stage: nnx.Module, x: jax.ShapeDtypeStruct, name: str, quantised: Collection[str] | None = None
) -> jax.ShapeDtypeStruct:
    """Checks that every matrix product of a stage belongs to a site, so that none is left in float unseen.

    The stage is traced, not run, with every site replaced by zeros. A module may read the weight of a site that a rule
    leaves in float, such as one that is tied to another layer: products with it are left in float by that rule, too.

    Args:
      stage: in float.
      x: what enters it.
      name: its path in the model.
      quantised: paths within it of the sites that are to be quantised, by default all.

    Returns:
      what the stage makes of `x`.

    Raises:
      ValueError: naming the stage and the first product that no site covers, or the first site that is to be quantised
        and of which more is used than its call.
    """
    graphdef, state = nnx.split(stage)
    paths = [path for path, _ in iter_sites(stage)]
    quantised = paths if quantised is None else quantised
    left_out = [path for path in paths if path not in quantised]

    def without_sites(state: nnx.State, x: Array) -> Array:
        stripped = nnx.merge(graphdef, state)
        # The two products of attention take marked tensors only: `operands` says whether those are quantised.
        attention = [(path, m) for path, m in named_modules(stripped) if type(m) is DotProductAttention]
        for path, module in attention:
            set_module(stripped, path, _StandIn(f"{name}.{path}", module, refuse=False))
        for path, site in list(iter_sites(stripped)):
            set_module(stripped, path, _StandIn(f"{name}.{path}", site, refuse=path in quantised))
        return stripped(x)

    jaxpr, shape = jax.make_jaxpr(without_sites, return_shape=True)(state, x)
    places = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    weights = [any(f"{place}.".startswith(f"{path}.") for path in left_out) for place in places]
    left = _matmuls(jaxpr.jaxpr, [*weights, False])
    if left:
        raise ValueError(
            f"{name} has {len(left)} matrix products outside of its linear layers and scans ({left[0]}); "
            "make them nnx.Linear layers, so that they can be quantised or named by a rule."
        )
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype)


class _StandIn:
    """Zeros of the shape of what a module returns; what else it has is the module's own, or is refused."""

    def __init__(self, path: str, module: Any, *, refuse: bool):
        self._path, self._module, self._refuse = path, module, refuse

    def __call__(self, *args: Array, **kwargs: Any) -> Any:
        shapes = jax.eval_shape(partial(self._module, **kwargs), *args)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if self._refuse and not name.startswith("_"):
            raise ValueError(
                f"the model reads {name!r} of {self._path} itself, and what it does with that would not be quantised: "
                f"call the layer, or leave it in float, {skipping(self._path)}."
            )
        return value


def _matmuls(jaxpr: Any, are_weights: list[bool]) -> list[str]:
    """The products of a jaxpr, but those with its inputs in `are_weights` or with what is made of these alone."""
    weights = {var for var, is_weight in zip(jaxpr.invars, are_weights, strict=True) if is_weight}
    found = []
    for equation in jaxpr.eqns:
        is_constant = [hasattr(var, "val") for var in equation.invars]
        is_weight = [not c and var in weights for var, c in zip(equation.invars, is_constant, strict=True)]
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            if not any(is_weight):
                shapes = " x ".join(str(v.aval.shape) for v in equation.invars)
                found.append(f"{equation.primitive.name} {shapes}")
        elif any(is_weight) and all(map(operator.or_, is_weight, is_constant)):
            weights.update(equation.outvars)
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, tuple | list) else (parameter,):  # a cond has branches
                inner: Any = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):  # its inputs are the equation's last ones; what a loop carries may change
                    is_loop = equation.primitive.name in ("scan", "while")
                    flags = [False] * len(inner.invars) + [flag and not is_loop for flag in is_weight]
                    found += _matmuls(inner, flags[len(flags) - len(inner.invars) :])
    return found
