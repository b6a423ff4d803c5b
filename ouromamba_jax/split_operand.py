"""A rounded operand of the selective scan as integers: what its GPU kernel reads instead of floats."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

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
        """Whether `levels` exist: outliers that are floats ("16 bits") or on a step of their own ("free") have none."""
        return all(split.pow2 for split in self.splits)

    def levels(self, dtype: Any) -> Array:
        """The array in units of `steps`: whole numbers, but for inliers that share a token with shifted outliers.

        float32 holds them all; int8 is for arrays that are `unshifted`.
        """
        near = jnp.stack([split.near for split in self.splits], axis=2).astype(dtype)
        if dtype == jnp.int8:
            return near.reshape(self.shape)
        far = jnp.stack([split.far for split in self.splits], axis=2).astype(dtype)
        ratio = jnp.stack([split.step_ratio for split in self.splits], axis=2)
        return (near * ratio[..., None] + far).reshape(self.shape)

    @property
    def steps(self) -> Float32[Array, "B L G"]:
        """Step of each token's outliers, which is the inliers' too unless they are shifted."""
        return jnp.stack([split.outlier_scale for split in self.splits], axis=2)

    def unshifted(self) -> Bool[Array, ""]:
        """Whether inliers and outliers share a step in every token."""
        return ~jnp.any(jnp.stack([split.shifted for split in self.splits]))


def floats(x: Array | SplitOperand) -> Array:
    """`x` as an array."""
    return x.merge() if isinstance(x, SplitOperand) else x
