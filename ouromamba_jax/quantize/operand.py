"""Marked tensors, such as attention's operands, rounded by Algorithm 2: calibrated, in float, quantised, measured."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.models.layers import Operand, as_tokens
from ouromamba_jax.ops.passes import Asking, together
from ouromamba_jax.quantize.activation import (
    ActQuantizer,
    SiteSpec,
    calibrating_activation,
    empty_calibration,
    shape_of,
)
from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.report import Measured, compare


class QuantOperand(Operand):
    """A marked tensor, rounded by Algorithm 2."""

    def __init__(self, act: ActQuantizer, spec: SiteSpec):
        self.spec = spec
        self.act = act

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        return self.act.round(as_tokens(x)).reshape(x.shape)


class FakeOperand:
    """`QuantOperand` with straight-through gradients."""

    def __init__(self, spec: SiteSpec, calibrated: dict[str, Any]):
        self.spec, self.calibrated = spec, calibrated

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        y = self.calibrated["input"].fake(as_tokens(x), self.spec.config.splitting)
        return y.reshape(x.shape).astype(x.dtype)


def record(operand: Operand, config: QuantConfig, x: Array) -> tuple[Array, dict[str, Array]]:
    """What the tensor is, and what calibration needs to see."""
    return operand(x), {"input": as_tokens(x)}


def calibrate(
    operand: Operand, config: QuantConfig, of: Callable[[Any], dict[str, Array]]
) -> Asking[tuple[SiteSpec, dict[str, Any]]]:
    """(spec, {"input": Calibration}); `of` finds in a batch what `record` saw."""

    def x(batch: Any) -> Array:
        return of(batch)["input"]

    asked: dict[str, Asking[Any]] = {"shape": shape_of(x), "input": calibrating_activation(config, x)}
    found = yield from together(asked)
    tokens, channels = found.pop("shape")
    return SiteSpec(config, tokens, channels, () if found["input"].shift is None else ("input",)), found


def fake(operand: Operand, spec: SiteSpec, calibrated: dict[str, Any]) -> FakeOperand:
    return FakeOperand(spec, calibrated)


def make(operand: Operand, spec: SiteSpec, calibrated: dict[str, Any]) -> QuantOperand:
    return QuantOperand(ActQuantizer(calibrated["input"], spec.config), spec)


def empty(operand: Operand, spec: SiteSpec) -> dict[str, Any]:
    """What `calibrate` would return beside the spec, as zeros."""
    two_bytes = "input" in spec.two_bytes
    return {"input": empty_calibration(spec.config, spec.tokens, spec.channels, two_bytes=two_bytes)}


def measure(operand: nnx.Module, module: QuantOperand, seen: dict[str, Array]) -> dict[str, Measured]:
    """The tensor after rounding against itself."""
    split = module.act.split(seen["input"])
    return {"": compare(seen["input"], split.merge(), split.listed())}


def describe(name: str, spec: SiteSpec) -> dict[str, Any]:
    """Kind, bits and granularity for the report."""
    config = spec.config
    return dict(
        kind="operand",
        weight_bits=None,
        act_bits=config.act_bits,
        outlier_bits=config.splitting.outlier_bits,
        second_byte="input" in spec.two_bytes,
        granularity="token",
    )
