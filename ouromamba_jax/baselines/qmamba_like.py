"""QMamba-like: temporal groups for activations and hidden states, a long-tailed grid for exp(delta A).

A stand-in made from the abstract of QMamba (arXiv 2501.13624), not a re-implementation: its equations, its grids, its
number of groups and its code were not to be had. So these results say nothing about QMamba's own, neither for nor
against its published numbers, and "QMamba-like" is the name wherever they are shown.

From the abstract: temporal groups for hidden states, and a grid for the long tail of exp(delta A). Ours: such groups
for the inputs of linear layers, too; equal groups of consecutive tokens in scan order; every grid by a search for the
smallest 2.4 norm of the error; and the long-tailed grid below.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from ouromamba_jax.baselines.base import SCAN_INPUTS, BaselineConfig, linear_sites, scan_sites, site_reports
from ouromamba_jax.baselines.scans import RoundedScan, add_skip, walk_scan
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.ops.qtensor import (
    FULL_RANGE_FRACTIONS,
    MIN_SCALE,
    SEARCH_NORM,
    max_level,
    quantize_with_scale,
    search_scale,
    search_weight_scale,
)
from ouromamba_jax.ops.scan_types import ScanOutput
from ouromamba_jax.ops.split_calibration import Calibration
from ouromamba_jax.quantize.activation import ActQuantizer, Calibrated, SiteSpec
from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.linear import QuantLinear
from ouromamba_jax.quantize.report import QuantReport
from ouromamba_jax.quantize.stages import Fitted, Progress, StageInputs, quantize_stages

OCTAVES = tuple(float(n) for n in range(1, 17))
"""Candidates for how far the long-tailed grid reaches towards 1."""
STATE_FRACTIONS = tuple(i / 20 for i in range(1, 21))
"""Candidates for the scales of hidden states, as parts of a group's range."""


@dataclass(frozen=True)
class QMambaLikeConfig(BaselineConfig):
    """A stand-in for QMamba, whose own numbers it says nothing about.

    Weights are symmetric per output channel; inputs of linear layers and hidden states symmetric with one scale per
    temporal group (and scan direction); exp(delta A) takes the long-tailed grid, one per direction. All else is float.

    Args:
      groups: temporal groups per sequence; fewer tokens than groups make one group each.
    """

    groups: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, not {self.groups}.")


def quantize_qmamba_like(
    model: VisionModel,
    images: Float[Array, "N H W I"],
    config: QMambaLikeConfig,
    *,
    progress: Progress | None = None,
) -> tuple[VisionModel, QuantReport]:
    """`model` quantised in the manner of QMamba, and the account of it.

    Raises:
      ValueError: as `quantize_stages`.
    """

    def fit(stage: nnx.Module, inputs: StageInputs) -> Fitted:
        modules: dict[str, nnx.Module] = {}
        granularity = {}
        for path, linear in linear_sites(stage, inputs.configs).items():
            modules[path] = _linear(linear, inputs.captured[path]["input"], inputs.configs[path], config.groups)
            granularity[path] = f"weight: output channel; input: {config.groups} groups of tokens"
        for path, scan in scan_sites(stage, inputs.configs).items():
            seen = [inputs.captured[path][name] for name in SCAN_INPUTS]
            modules[path] = calibrate_scan(scan, *seen, bits=inputs.configs[path].act_bits, groups=config.groups)
            granularity[path] = f"exp(delta A): direction; h: direction x {config.groups} groups of tokens"
        return Fitted(modules, site_reports(stage, modules, inputs, granularity))

    return quantize_stages(model, images, config.settings(), fit, progress=progress)


def token_groups(tokens: int, groups: int) -> np.ndarray:
    """The group of every token: consecutive tokens, sizes that differ by one at most."""
    return np.arange(tokens) * min(groups, tokens) // tokens


def search_group_scales(x: Float[Array, "B L C"], bits: int, groups: int) -> Float32[Array, " L"]:
    """One static scale per temporal group, repeated for each of its tokens."""
    member = token_groups(x.shape[1], groups)
    limit = jnp.float32(max_level(bits))
    scales = [_search(x[:, member == g], limit) for g in range(member[-1] + 1)]
    return jnp.stack(scales)[member]


@jax.jit
def _search(x: Array, limit: Array) -> Array:
    return search_scale(x, limit, axes=(0, 1, 2), fractions=FULL_RANGE_FRACTIONS)[0, 0, 0]


def _linear(linear: nnx.Linear, x: Array, config: QuantConfig, groups: int) -> QuantLinear:
    kernel = linear.kernel[...].astype(jnp.float32)
    weight = quantize_with_scale(kernel, search_weight_scale(kernel, config.weight_bits), config.weight_bits)
    spec = SiteSpec(config, tokens=x.shape[1], channels=x.shape[2])
    act = ActQuantizer(Calibration(search_group_scales(x, config.act_bits, groups)), config)
    return QuantLinear(weight, None if linear.bias is None else linear.bias[...], act, spec, linear.dtype)


def round_long_tail(
    decay: Float[Array, "..."], largest: Float[Array, "..."], octaves: Float[Array, "..."], bits: int
) -> Float[Array, "..."]:
    """Round a in (0, 1] on 2^bits levels that are dense near 1 and sparse towards 0.

    Levels: a = 1, and 1 - a = largest * 2^(-octaves * k / K) for k = 0 .. K = 2^bits - 2. Rounding is to the nearest
    exponent; below half of the smallest step, a becomes 1. `largest` and `octaves` have decay's rank.
    """
    count = 2**bits - 2
    distance = jnp.clip((1 - decay) / largest, 0.0, 1.0)
    exponent = -jnp.log2(jnp.maximum(distance, 2.0**-60)) * (count / octaves)
    level = largest * jnp.exp2(-octaves / count * jnp.clip(jnp.round(exponent), 0, count))
    return 1 - jnp.where(distance < 0.5 * jnp.exp2(-octaves), 0.0, level)


class QMambaLikeScan(RoundedScan):
    """A selective scan with exp(delta A) on the long-tailed grid and h rounded after every step."""

    def __init__(self, scan: SelectiveScan, largest: Array, octaves: Array, state_scale: Array, bits: int):
        super().__init__(scan, state_scale, bits)
        self.largest = Calibrated(largest)
        self.octaves = Calibrated(octaves)

    def scan(self, u, delta, A, B, C, D, *, collect=None, state_transform=None) -> ScanOutput:
        """As `SelectiveScan.scan`; `collect` sees the rounded states (B, D, N)."""
        self._check(u)
        limit, scales = float(max_level(self.bits)), self.state_scale[...]

        def round_decay(decay: Array) -> Array:
            return round_long_tail(decay, _per_group(self.largest[...]), _per_group(self.octaves[...]), self.bits)

        def round_state(h: Array, t: Array) -> Array:
            s = _per_group(jax.lax.dynamic_index_in_dim(scales, t, axis=1, keepdims=False))
            return s * jnp.clip(jnp.round(h / s), -limit, limit)

        delta = self.step_sizes(delta)
        y, last, states = walk_scan(
            u, delta, A, B, C, round_decay=round_decay, round_state=round_state, collect=collect
        )
        return ScanOutput(add_skip(y, D, u), last, states)


def _per_group(x: Float[Array, " G"]) -> Float[Array, "1 G 1 1"]:
    return x[None, :, None, None]


def calibrate_scan(
    scan: SelectiveScan, u: Array, delta: Array, B: Array, C: Array, *, bits: int, groups: int
) -> QMambaLikeScan:
    """The quantised scan, its grids found on the float scan's operands (B, L, G, E) and (B, L, G, N)."""
    member = token_groups(u.shape[1], groups)
    _, _, A, _, _, _ = scan.operands(u, delta, B, C)
    sizes = scan.step_sizes(delta)
    largest, octaves, scale = _find_grids(u, sizes, A, B, C, member, bits, int(member[-1]) + 1)
    return QMambaLikeScan(scan, largest, octaves, scale[:, member], bits)


@partial(jax.jit, static_argnums=(6, 7))
def _find_grids(u, delta, A, B, C, member, bits, groups):
    """(largest (G,), octaves (G,), state scales (G, groups)), each of the smallest 2.4 norm of the error."""
    directions = u.shape[2]
    steepest = jnp.max(delta, axis=(0, 1))[..., None] * -A.reshape(directions, -1, A.shape[1])
    largest = jnp.maximum(1 - jnp.exp(-jnp.max(steepest, axis=(1, 2))), MIN_SCALE)
    limit = float(max_level(bits))
    candidates = jnp.asarray(OCTAVES, jnp.float32)
    fractions = jnp.asarray(STATE_FRACTIONS, jnp.float32)

    def error(exact: Array, rounded: Array) -> Array:
        # exp and log are vectorised on CPU, a power is not; log(0) = -inf gives 0 again.
        return jnp.sum(jnp.exp(SEARCH_NORM * jnp.log(jnp.abs(exact - rounded))), axis=(0, 2, 3))

    def decay_errors(decay: Array) -> Array:
        def of(n: Array) -> Array:
            return error(decay, round_long_tail(decay, _per_group(largest), jnp.full((1, 1, 1, 1), n), bits))

        return jax.lax.map(of, candidates)

    _, _, (highest, decays) = walk_scan(
        u, delta, A, B, C, observe=lambda s: (jnp.max(jnp.abs(s.h), axis=(0, 2, 3)), decay_errors(s.decay))
    )
    octaves = candidates[jnp.argmin(jnp.sum(decays, axis=0), axis=0)]
    ranges = jnp.maximum(jax.ops.segment_max(highest, member, groups), MIN_SCALE) / limit  # (groups, G)

    def state_errors(h: Array, t: Array) -> Array:
        def of(fraction: Array) -> Array:
            s = _per_group(fraction * ranges[member[t]])
            return error(h, s * jnp.clip(jnp.round(h / s), -limit, limit))

        return jax.lax.map(of, fractions)

    _, _, states = walk_scan(u, delta, A, B, C, observe=lambda s: state_errors(s.h, s.t))  # (L, fractions, G)
    best = fractions[jnp.argmin(jax.ops.segment_sum(states, member, groups), axis=1)]
    return largest, octaves, (best * ranges).T
