"""A rounded operand of the selective scan as integers, which its GPU kernel can read instead of floats."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8

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
    def near(self) -> Int8[Array, "B L *axes"]:
        """Levels on the inliers' step: all of a token's, unless its outliers are shifted."""
        return self._stack("near").reshape(self.shape)

    @property
    def far(self) -> Int8[Array, "B L *axes"]:
        """Levels of shifted outliers, on `steps`."""
        return self._stack("far").reshape(self.shape)

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


def floats(x: Array | SplitOperand) -> Array:
    """`x` as an array."""
    return x.merge() if isinstance(x, SplitOperand) else x
