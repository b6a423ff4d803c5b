"""What every model family offers to the rest of the library."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, DTypeLike, Float

from ouromamba_jax.data.preprocessing import Preprocessing
from ouromamba_jax.models.layers import Head, as_tokens
from ouromamba_jax.models.trace import Trace
from ouromamba_jax.ops.meshes import by_samples

_RULES: dict[Any, str] = {  # what a field of this annotation must be
    int: "sizes and counts are whole numbers from {least}",
    int | tuple[int, int]: "it must be a whole number from {least}, or two of them",
    int | tuple[int, ...]: "it must be a whole number from {least}, or a tuple of them",
    tuple[int, ...]: "it must be a tuple of whole numbers from {least}",
    float: "it must be a positive number",
    float | None: "it must be a positive number or None",
    bool: "it must be True or False",
    Preprocessing: "it must be a Preprocessing",
}


def check_fields(config: Any, *, zero: tuple[str, ...] = ()) -> None:
    """Holds a frozen config to its annotations before anything is computed from it; those in `zero` may be 0.

    Lists become tuples and NumPy's numbers Python's, since configs are hashed and written as JSON.

    Raises:
      ValueError: naming the first of the fields that is wrong.
    """
    for field in dataclasses.fields(config):
        value, least = _plain(getattr(config, field.name)), 0 if field.name in zero else 1
        if not _fits(value, field.type, least):
            choices = ", ".join(map(repr, typing.get_args(field.type)))
            rule = _RULES.get(field.type, f"it must be one of {choices}").format(least=least)
            raise ValueError(f"{field.name} is {value}, but {rule}; change it.")
        object.__setattr__(config, field.name, value)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def _fits(value: Any, kind: Any, least: int) -> bool:
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str) and value in parts
    if isinstance(kind, types.UnionType):
        return any(_fits(value, part, least) for part in parts)
    if parts:  # a tuple: (kind, ...) or (kind, kind)
        if not isinstance(value, tuple) or len(value) < 1 or (parts[1] is not ... and len(value) != len(parts)):
            return False
        return all(_fits(v, parts[0], least) for v in value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    return isinstance(value, kind)


class VisionModel(nnx.Module):
    """A classifier made of stages: a stem, blocks, a head, each mapping one array to the next.

    A family supplies `family`, a config (with img_size, num_classes and preprocessing) and `make_stages`; every block
    has a `trace` of its own, the head `features`. Generation and quantisation use nothing else of it.

    Args:
      config: the family's.
      rngs: for random weights.
      dtype: of the computation; logits and the stream between the blocks are float32.
      param_dtype: of the stored weights.
    """

    family: ClassVar[str]

    def __init__(
        self,
        config: Any,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config, self.dtype = config, dtype
        stem, blocks, head = self.make_stages(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.stem: Any = stem
        self.blocks = nnx.List(blocks)
        self.head: Any = head

    @staticmethod
    def make_stages(config: Any, **types: Any) -> tuple[nnx.Module, list[Any], Head]:
        """(stem, blocks, head), made in this order; `types` holds dtype, param_dtype and rngs."""
        raise NotImplementedError

    @property
    def stages(self) -> tuple[tuple[str, nnx.Module], ...]:
        """(path, module) in the order of the forward pass."""
        blocks = tuple((f"blocks.{i}", block) for i, block in enumerate(self.blocks))
        return (("stem", self.stem), *blocks, ("head", self.head))

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B classes"]:
        """The forward pass, stage by stage.

        Args:
          images: normalised, of the config's `img_size`.

        Returns:
          logits in float32; the features (B, C) of a model with `num_classes` 0.

        Raises:
          ValueError: if the images have another shape than the model takes.
        """
        return self._by_samples(VisionModel._logits, images)

    def _logits(self, x: Any) -> Array:
        for _, stage in self.stages:
            x = stage(x)  # type: ignore[operator]
        return x

    def _by_samples(self, function: Callable[..., Any], images: Array, **shared: tuple[str, ...]) -> Any:
        """function(model, images); where a mesh has explicit axes, through `by_samples`."""
        if not get_abstract_mesh().explicit_axes:
            return function(self, images)
        graphdef, state = nnx.split(self)
        return by_samples(lambda x, state: function(nnx.merge(graphdef, state), x), images, state, **shared)

    def trace(
        self, images: Float[Array, "B H W 3"], *, collect: Callable[[Array], Any] | None = None
    ) -> tuple[Float[Array, "B classes"], Trace]:
        """The forward pass, and what it computes on the way.

        Args:
          images: normalised, of the config's `img_size`.
          collect: reduces the hidden state h (B, D, N) inside every step of every scan; what it returns is stacked as
            `ScanTrace.states`. None keeps no states.

        Returns:
          (logits in float32, the tokens, every block's scans and mixer, and the head's features).

        Raises:
          ValueError: if the images have another shape than the model takes.
        """
        return self._by_samples(partial(VisionModel._traced, collect=collect), images, shared=("A", "D"))

    def _traced(self, images: Array, collect: Callable[[Array], Any] | None) -> tuple[Array, Trace]:
        x = tokens = self.stem(images)
        layers = []
        for block in self.blocks:
            x, layer = block.trace(x, collect=collect)
            layers.append(layer)
        return self.head(x), Trace(tokens=as_tokens(tokens), layers=tuple(layers), features=self.head.features(x))


@partial(jax.jit, static_argnums=0)
def apply_stage(graphdef: nnx.GraphDef, state: nnx.State, x: Array) -> Array:
    """One stage's output. Stages of equal structure share one compilation: 24 equal blocks compile as one."""
    return nnx.merge(graphdef, state)(x)
