"""The selective scan on rounded operands: calibrated, as a trainable stand-in, quantised, and measured."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.models.layers import SelectiveScan, apart
from ouromamba_jax.models.unlisted import unlisted
from ouromamba_jax.ops.passes import Ask, Asking, together
from ouromamba_jax.ops.qtensor import MIN_SCALE, QTensor, max_level
from ouromamba_jax.ops.scan_types import Product, Routed, ScanOutput, Unsplit
from ouromamba_jax.ops.split_calibration import Calibration
from ouromamba_jax.quantize.activation import (
    ActQuantizer,
    Calibrated,
    Levels,
    SiteSpec,
    calibrating_activation,
    check_tokens,
    empty_calibration,
    shape_of,
)
from ouromamba_jax.quantize.config import ACTIVATION_OPERANDS, PARAMETER_OPERANDS, QuantConfig
from ouromamba_jax.quantize.report import Measured, compare
from ouromamba_jax.quantize.rounding import (
    fake_parameter,
    quantize_parameter,
    round_states,
    scan_parameter,
    search_parameter_scale,
)


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

    def round_operand(self, name: str, x: Float[Array, "B L G C"]) -> Array:
        raise NotImplementedError

    def parameter(self, name: str) -> Float[Array, "D N"] | None:
        """A (D, N) or D (D, 1) after rounding, in float; None if it stays as it is."""
        raise NotImplementedError

    def state_transform(self, u: Array) -> Callable[[Array, Array], Array] | None:
        """What happens to h after every step, for `selective_scan`."""
        raise NotImplementedError

    def __call__(self, u: Array, delta: Array, B: Array, C: Array, *, collect: Any = None) -> ScanOutput:
        return self.scan(*self.operands(u, delta, B, C), collect=collect)

    def operands(self, u: Array, delta: Array, B: Array, C: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
        return self.round_operand("u", u), self.round_operand("delta", delta), *self.all_but_tokens(B, C)

    def all_but_tokens(self, B: Array, C: Array) -> tuple[Array, Array, Array, Array]:
        """A, B, C and D as the scan uses them."""
        B, C = self.round_operand("B", B), self.round_operand("C", C)
        A, D = self.parameter("A"), self.parameter("D")
        A = self.decay_rates() if A is None else A
        return A, B, C, self.D[...].astype(jnp.float32) if D is None else D[:, 0]

    @unlisted
    def scan(self: Any, u, delta, A, B, C, D, *, collect=None) -> ScanOutput:
        transform = self.state_transform(u)
        out = SelectiveScan.scan(self, u, delta, A, B, C, D, collect=collect, state_transform=transform)
        return out._replace(y=self.round_operand("y", out.y))


class QuantSelectiveScan(RoundedOperands, SelectiveScan):
    """A selective scan whose operands are rounded: activations by Algorithm 2 per direction, A and D once."""

    def __init__(
        self,
        scan: SelectiveScan,
        activations: dict[str, list[ActQuantizer]],
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
        self.state_scale = None if state_scale is None else Calibrated(state_scale)
        self.act = nnx.Dict({name: nnx.List(quantizers) for name, quantizers in activations.items()})
        self.parameter_levels = nnx.Dict({name: Levels(q.values, bits=q.bits) for name, q in parameters.items()})
        self.parameter_scale = nnx.Dict({name: Calibrated(q.scale) for name, q in parameters.items()})

    @unlisted
    def __call__(self, u: Array, delta: Array, B: Array, C: Array, *, collect: Any = None) -> ScanOutput:
        if self.state_scale is not None:  # the states are rounded, too, for which no kernel stops
            return super().__call__(u, delta, B, C, collect=collect)
        others = self.all_but_tokens(B, C)
        return self.scan(self._unsplit("u", u), self._unsplit("delta", delta), *others, collect=collect)

    @unlisted
    def of_map(self, x: Float[Array, "B H W E"], orders: Any, delta: Array, B: Array, C: Array) -> ScanOutput:
        """`models.layers.scan_map`: u is read from the map."""
        tokens, grid = x.reshape(x.shape[0], -1, x.shape[3]), (x.shape[1], x.shape[2])
        u: Any = tuple(Routed(tokens, grid, transpose, reverse) for transpose, reverse in orders)
        if self.state_scale is not None or "u" in self.act:
            return self(jnp.stack([route.merge() for route in u], axis=2), delta, B, C)
        return self.scan(u, self._unsplit("delta", delta), *self.all_but_tokens(B, C))

    @property
    def takes_products(self) -> bool:
        """Whether delta may come as a tuple of `Product` (see `models.layers.projected`)."""
        return self.state_scale is None and "delta" in self.act

    def _unsplit(self, name: str, x: Any) -> Array | tuple[Unsplit, ...]:
        """An operand of the scan, which splits it where it reads it."""
        if name not in self.act:
            return x
        return tuple(quantizer.unsplit(part) for quantizer, part in zip(self.act[name], apart(x), strict=True))

    @unlisted
    def round_operand(self, name: str, x: Any) -> Array:
        if name not in self.act:
            return x
        parts = [part.value if isinstance(part, Product) else part for part in apart(x)]
        return jnp.stack([quantizer.round(part) for quantizer, part in zip(self.act[name], parts, strict=True)], axis=2)

    @unlisted
    def parameter(self, name: str) -> Array | None:
        if name not in self.parameter_levels:
            return None
        levels, scale = self.parameter_levels[name][...], self.parameter_scale[name][...]
        return QTensor(levels, scale, bits=8, group=levels.shape[0] // self.directions).dequantize()

    @unlisted
    def state_transform(self, u: Array):
        if self.state_scale is None:
            return None
        check_tokens(u, self.state_scale.shape[1])
        return round_states(self.state_scale[...], u.shape[3])


class FakeSelectiveScan(RoundedOperands):
    """`QuantSelectiveScan` with straight-through gradients to every scale."""

    def __init__(self, scan: SelectiveScan, spec: SiteSpec, calibrated: dict[str, Any]):
        self.spec, self.calibrated = spec, calibrated
        self.directions, self.D, self.dt_bias = scan.directions, scan.D, scan.dt_bias
        self.decay_rates, self.delta_bias = scan.decay_rates, scan.delta_bias

    def round_operand(self, name: str, x: Float[Array, "B L G C"]) -> Array:
        if name not in self.calibrated:
            return x
        config = _settings(self.spec.config, name).splitting
        groups = [found.fake(x[:, :, g], config) for g, found in enumerate(self.calibrated[name])]
        return jnp.stack(groups, axis=2).astype(x.dtype)

    def parameter(self, name: str) -> Array | None:
        if name not in self.calibrated:
            return None
        return fake_parameter(scan_parameter(self, name), self.calibrated[name], self.spec.config)

    def state_transform(self, u: Array):
        return None if "h" not in self.calibrated else round_states(self.calibrated["h"], u.shape[3])


def _settings(config: QuantConfig, operand: str) -> QuantConfig:
    """Settings of one operand: delta's outliers lie one standard deviation further out (released code)."""
    return dataclasses.replace(config, sigma=config.sigma + 1) if operand == "delta" else config


def record(
    scan: SelectiveScan, config: QuantConfig, u: Array, delta: Array, B: Array, C: Array
) -> tuple[ScanOutput, dict[str, Array]]:
    """What the scan returns, and what calibration needs to see: its operands, y and the largest |h| per direction."""

    def largest(h: Array) -> Array:  # (B, G): what a scale per direction and step must cover
        return jnp.max(jnp.abs(h.reshape(h.shape[0], scan.directions, -1)), axis=-1)

    out = scan(u, delta, B, C, collect=largest if "h" in config.operands else None)
    seen = {"u": u, "delta": delta, "B": B, "C": C, "y": out.y}
    return out, seen if out.states is None else {**seen, "h": out.states}


def calibrate(
    scan: SelectiveScan, config: QuantConfig, of: Callable[[Any], dict[str, Array]]
) -> Asking[tuple[SiteSpec, dict[str, Any]]]:
    """(spec, found): a Calibration per direction for each activation; scales (G, N) of A, (G, 1) of D, (G, L) of h.

    `of` finds in a batch what `record` saw.
    """

    def direction(name: str, g: int, batch: Any) -> Array:
        return of(batch)[name][:, :, g]

    names = [name for name in ACTIVATION_OPERANDS if name in config.operands]
    asked: dict[str, Asking[Any]] = {
        f"{name}.{g}": calibrating_activation(_settings(config, name), partial(direction, name, g))
        for name in names
        for g in range(scan.directions)
    }
    asked["shape"] = shape_of(lambda batch: of(batch)["u"])
    if "h" in config.operands:
        asked["h"] = _largest_states(of)
    made = yield from together(asked)
    found: dict[str, Any] = {name: [made[f"{name}.{g}"] for g in range(scan.directions)] for name in names}
    two_bytes = [f"{name}.{g}" for name in names for g, c in enumerate(found[name]) if c.shift is not None]
    for name in PARAMETER_OPERANDS:
        if name in config.operands:
            found[name] = search_parameter_scale(scan_parameter(scan, name), scan.directions, config)
    if "h" in config.operands:
        found["h"] = jnp.maximum(made["h"].T / max_level(8), MIN_SCALE)  # a state may be 0 on all images
    tokens, channels = made["shape"]
    return SiteSpec(config, tokens, channels, tuple(two_bytes)), found


def _largest_states(of: Callable[[Any], dict[str, Array]]) -> Asking[Float[Array, "L G"]]:
    return (yield Ask(lambda batch: jnp.max(of(batch)["h"], axis=0), jnp.maximum))


def fake(scan: SelectiveScan, spec: SiteSpec, calibrated: dict[str, Any]) -> FakeSelectiveScan:
    return FakeSelectiveScan(scan, spec, calibrated)


def make(scan: SelectiveScan, spec: SiteSpec, calibrated: dict[str, Any]) -> QuantSelectiveScan:
    config = spec.config
    activations = {
        name: [ActQuantizer(found, _settings(config, name)) for found in calibrated[name]]
        for name in ACTIVATION_OPERANDS
        if name in calibrated
    }
    parameters = {
        name: quantize_parameter(scan_parameter(scan, name), calibrated[name], config)
        for name in PARAMETER_OPERANDS
        if name in calibrated
    }
    return QuantSelectiveScan(scan, activations, parameters, calibrated.get("h"), spec)


def empty(scan: SelectiveScan, spec: SiteSpec) -> dict[str, Any]:
    """What `calibrate` would return beside the spec, as zeros."""
    operands, directions = spec.config.operands, scan.directions
    rows, states = scan.A_log.shape
    widths = {"u": rows // directions, "delta": rows // directions, "B": states, "C": states, "y": rows // directions}

    def activation(name: str, g: int) -> Calibration:
        settings, two_bytes = _settings(spec.config, name), f"{name}.{g}" in spec.two_bytes
        return empty_calibration(settings, spec.tokens, widths[name], two_bytes=two_bytes)

    found: dict[str, Any] = {
        name: [activation(name, g) for g in range(directions)] for name in ACTIVATION_OPERANDS if name in operands
    }
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    found |= {name: zeros((directions, n)) for name, n in (("A", states), ("D", 1)) if name in operands}
    if "h" in operands:
        found["h"] = zeros((directions, spec.tokens))
    return found


def measure(scan: SelectiveScan, module: QuantSelectiveScan, seen: dict[str, Array]) -> dict[str, Measured]:
    """Every operand after rounding against itself, all directions together; h by what it does to y, all else exact."""
    found = {}
    for name, quantizers in module.act.items():
        splits = [quantizer.split(seen[name][:, :, g]) for g, quantizer in enumerate(quantizers)]
        merged = jnp.stack([split.merge() for split in splits], axis=2)
        listed = jnp.stack([split.listed() for split in splits], axis=2)
        found[name] = compare(seen[name], merged, listed)
    for name, levels in module.parameter_levels.items():
        beyond = jnp.abs(levels[...].astype(jnp.int32)) > max_level(module.spec.config.splitting.act_bits)
        rounded: Any = module.parameter(name)
        found[name] = compare(scan_parameter(scan, name), rounded, beyond)
    if module.state_scale is not None:
        operands = scan.operands(*(seen[name] for name in ("u", "delta", "B", "C")))
        y = scan.scan(*operands, state_transform=module.state_transform(seen["u"])).y
        found["h"] = compare(seen["y"], y)
    return found


def describe(name: str, spec: SiteSpec) -> dict[str, Any]:
    """Kind, bits and granularity of one operand for the report."""
    config = spec.config
    facts = dict(weight_bits=None, act_bits=config.act_bits, outlier_bits=config.splitting.outlier_bits)
    facts["second_byte"] = any(entry.startswith(f"{name}.") for entry in spec.two_bytes)
    if name in PARAMETER_OPERANDS:
        max_outlier_bits = config.act_bits if config.splitting.detection == "none" else 8
        granularity = "direction x state" if name == "A" else "direction"
        return dict(facts, kind="parameter", granularity=granularity, outlier_bits=max_outlier_bits)
    if name == "h":
        return dict(facts, kind="operand", granularity="direction x token", act_bits=8, outlier_bits=None)
    return dict(facts, kind="operand", granularity="direction x token")
