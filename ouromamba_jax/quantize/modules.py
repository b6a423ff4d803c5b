"""What replaces a model's matmuls and marked tensors once it is quantised, and the quantiser of an activation."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int8

from ouromamba_jax.models.layers import Operand, as_tokens
from ouromamba_jax.ops.matmul import KernelWeight, PackedSplit, outlier_matmul, prepare, takes_packed
from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.ops.released import quantize_asymmetric
from ouromamba_jax.ops.split import round_activation, split_for_product, split_outliers
from ouromamba_jax.ops.split_types import OutlierConfig, OutlierSplit, Planes
from ouromamba_jax.quantize.config import QuantConfig


class Levels(nnx.Variable):
    """Integer levels (rows, columns) of a weight or scan parameter.

    Metadata: `bits`, what each needs at rest; and of a weight that lies as a GPU kernel reads it (`KernelWeight`) also
    `prepared`, the shape (rows, columns) that it stands for, and `wide`.
    """

    @property
    def is_prepared(self) -> bool:
        return self.get_metadata("prepared", None) is not None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.get_metadata("prepared", self.shape)

    @property
    def matrix(self) -> Int8[Array, "rows columns"]:
        """The levels as a matrix, however they lie."""
        if not self.is_prepared:
            return self[...]
        rows, columns = self.matrix_shape
        return KernelWeight(self[...], jnp.ones((1, columns)), self.bits, rows).values


class Scale(nnx.Variable):
    """A scale, threshold or channel list found in calibration."""


@dataclass(frozen=True)
class SiteSpec:
    """Static facts of one quantised site: its settings, and the tokens and channels of what it was calibrated on."""

    config: QuantConfig
    tokens: int
    channels: int

    def operand_config(self, operand: str) -> QuantConfig:
        """Settings of one scan operand: delta's outliers lie one standard deviation further out (released code)."""
        if operand == "delta":
            return dataclasses.replace(self.config, sigma=self.config.sigma + 1)
        return self.config


def check_tokens(x: Float[Array, "B L ..."], calibrated: int) -> None:
    """Checks that x has as many tokens per sample as scales were found for.

    Raises:
      ValueError: if it has not.
    """
    if x.shape[1] != calibrated:
        raise ValueError(
            f"this model was calibrated at {calibrated} tokens per sample and got {x.shape[1]}; "
            "quantise it again at this input size."
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ActScales:
    """What calibration found for one activation (B, L, C).

    scale (L,) > 0; theta (L,) for the offline threshold; channels (C,) bool for static detection; zero (L,) for the
    published code's delta; else None.
    """

    scale: Array
    theta: Array | None = None
    channels: Array | None = None
    zero: Array | None = None


def is_asymmetric(operand: str, config: QuantConfig) -> bool:
    """Whether a scan operand is rounded as the published code rounds delta (see `released.py`)."""
    return operand == "delta" and config.spec == "released"


class ActQuantizer(nnx.Module):
    """Algorithm 2 with the static scales of one activation."""

    def __init__(self, scales: ActScales, config: QuantConfig):
        self.config = config.splitting
        self.scale = Scale(scales.scale)
        self.theta = None if scales.theta is None else Scale(scales.theta)
        self.channels = None if scales.channels is None else Scale(scales.channels)
        self.zero = None if scales.zero is None else Scale(scales.zero)

    def split(self, x: Float[Array, "B L C"], *, with_mask: bool = False) -> OutlierSplit:
        """Inliers, outliers and their scales, and their places if asked for.

        Raises:
          ValueError: if x has another number of tokens than the calibration had.
        """
        return split_outliers(*self._checked(x), **self._lists(), with_mask=with_mask)

    def split_for_product(
        self, x: Float[Array, "B L C"], *, packed: bool = False
    ) -> OutlierSplit | Planes | PackedSplit:
        """What `outlier_matmul` takes. Raises as `split` does."""
        return split_for_product(*self._checked(x), **self._lists(), packed=packed)

    def round(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        """x after rounding, in its own type. Raises as `split` does."""
        if self.zero is not None:
            return self.round_asymmetric(x)[0].astype(x.dtype)
        return round_activation(*self._checked(x), **self._lists())

    def round_asymmetric(self, x: Float[Array, "B L C"]) -> tuple[Float[Array, "B L C"], Bool[Array, "B L C"]]:
        """(x as the published code rounds delta, in float32; where its outliers are). Raises as `split` does."""
        if self.zero is None:
            raise ValueError("this activation has no zero points: it is rounded by Algorithm 2")
        x, scale, config = self._checked(x)
        return quantize_asymmetric(x, scale, self.zero[...], config)

    def _lists(self) -> dict[str, Array | None]:
        """Thresholds and channels of outliers, where they are not found while the tokens pass."""
        lists = {"theta": self.theta, "channels": self.channels}
        return {name: None if found is None else found[...] for name, found in lists.items()}

    def _checked(self, x: Array) -> tuple[Array, Array, OutlierConfig]:
        """x, its scales, and how to split it."""
        check_tokens(x, self.scale.shape[0])
        return x, self.scale[...], self.config


class QuantLinear(nnx.Module):
    """A linear layer in integers: outliers split off at run time, int8 products, one float epilogue."""

    def __init__(
        self, weight: QTensor, bias: Array | None, scales: ActScales, spec: SiteSpec, dtype: Any = jnp.float32
    ):
        self.spec = spec
        self.dtype = dtype
        self.levels = Levels(weight.values, bits=weight.bits)
        self.weight_scale = Scale(weight.scale)
        self.bias = None if bias is None else nnx.Param(bias)
        self.act = ActQuantizer(scales, spec.config)

    @property
    def weight(self) -> QTensor | KernelWeight:
        config, levels, scale = self.spec.config, self.levels[...], self.weight_scale[...]
        if self.levels.is_prepared:
            inputs, wide = self.levels.matrix_shape[0], self.levels.get_metadata("wide")
            return KernelWeight(levels, scale, config.weight_bits, inputs, wide)
        return QTensor(levels, scale, bits=config.weight_bits, group=config.weight_group)

    def prepare_weight(self) -> None:
        """Lays the weight out once for the backend that will multiply by it (see `matmul.prepare`)."""
        weight = self.weight
        x = jax.ShapeDtypeStruct((1, *self.act.scale.shape, weight.shape[0]), jnp.float32)
        weight = prepare(jax.eval_shape(self._split, x), weight, self.dtype)
        if isinstance(weight, KernelWeight):
            self.levels = Levels(weight.rows, bits=self.levels.bits, prepared=weight.shape, wide=weight.wide)
        else:
            self.levels = Levels(weight.values, bits=self.levels.bits)

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... O"]:
        bias = None if self.bias is None else self.bias[...]
        y = outlier_matmul(self._split(as_tokens(x)), self.weight, bias=bias, dtype=self.dtype)
        return y.reshape(*x.shape[:-1], -1)

    def _split(self, x: Float[Array, "B L K"]) -> OutlierSplit | Planes | PackedSplit:
        return self.act.split_for_product(x, packed=takes_packed(self.act.config, self.weight, self.dtype))


class QuantizedPoint(Operand):
    """A marked tensor, rounded by Algorithm 2."""

    def __init__(self, scales: ActScales, spec: SiteSpec):
        self.spec = spec
        self.act = ActQuantizer(scales, spec.config)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        return self.act.round(as_tokens(x)).reshape(x.shape)


def prepare_weights(model: nnx.Module) -> None:
    """Lays out the weights of every `QuantLinear` for the backend that will multiply by them, in place.

    `quantize` and `load` end with it. A model that then moves to another device, or to another backend, still gives
    the same results, but undoes the layout in every call until this is called again.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, QuantLinear):
            module.prepare_weight()
