"""Operands of the selective scan as they were made, which its GPU kernel reads, instead of one array of floats."""

import functools
from dataclasses import dataclass, replace
from typing import Any
from typing import Any as Planes

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.tree_util.register_dataclass, data_fields=["groups"], meta_fields=["shape", "dtype"])
@dataclass(frozen=True)
class SplitOperand:
    """A rounded operand as integers, in place of the array (B, L, ...) of `shape` and `dtype` that it stands for.

    Each of G equal groups of its channels, group-major, was split on its own: `Planes` of (B, L, C / G).
    """

    groups: tuple[Planes, ...]
    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def reshape(self, *shape: int) -> "SplitOperand":
        """The same entries, with other axes behind the first two."""
        array = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return replace(self, shape=jax.eval_shape(lambda x: x.reshape(shape), array).shape)

    def merge(self) -> Array:
        """The array."""
        return jnp.stack([planes.merge() for planes in self.groups], axis=2).astype(self.dtype).reshape(self.shape)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
@dataclass(frozen=True)
class StackedOperand:
    """Floats (B, L, G, E) that were stacked from an array for each group, in place of (B, L, G * E).

    A kernel that reads the groups one by one leaves XLA no use for the stack, which then is never made.
    """

    array: Float[Array, "B L G E"]

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, length, groups, channels = self.array.shape
        return batch, length, groups * channels

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def merge(self) -> Float[Array, "B L D"]:
        """The array."""
        return self.array.reshape(self.shape)

    @property
    def groups(self) -> tuple[Float[Array, "B L E"], ...]:
        """The arrays that it was stacked from."""
        return tuple(self.array[:, :, g] for g in range(self.array.shape[2]))


def floats(x: Array | SplitOperand | StackedOperand) -> Array:
    """`x` as an array."""
    return x.merge() if isinstance(x, SplitOperand | StackedOperand) else x
