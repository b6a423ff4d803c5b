"""What every model family offers to the rest of the library."""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, DTypeLike, Float

from ouromamba_jax.data.preprocessing import Preprocessing, check_image_shape, height_width
from ouromamba_jax.fields import fits, plain
from ouromamba_jax.models.layers import Head, as_tokens
from ouromamba_jax.models.trace import Trace
from ouromamba_jax.ops.meshes import by_samples, map_samples

_RULES: dict[Any, str] = {  # what a field of this annotation must be
    int: "sizes and counts are whole numbers from {least}",
    int | tuple[int, int]: "it must be a whole number from {least}, or two of them",
    int | tuple[int, ...]: "it must be a whole number from {least}, or a tuple of them",
    tuple[int, ...]: "it must be a tuple of whole numbers from {least}",
    float: "it must be a positive number",
    float | None: "it must be a positive number or None",
    bool: "it must be True or False",
    bool | None: "it must be True, False or None",
    Preprocessing: "it must be a Preprocessing",
}


def check_fields(config: Any, *, zero: tuple[str, ...] = ()) -> None:
    """Holds a frozen config to its annotations before anything is computed from it; those in `zero` may be 0.

    Lists become tuples and NumPy's numbers Python's, since configs are hashed and written as JSON; `preprocessing` is
    made one for `in_channels`.

    Raises:
      ValueError: naming the first of the fields that is wrong.
    """
    for field in dataclasses.fields(config):
        value, least = plain(getattr(config, field.name)), 0 if field.name in zero else 1
        parts = value if isinstance(value, tuple) else (value,)
        positive = all(v >= least or 0 < v < 1 for v in parts if type(v) in (int, float))
        if not (parts and positive and fits(value, field.type)):
            choices = ", ".join(map(repr, typing.get_args(field.type)))
            rule = _RULES.get(field.type, f"it must be one of {choices}").format(least=least)
            raise ValueError(f"{field.name} is {value}, but {rule}; change it.")
        object.__setattr__(config, field.name, value)
    object.__setattr__(config, "preprocessing", config.preprocessing.for_channels(config.in_channels))


class VisionModel(nnx.Module):
    """A classifier made of stages: a stem, blocks, a head, each mapping one array to the next.

    A family supplies `family`, a config (with img_size, in_channels, num_classes and preprocessing) and `make_stages`;
    every block has a `trace` of its own, the head `features`. Generation and quantisation use nothing else of it;
    `features` uses `map_blocks`, `to_map` and `for_size`, which a family overrides where they are other than here.

    Args:
      config: the family's.
      rngs: for random weights.
      dtype: of the computation; logits and the stream between the blocks are float32.
      param_dtype: of the stored weights.

    Attributes:
      drop_path: stochastic depth: the rate, in [0, 1), at which a call with `rngs` drops the last block's residual
        updates, sample by sample, and makes the others 1 / (1 - rate) times as large. It grows linearly from 0 in the
        first block.
      remat: whether gradients compute the inside of every block again instead of keeping it in memory.

    Both may be set at any time, of a quantised model, too; no checkpoint holds them.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import ouromamba_jax as om
      >>> model, images = om.load("vmamba_micro"), jnp.zeros((1, 40, 64, 3))
      >>> model(images).shape
      (1, 10)
      >>> [x.shape for x in model.features(images)]
      [(1, 10, 16, 32), (1, 5, 8, 64)]
      >>> model.drop_path = 0.1
      >>> model(images, rngs=jax.random.key(0)).shape  # in training
      (1, 10)
      >>> [x.shape for x in om.load("vim_micro").features(images, (1, -1))]
      [(1, 10, 16, 64), (1, 10, 16, 64)]
    """

    family: ClassVar[str]
    default_maps: ClassVar[slice] = slice(None)
    """Which of `map_blocks` `features` gives by default."""

    def __init__(
        self,
        config: Any,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config, self.dtype = config, dtype
        self.drop_path, self.remat = 0.0, False
        stem, blocks, head = self.make_stages(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.stem: Any = stem
        self.blocks = nnx.List(blocks)
        self.head: Any = head

    def make_stages(self, config: Any, **types: Any) -> tuple[nnx.Module, list[Any], Head]:
        """(stem, blocks, head), made in this order; `types` holds dtype, param_dtype and rngs."""
        raise NotImplementedError

    @property
    def stages(self) -> tuple[tuple[str, nnx.Module], ...]:
        """(path, module) in the order of the forward pass."""
        blocks = tuple((f"blocks.{i}", block) for i, block in enumerate(self.blocks))
        return (("stem", self.stem), *blocks, ("head", self.head))

    def __call__(
        self, images: Float[Array, "B H W I"], *, rngs: nnx.Rngs | Array | None = None
    ) -> Float[Array, "B classes"]:
        """The forward pass, stage by stage.

        Args:
          images: normalised, of the config's `img_size` and `in_channels`.
          rngs: for training, `nnx.Rngs` (its stream `dropout`) or a key: what `drop_path` draws from. None, as for
            inference, drops nothing.

        Returns:
          logits in float32; the features (B, C) of a model with `num_classes` 0.

        Raises:
          ValueError: if the images have another shape than the model takes.
        """
        return self._by_samples(VisionModel._logits, (images, self._kept(images, rngs)))

    def features(
        self,
        images: Float[Array, "B H W I"],
        indices: Sequence[int] | None = None,
        *,
        rngs: nnx.Rngs | Array | None = None,
    ) -> tuple[Float[Array, "B h w C"], ...]:
        """Feature maps for dense heads, before any norm; what comes after the last of them is not computed.

        Of VMamba and MambaVision, the output of every stage, before the next one halves it. Of a Vim or ViT, the output
        of the last block; tokens that are no patches are left out, and learned positions resized to the images' grid as
        `load` does. MambaVision pads maps to whole windows of its `window_size`, whatever the images' size.

        Args:
          images: normalised, of any size; a quantised model takes those that give its sites the tokens that it was
            calibrated at.
          indices: which stages, or blocks of a Vim or ViT, from 0; negative ones count from the end.
          rngs: as `__call__` takes it.

        Returns:
          maps in float32, in the order of `indices`.

        Raises:
          ValueError: for an index that does not exist, and images that the model cannot take.
        """
        check_image_shape(images, None, self.config.in_channels)
        size, places = (images.shape[1], images.shape[2]), self.map_blocks
        indices = range(len(places))[self.default_maps] if indices is None else tuple(indices)
        if not all(-len(places) <= index < len(places) for index in indices):
            raise ValueError(f"indices are {indices}, but this model has maps 0 to {len(places) - 1}.")
        chosen = tuple(places[index] for index in indices)
        model: Any = self if size == height_width(self.config.img_size) else self.for_size(size)
        return model._by_samples(partial(VisionModel._maps, blocks=chosen), (images, model._kept(images, rngs)))

    @property
    def map_blocks(self) -> tuple[int, ...]:
        """Blocks whose outputs the indices of `features` count: the last one of every stage."""
        return tuple(end - 1 for end in accumulate(self.config.depths))

    def to_map(self, x: Array) -> Float[Array, "B h w C"]:
        """A block's output as a map."""
        return x

    def for_size(self, size: tuple[int, int]) -> Any:
        """This model as `features` needs it for images of another (height, width); the arrays are shared."""
        model: Any = nnx.merge(*nnx.split(self))
        model.config = dataclasses.replace(self.config, img_size=size)
        return model

    def _logits(self, x: tuple[Array, Array | None]) -> Array:
        *_, out = self._outputs(*x)
        return self.head(out)

    def _maps(self, x: tuple[Array, Array | None], blocks: tuple[int, ...]) -> tuple[Array, ...]:
        made = dict(zip(range(-1, max(blocks, default=-1) + 1), self._outputs(*x), strict=False))
        return tuple(self.to_map(made[block]) for block in blocks)

    def _outputs(self, images: Array, kept: Array | None) -> Iterator[Array]:
        """What the stem makes, then what every block makes, as it is asked for."""
        x = self.stem(images)
        yield x
        for i, block in enumerate(self.blocks):
            arguments = (x,) if kept is None else (x, kept[:, i])
            x = _again(block, *arguments) if self.remat else block(*arguments)
            yield x

    def _kept(self, images: Array, rngs: nnx.Rngs | Array | None) -> Float[Array, "B blocks 2"] | None:
        """The factors of all residual updates, two per block; None where nothing is dropped."""
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}, but it is a rate from 0 to less than 1; change it.")
        if rngs is None or not self.drop_path:
            return None
        key = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
        rates = jnp.linspace(0, self.drop_path, len(self.blocks), dtype=jnp.float32).reshape(1, -1, 1)
        drawn = jax.random.uniform(key, (images.shape[0], rates.size, 2), jnp.float32)
        return jnp.where(drawn < rates, 0, 1 / (1 - rates))

    def _by_samples(self, function: Callable[..., Any], x: Any, **shared: tuple[str, ...]) -> Any:
        """function(model, x), also of no samples; where a mesh has explicit axes, through `by_samples`."""
        if not get_abstract_mesh().explicit_axes:
            return _also_of_none(partial(function, self), x, **shared)
        graphdef, state = nnx.split(self)

        def run(x: Any, state: nnx.State) -> Any:
            return _also_of_none(partial(function, nnx.merge(graphdef, state)), x, **shared)

        return by_samples(run, x, state, **shared)

    def trace(
        self, images: Float[Array, "B H W I"], *, collect: Callable[[Array], Any] | None = None
    ) -> tuple[Float[Array, "B classes"], Trace]:
        """The forward pass, and what it computes on the way.

        Args:
          images: normalised, of the config's `img_size` and `in_channels`.
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


def _also_of_none(function: Callable[[Any], Any], x: Any, shared: tuple[str, ...] = ()) -> Any:
    """function(x); of no samples, what it makes of one of zeros, less that one: reshapes need one to find sizes."""
    if jnp.shape(jax.tree.leaves(x)[0])[:1] != (0,):
        return function(x)
    one = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), x)
    return map_samples(lambda leaf: leaf[:0], function(one), shared)


def _again(block: nnx.Module, *arguments: Array) -> Array:
    """block(*arguments), whose inside a gradient computes again."""
    graphdef, state = nnx.split(block)
    return jax.checkpoint(lambda state, *arguments: nnx.merge(graphdef, state)(*arguments))(state, *arguments)


@partial(jax.jit, static_argnums=0)
def apply_stage(graphdef: nnx.GraphDef, state: nnx.State, x: Array) -> Array:
    """One stage's output. Stages of equal structure share one compilation: 24 equal blocks compile as one."""
    return nnx.merge(graphdef, state)(x)
