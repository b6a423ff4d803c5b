"""The selective scan on rounded operands, as a quantised model runs it."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.ops.scan_types import ScanOutput
from ouromamba_jax.ops.split_operand import SplitOperand, floats
from ouromamba_jax.quantize.modules import ActQuantizer, ActScales, Levels, Scale, SiteSpec, is_asymmetric
from ouromamba_jax.quantize.rounding import round_states


class RoundedOperands:
    """How a scan runs on rounded operands; the quantised scan and its trainable stand-in share it.

    Subclasses implement `round_operand`, `parameter` and `state_transform`.
    """

    spec: SiteSpec
    directions: int
    D: Any
    dt_bias: Any
    decay_rates: Callable[[], Array]
    delta_bias: Callable[[Array], Array]

    def round_operand(self, name: str, x: Float[Array, "B L G C"]) -> Array | SplitOperand:
        raise NotImplementedError

    def parameter(self, name: str) -> Float[Array, "D N"] | None:
        """A (D, N) or D (D, 1) after rounding, in float; None if it stays as it is."""
        raise NotImplementedError

    def state_transform(self, u: Array) -> Callable[[Array, Array], Array] | None:
        """What happens to h after every step, for `selective_scan`."""
        raise NotImplementedError

    def __call__(self, u: Array, delta: Array, B: Array, C: Array, *, collect: Any = None) -> ScanOutput:
        return self.scan(*self._rounded(u, delta, B, C), collect=collect)

    def operands(self, u: Array, delta: Array, B: Array, C: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
        u, delta, A, B, C, D = map(floats, self._rounded(u, delta, B, C))
        return u, delta, A, B, C, D

    def _rounded(self, u: Array, delta: Array, B: Array, C: Array) -> tuple[Any, Any, Array, Any, Any, Array]:
        """`operands`; what `round_operand` leaves in integers stays so."""
        if is_asymmetric("delta", self.spec.config):  # the published code rounds delta with its bias on
            bias = self.delta_bias(delta)
            steps: Any = floats(self.round_operand("delta", delta + bias)) - bias
        else:
            steps = self.round_operand("delta", delta)
        A, D = self.parameter("A"), self.parameter("D")
        A = self.decay_rates() if A is None else A
        D = self.D[...].astype(jnp.float32) if D is None else D[:, 0]
        return self.round_operand("u", u), steps, A, self.round_operand("B", B), self.round_operand("C", C), D

    def scan(self: Any, u, delta, A, B, C, D, *, collect=None) -> ScanOutput:
        transform = self.state_transform(u)
        out = SelectiveScan.scan(self, u, delta, A, B, C, D, collect=collect, state_transform=transform)
        return out._replace(y=floats(self.round_operand("y", out.y)))


class QuantSelectiveScan(RoundedOperands, SelectiveScan):
    """A selective scan whose operands are rounded: activations by Algorithm 2 per direction, A and D once."""

    def __init__(
        self,
        scan: SelectiveScan,
        activations: dict[str, list[ActScales]],
        parameters: dict[str, QTensor],
        state_scale: Array | None,
        spec: SiteSpec,
    ):
        self.spec = spec
        self.directions = scan.directions
        self.dtype = scan.dtype
        self.dt_bias = scan.dt_bias
        self.A_log: Any = None if "A" in parameters else scan.A_log
        self.D: Any = None if "D" in parameters else scan.D
        self.state_scale = None if state_scale is None else Scale(state_scale)
        self.act = nnx.Dict(
            {
                name: nnx.List([ActQuantizer(scales, spec.operand_config(name)) for scales in groups])
                for name, groups in activations.items()
            }
        )
        self.parameter_levels = nnx.Dict({name: Levels(q.values, bits=q.bits) for name, q in parameters.items()})
        self.parameter_scale = nnx.Dict({name: Scale(q.scale) for name, q in parameters.items()})

    def round_operand(self, name: str, x: Float[Array, "B L G C"]) -> Array | SplitOperand:
        if name not in self.act:
            return x
        groups = [(q, x[:, :, g]) for g, q in enumerate(self.act[name])]
        if name in ("u", "delta") and self.spec.config.splitting.pow2:  # the GPU kernel reads their levels
            return SplitOperand(tuple(q.split_for_product(part) for q, part in groups), x.shape, x.dtype)
        return jnp.stack([q.round(part) for q, part in groups], axis=2)

    def parameter(self, name: str) -> Array | None:
        if name not in self.parameter_levels:
            return None
        levels, scale = self.parameter_levels[name][...], self.parameter_scale[name][...]
        return QTensor(levels, scale, bits=8, group=levels.shape[0] // self.directions).dequantize()

    def state_transform(self, u: Array):
        return None if self.state_scale is None else round_states(self.state_scale[...], u.shape[3])
