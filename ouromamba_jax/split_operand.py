"""Operands of the selective scan as they were made, which its GPU kernel reads, instead of one array of floats."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from ouromamba_jax.outlier_types import OutlierSplit
from ouromamba_jax.outliers import merge


@functools.partial(jax.tree_util.register_dataclass, data_fields=["splits"], meta_fields=["shape", "dtype"])
@dataclass(frozen=True)
class SplitOperand:
    """A rounded operand as integers, in place of the array (B, L, ...) of `shape` and `dtype` that it stands for.

    Each of G equal groups of its channels, group-major, is a split of its own, (B, L, C / G).
    """

    splits: tuple[OutlierSplit, ...]
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
        return jnp.stack([merge(split) for split in self.splits], axis=2).astype(self.dtype).reshape(self.shape)

    @property
    def has_levels(self) -> bool:
        """Whether outliers are levels, too, on a multiple of the inliers' step: not "free", nor floats ("16 bits")."""
        return all(split.pow2 for split in self.splits)

    @property
    def near(self) -> tuple[Int8[Array, "B L E"], ...]:
        """Each group's levels on the inliers' step: all of a token's, unless its outliers are shifted."""
        return tuple(split.near for split in self.splits)

    @property
    def far(self) -> tuple[Int8[Array, "B L E"], ...]:
        """Each group's levels of shifted outliers, on `steps`."""
        return tuple(split.far for split in self.splits)

    @property
    def steps(self) -> Float32[Array, "B L G"]:
        """Step of each token's outliers, which is the inliers' too unless they are shifted."""
        return self._stack("outlier_scale")

    @property
    def ratio(self) -> Float32[Array, "B L G"]:
        """Inliers' step over `steps`."""
        return self._stack("step_ratio")

    def _stack(self, name: str) -> Array:
        return jnp.stack([getattr(split, name) for split in self.splits], axis=2)


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
