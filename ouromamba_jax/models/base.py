"""What every model family offers to the rest of the library."""

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from ouromamba_jax.models.layers import Head, as_tokens
from ouromamba_jax.models.trace import Trace


def check_sizes(config: Any, *names: str) -> None:
    """Refuses sizes that are not positive whole numbers, or tuples of them, before anything is computed from them.

    Raises:
      ValueError: naming the first of the fields that is wrong.
    """
    for name in names:
        value = getattr(config, name)
        sizes = value if isinstance(value, tuple) else (value,)
        if not sizes or not all(isinstance(size, Integral) and int(size) >= 1 for size in sizes):
            raise ValueError(f"{name} is {value}, but sizes and counts are whole numbers from 1; change it.")


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
        """Normalised images to float32 logits."""
        x: Any = images
        for _, stage in self.stages:
            x = stage(x)  # type: ignore[operator]
        return x

    def trace(
        self, images: Float[Array, "B H W 3"], *, collect: Callable[[Array], Any] | None = None
    ) -> tuple[Float[Array, "B classes"], Trace]:
        """Logits and every scan's operands; `collect` reduces the hidden state h (B, D, N) inside the scan step."""
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
