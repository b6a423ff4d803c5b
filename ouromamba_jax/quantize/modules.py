"""What replaces a model's matmuls, scans and marked tensors once it is quantised."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ouromamba_jax.matmul import outlier_matmul
from ouromamba_jax.models.layers import QuantPoint, SelectiveScan, as_tokens
from ouromamba_jax.outlier_types import OutlierSplit
from ouromamba_jax.outliers import merge, split_outliers
from ouromamba_jax.qtensor import QTensor
from ouromamba_jax.quantize.config import QuantConfig, QuantRule
from ouromamba_jax.released import quantize_asymmetric
from ouromamba_jax.scan_types import ScanOutput
from ouromamba_jax.split_operand import SplitOperand, floats

Site = nnx.Linear | SelectiveScan | QuantPoint
ACTIVATION_OPERANDS = ("u", "delta", "B", "C", "y")
PARAMETER_OPERANDS = ("A", "D")


class Levels(nnx.Variable):
    """Integer levels (rows, columns) of a weight or scan parameter; its metadata `bits` is what they need at rest."""


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

    @classmethod
    def zeros(cls, config: QuantConfig, tokens: int, channels: int, *, operand: str = "") -> "ActScales":
        """Placeholders of the right shapes."""
        return cls(
            scale=jnp.zeros((tokens,)),
            theta=jnp.zeros((tokens,)) if config.threshold == "offline" else None,
            channels=jnp.zeros((channels,), bool) if config.detection == "static" else None,
            zero=jnp.zeros((tokens,)) if is_asymmetric(operand, config) else None,
        )


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

    def split(self, x: Float[Array, "B L C"]) -> OutlierSplit:
        """Inliers, outliers and their scales.

        Raises:
          ValueError: if x has another number of tokens than the calibration had.
        """
        self._check(x)
        theta = None if self.theta is None else self.theta[...]
        channels = None if self.channels is None else self.channels[...]
        return split_outliers(x, self.scale[...], self.config, theta=theta, channels=channels)

    def round(self, x: Float[Array, "B L C"]) -> tuple[Float[Array, "B L C"], Bool[Array, "B L C"]]:
        """(x after rounding, in float32; where its outliers are). Raises as `split` does."""
        if self.zero is None:
            split = self.split(x)
            return merge(split), split.mask
        self._check(x)
        return quantize_asymmetric(x, self.scale[...], self.zero[...], self.config)

    def _check(self, x: Array) -> None:
        if x.shape[1] != self.scale.shape[0]:
            raise ValueError(
                f"this model was calibrated at {self.scale.shape[0]} tokens per sample and got {x.shape[1]}; "
                "quantise it again at this input size."
            )


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
    def weight(self) -> QTensor:
        config = self.spec.config
        return QTensor(self.levels[...], self.weight_scale[...], bits=config.weight_bits, group=config.weight_group)

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... O"]:
        y = outlier_matmul(self.act.split(as_tokens(x)), self.weight)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)[None, None]
        return y.reshape(*x.shape[:-1], -1).astype(self.dtype)


class RoundedOperands:
    """How a scan runs on rounded operands; the quantised scan and its trainable stand-in share it.

    They supply the three methods that raise here.
    """

    spec: SiteSpec
    directions: int
    A_log: Any
    D: Any
    dt_bias: Any
    delta_bias: Callable[[Array], Array]

    def _round(self, name: str, x: Float[Array, "B L G C"]) -> Array | SplitOperand:
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
        """`operands`; what `_round` leaves in integers stays so."""
        if is_asymmetric("delta", self.spec.config):  # the published code rounds delta with its bias on
            bias = self.delta_bias(delta)
            steps: Any = floats(self._round("delta", delta + bias)) - bias
        else:
            steps = self._round("delta", delta)
        A, D = self.parameter("A"), self.parameter("D")
        A = -jnp.exp(self.A_log[...].astype(jnp.float32)) if A is None else A
        D = self.D[...].astype(jnp.float32) if D is None else D[:, 0]
        return self._round("u", u), steps, A, self._round("B", B), self._round("C", C), D

    def scan(self: Any, u, delta, A, B, C, D, *, collect=None) -> ScanOutput:
        transform = self.state_transform(u)
        out = SelectiveScan.scan(self, u, delta, A, B, C, D, collect=collect, state_transform=transform)
        return out._replace(y=floats(self._round("y", out.y)))


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

    def _round(self, name: str, x: Float[Array, "B L G C"]) -> Array | SplitOperand:
        if name not in self.act:
            return x
        groups = [(q, x[:, :, g]) for g, q in enumerate(self.act[name])]
        if is_asymmetric(name, self.spec.config):
            return jnp.stack([q.round(part)[0] for q, part in groups], axis=2).astype(x.dtype)
        return SplitOperand(tuple(q.split(part) for q, part in groups), x.shape, x.dtype)

    def parameter(self, name: str) -> Array | None:
        if name not in self.parameter_levels:
            return None
        levels, scale = self.parameter_levels[name][...], self.parameter_scale[name][...]
        return QTensor(levels, scale, bits=8, group=levels.shape[0] // self.directions).dequantize()

    def state_transform(self, u: Array):
        return None if self.state_scale is None else round_states(self.state_scale[...], u.shape[3])


class QuantizedPoint(QuantPoint):
    """A marked tensor, rounded by Algorithm 2."""

    def __init__(self, scales: ActScales, spec: SiteSpec):
        self.spec = spec
        self.act = ActQuantizer(scales, spec.config)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        return self.act.round(as_tokens(x))[0].reshape(x.shape).astype(x.dtype)


@jax.custom_jvp
def straight_through_round(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds half to even; its derivative is taken as 1."""
    return jnp.round(x)


@straight_through_round.defjvp
def _straight_through_round_jvp(primals, tangents):
    return straight_through_round(*primals), tangents[0]


def round_states(scale: Float[Array, "G L"], channels: int) -> Callable[[Array, Array], Array]:
    """Rounds h (B, D, N) after step t to 8 bits, one scale per direction and time step; straight-through gradients."""
    per_channel = jnp.repeat(scale, channels, axis=0)  # (D, L)

    def transform(h: Float[Array, "B D N"], t: Array) -> Array:
        s = jax.lax.dynamic_index_in_dim(per_channel, t, axis=1)[None]  # (1, D, 1)
        return s * jnp.clip(straight_through_round(h / s), -127.0, 127.0)

    return transform


def iter_sites(model: nnx.Module) -> Iterator[tuple[str, Site]]:
    """(dotted path, module) of everything that can be quantised: linear layers, selective scans, marked tensors."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear | SelectiveScan | QuantPoint):
            yield ".".join(map(str, path)), module


def set_module(model: Any, path: str, new: Any) -> None:
    """Replaces the submodule at the dotted `path`."""
    *parents, last = path.split(".")
    for name in parents:
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    if last.isdigit():
        model[int(last)] = new
    else:
        setattr(model, last, new)


def quantized_specs(model: nnx.Module) -> dict[str, SiteSpec]:
    """The spec of every quantised site by path; empty for a float model."""
    kinds = (QuantLinear, QuantSelectiveScan, QuantizedPoint)
    return {".".join(map(str, p)): m.spec for p, m in nnx.iter_modules(model) if isinstance(m, kinds)}


def apply_specs(model: nnx.Module, specs: dict[str, SiteSpec]) -> nnx.Module:
    """Puts empty quantised modules at the sites of `specs` into a float model, and returns it.

    Raises:
      ValueError: if the model has no such site.
    """
    sites = dict(iter_sites(model))
    for path, spec in specs.items():
        if path not in sites:
            raise ValueError(f"the model has no site {path!r} to quantise")
        set_module(model, path, _empty(sites[path], spec))
    return model


def _empty(site: Site, spec: SiteSpec) -> nnx.Module:
    config = spec.config
    if isinstance(site, nnx.Linear):
        inputs, outputs = site.kernel.shape
        groups = 1 if config.weight_group is None else inputs // config.weight_group
        weight = QTensor(
            jnp.zeros((inputs, outputs), jnp.int8),
            jnp.zeros((groups, outputs)),
            bits=config.weight_bits,
            group=config.weight_group,
        )
        bias = None if site.bias is None else site.bias[...].astype(config.float_dtype)
        return QuantLinear(weight, bias, ActScales.zeros(config, spec.tokens, inputs), spec, site.dtype)
    if isinstance(site, SelectiveScan):
        rows, states = site.A_log.shape
        channels = {"B": states, "C": states}
        activations = {
            name: [
                ActScales.zeros(
                    spec.operand_config(name), spec.tokens, channels.get(name, rows // site.directions), operand=name
                )
                for _ in range(site.directions)
            ]
            for name in ACTIVATION_OPERANDS
            if name in config.operands
        }
        parameters = {
            name: QTensor(
                jnp.zeros((rows, width), jnp.int8),
                jnp.zeros((site.directions, width)),
                bits=8,
                group=rows // site.directions,
            )
            for name, width in (("A", states), ("D", 1))
            if name in config.operands
        }
        state_scale = jnp.zeros((site.directions, spec.tokens)) if "h" in config.operands else None
        return QuantSelectiveScan(site, activations, parameters, state_scale, spec)
    return QuantizedPoint(ActScales.zeros(config, spec.tokens, spec.channels), spec)


def spec_to_json(spec: SiteSpec) -> dict[str, Any]:
    """A SiteSpec as plain JSON values."""
    return {"tokens": spec.tokens, "channels": spec.channels, "config": dataclasses.asdict(spec.config)}


def spec_from_json(data: dict[str, Any]) -> SiteSpec:
    """The inverse of `spec_to_json`."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["config"].items()}
    fields["rules"] = tuple(QuantRule(**rule) for rule in fields["rules"])
    return SiteSpec(config=QuantConfig(**fields), tokens=int(data["tokens"]), channels=int(data["channels"]))
