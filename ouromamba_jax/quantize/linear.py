"""Linear layers in integers: calibrated, as a trainable stand-in, quantised, and measured."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32

from ouromamba_jax.models.layers import as_tokens
from ouromamba_jax.models.unlisted import unlisted
from ouromamba_jax.ops.matmul import KernelWeight, outlier_matmul, prepare
from ouromamba_jax.ops.passes import Asking, together
from ouromamba_jax.ops.producers import split_after
from ouromamba_jax.ops.qtensor import QTensor, quantize_with_scale, search_weight_scale
from ouromamba_jax.ops.scan_types import Product
from ouromamba_jax.ops.split import Split
from ouromamba_jax.ops.split_calibration import Calibration
from ouromamba_jax.ops.straight_through import straight_through
from ouromamba_jax.quantize.activation import (
    ActQuantizer,
    Calibrated,
    KernelLayout,
    Levels,
    SiteSpec,
    calibrating_activation,
    check_tokens,
    empty_calibration,
    shape_of,
)
from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.report import Measured, compare
from ouromamba_jax.quantize.rounding import fake_weight


class QuantLinear(nnx.Module):
    """A linear layer in integers: levels of its input, int8 products, one float epilogue.

    Where only weights are quantised, its input stays float and so does the product.
    """

    def __init__(
        self, weight: QTensor, bias: Array | None, act: ActQuantizer | None, spec: SiteSpec, dtype: Any = jnp.float32
    ):
        self.spec = spec
        self.dtype = dtype
        self.levels = Levels(weight.values, bits=weight.bits)
        self.weight_scale = Calibrated(weight.scale)
        self.bias = None if bias is None else nnx.Param(bias)
        self.act = act
        self.layout: KernelLayout | None = nnx.data(None)

    @property
    def weight(self) -> QTensor:
        config = self.spec.config
        return QTensor(self.levels[...], self.weight_scale[...], bits=config.weight_bits, group=config.weight_group)

    def prepare_weight(self) -> None:
        """Lays the weight out once for the backend that will multiply by it (see `matmul.prepare`)."""
        if self.act is None:
            return
        x = jax.ShapeDtypeStruct((1, *self.act.scale.shape, self.levels.shape[0]), jnp.float32)
        weight = prepare(jax.eval_shape(self.act.split, x), self.weight, self.dtype)
        self.layout = KernelLayout(weight) if isinstance(weight, KernelWeight) else None

    def split(self, x: Float[Array, "... K"]) -> Split:
        """Levels of the input, its tokens side by side."""
        if self.act is None:
            raise ValueError("only the weights of this layer are quantised: its input is not split.")
        return self.act.split(as_tokens(x))

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... O"]:
        if self.act is None:
            bias = None if self.bias is None else self.bias[...]
            return _float_product(x, self.weight.dequantize(), bias, self.dtype)
        check_tokens(as_tokens(x), self.act.scale.shape[0])
        return self.after(lambda x: x, x)

    @unlisted
    def promise(self, x: Float[Array, "B L K"]) -> Product | None:
        """What the layer makes of x, for a scan that multiplies itself; None where that takes more than levels."""
        if self.act is None or self.bias is not None or self.spec.config.weight_group is not None:
            return None
        return Product(self(x), self.act.split(x), self.weight, self.dtype)

    @unlisted
    def after(
        self,
        producer: Callable[..., Array],
        *arrays: Any,
        keep: bool = False,
        residual: Float32[Array, "... O"] | None = None,
        out_dtype: DTypeLike | None = None,
        **options: Any,
    ) -> Any:
        """`models.layers.after`: what the producer makes is split where it is made, and written only with `keep`.

        Gradients are those of the product of `fake_quant` with the dequantised weight: straight through to what the
        producer takes and to the steps, and with the levels held fixed to the weight's scales.
        """
        dtype = self.dtype if out_dtype is None else out_dtype
        if self.act is None:
            x = producer(*arrays, **options)
            y = self(x).astype(dtype)
            y = y if residual is None else residual + y.astype(jnp.float32)
            return (y, x) if keep else y
        shape = jax.eval_shape(lambda *x: producer(*x, **options), *arrays).shape
        config = self.act.config

        def run(arrays: Any, residual: Any, found: Calibration, weight: QTensor, layout: Any, bias: Any) -> Any:
            calibrated: Any = dict(theta=found.theta, shift=found.shift, channels=found.channels)
            split, made = split_after(producer, arrays, options, found.scale, config, keep=keep, **calibrated)
            residual = None if residual is None else as_tokens(residual)
            levels = weight if layout is None else replace(layout, scale=weight.scale)
            y = outlier_matmul(split, levels, bias=bias, dtype=dtype, residual=residual).reshape(*shape[:-1], -1)
            return (y, made) if keep else y

        def smooth(arrays: Any, residual: Any, found: Calibration, weight: QTensor, layout: Any, bias: Any) -> Any:
            made = producer(*arrays, **options)
            x = found.fake(as_tokens(made), config).reshape(made.shape)
            y = _float_product(x, weight.dequantize(), bias, dtype)
            y = y if residual is None else residual + y.astype(jnp.float32)
            return (y, made) if keep else y

        bias = None if self.bias is None else self.bias[...]
        layout = None if self.layout is None else self.layout.get_value()
        return straight_through(run, smooth)(arrays, residual, self.act.calibration, self.weight, layout, bias)


class FakeLinear:
    """`QuantLinear` in float, with straight-through gradients to every scale.

    A weight that is a `QTensor` keeps its levels; one that is but its scales is rounded to the nearest.
    """

    def __init__(self, linear: nnx.Linear, spec: SiteSpec, calibrated: dict[str, Any]):
        self.linear, self.spec, self.calibrated = linear, spec, calibrated

    def rounded(self, x: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """What the product multiplies the weight by."""
        if "input" not in self.calibrated:
            return x
        return self.calibrated["input"].fake(as_tokens(x), self.spec.config.splitting).reshape(x.shape)

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... O"]:
        linear, weight = self.linear, self.calibrated["weight"]
        if isinstance(weight, QTensor):
            kernel = weight.dequantize()
        else:
            kernel = fake_weight(linear.kernel[...].astype(jnp.float32), weight, self.spec.config)
        return _float_product(
            self.rounded(x), kernel, None if linear.bias is None else linear.bias[...], _dtype(linear)
        )


def _dtype(linear: nnx.Linear) -> Any:
    """What the layer returns; a Flax layer that leaves it open follows its operands, of which scales are float32."""
    return jnp.float32 if linear.dtype is None else linear.dtype


def _float_product(x: Array, kernel: Array, bias: Array | None, dtype: Any) -> Array:
    y = x.astype(jnp.float32) @ kernel
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + bias.shape)
    return y.astype(dtype)


def record(linear: nnx.Linear, config: QuantConfig, x: Array) -> tuple[Array, dict[str, Array]]:
    """What the layer makes of x, and what calibration needs to see."""
    return linear(x), {"input": as_tokens(x)}


def calibrate(
    linear: nnx.Linear, config: QuantConfig, of: Callable[[Any], dict[str, Array]]
) -> Asking[tuple[SiteSpec, dict[str, Any]]]:
    """(spec, {"input": Calibration, "weight": scales (groups, O)}); without "input" if only weights are quantised.

    `of` finds in a batch what `record` saw.
    """

    def x(batch: Any) -> Array:
        return of(batch)["input"]

    asked: dict[str, Asking[Any]] = {"shape": shape_of(x)}
    if config.act_bits is not None:
        asked["input"] = calibrating_activation(config, x)
    found = yield from together(asked)
    tokens, channels = found.pop("shape")
    kernel = linear.kernel[...].astype(jnp.float32)
    search = config.scale_search == "norm"
    found["weight"] = search_weight_scale(kernel, config.weight_bits, group=config.weight_group, search=search)
    two_bytes = ("input",) if "input" in found and found["input"].shift is not None else ()
    return SiteSpec(config, tokens, channels, two_bytes), found


def fake(linear: nnx.Linear, spec: SiteSpec, calibrated: dict[str, Any]) -> FakeLinear:
    return FakeLinear(linear, spec, calibrated)


def make(linear: nnx.Linear, spec: SiteSpec, calibrated: dict[str, Any]) -> QuantLinear:
    config = spec.config
    weight = calibrated["weight"]
    if not isinstance(weight, QTensor):
        kernel = linear.kernel[...].astype(jnp.float32)
        weight = quantize_with_scale(kernel, weight, config.weight_bits, group=config.weight_group)
    act = ActQuantizer(calibrated["input"], config) if "input" in calibrated else None
    return QuantLinear(weight, None if linear.bias is None else linear.bias[...], act, spec, _dtype(linear))


def empty(linear: nnx.Linear, spec: SiteSpec) -> dict[str, Any]:
    """What `calibrate` would return beside the spec, as zeros."""
    config, (rows, columns) = spec.config, linear.kernel.shape
    groups = 1 if config.weight_group is None else rows // config.weight_group
    found: dict[str, Any] = {"weight": jnp.zeros((groups, columns), jnp.float32)}
    if config.act_bits is not None:
        two_bytes = "input" in spec.two_bytes
        found["input"] = empty_calibration(config, spec.tokens, spec.channels, two_bytes=two_bytes)
    return found


def measure(linear: nnx.Linear, module: QuantLinear, seen: dict[str, Array]) -> dict[str, Measured]:
    """The product without its bias against the float layer's."""
    x = seen["input"]
    exact = x.astype(jnp.float32) @ linear.kernel[...].astype(jnp.float32)
    if module.act is None:
        return {"": compare(exact, x.astype(jnp.float32) @ module.weight.dequantize())}
    split = module.split(x)
    return {"": compare(exact, outlier_matmul(split, module.weight), split.listed())}


def describe(name: str, spec: SiteSpec) -> dict[str, Any]:
    """Kind, bits and granularity for the report."""
    config = spec.config
    weights = "output channel" if config.weight_group is None else f"{config.weight_group} inputs x output channel"
    return dict(
        kind="matmul",
        weight_bits=config.weight_bits,
        act_bits=config.act_bits,
        outlier_bits=None if config.act_bits is None else config.splitting.outlier_bits,
        second_byte="input" in spec.two_bytes,
        granularity=f"weight: {weights}" + ("; input: token" if config.act_bits is not None else ""),
    )
