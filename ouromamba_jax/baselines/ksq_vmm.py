"""kSQ-VMM (MLSP 2025, arXiv 2501.16738): k-scaled clusters of channels or tokens, reparameterised hidden states.

Operations round their weights and their *outputs*: linear layers, convolutions, norms, silu of the convolution,
softplus(delta), the scan's y before the skip, and the hidden state after every step. Inputs are not rounded again, and
nothing is rounded after elementwise products, so the arithmetic between is float, here as in the published code.
Published for 8 bits only; other widths are ours, with hidden states and the weights of convolutions and norms at 8.

One published rounding is left out, in the method's favour: silu(z), the gate, in clusters of channels. Vim marks z
before silu, MambaVision after it, and VMamba has no gate, so only a branch for each family could reach it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32

from ouromamba_jax.baselines.base import (
    EDGES,
    BaselineConfig,
    Step,
    linear_sites,
    read_state,
    scan_sites,
    site_reports,
    step_sizes,
    walk_scan,
)
from ouromamba_jax.baselines.ksq_grids import (
    Axis,
    best_fraction,
    cosine,
    find_clusters,
    interval,
    levels_of,
    output_scale,
    round_to,
    search_output_scale,
)
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.models.layers import SelectiveScan, as_tokens, merge_groups
from ouromamba_jax.qtensor import MIN_SCALE
from ouromamba_jax.quantize.config import QuantRule
from ouromamba_jax.quantize.modules import Levels, Scale
from ouromamba_jax.quantize.report import QuantReport
from ouromamba_jax.quantize.sites import iter_sites, set_module
from ouromamba_jax.quantize.stages import Fitted, StageInputs, quantize_stages
from ouromamba_jax.scan import selective_scan
from ouromamba_jax.scan_types import ScanOutput

ROUNDS = 3
"""How often a linear layer's scales are searched in turn: weights, then outputs."""
WIDE = 8
"""Bits of hidden states and of weights outside of linear layers."""


@dataclass(frozen=True)
class KSQConfig(BaselineConfig):
    """kSQ-VMM.

    Args:
      k: clusters of channels or tokens.
      rules: exceptions by path, first match wins.
    """

    weight_bits: int = 8
    act_bits: int = 8
    k: int = 4
    rules: tuple[QuantRule, ...] = EDGES

    def __post_init__(self):
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"k must be at least 1 cluster, not {self.k}.")


def quantize_ksq_vmm(
    model: VisionModel,
    images: Float[Array, "N H W 3"],
    config: KSQConfig,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[VisionModel, QuantReport]:
    """`model` quantised by kSQ-VMM, and the account of it.

    Raises:
      ValueError: as `quantize_stages`.
    """

    settings = config.settings(rules=config.rules)

    def fit(stage: nnx.Module, inputs: StageInputs) -> Fitted:
        captured, configs, prefix = inputs.captured, inputs.configs, inputs.name + "."
        modules: dict[str, nnx.Module] = {}
        granularity = {}
        scans = scan_sites(stage, configs)
        entering: list[tuple[Array, Array]] = []  # (u, its scales) of every scan direction
        for path, scan in scans.items():
            seen = captured[path]
            operands = (seen[name] for name in ("u", "delta", "B", "C"))
            low = calibrate_scan(scan, *operands, k=config.k, bits=configs[path].act_bits)
            modules[path] = low
            entering += [(seen["u"][:, :, g], low.u_scale[...][g]) for g in range(scan.directions)]
            granularity[path] = f"u, delta: {config.k} channel clusters; y: {config.k} token clusters; h: token"
        for path, linear in linear_sites(stage, configs).items():
            x, bits = captured[path]["act"], configs[path]
            of_input = next((scale for u, scale in entering if _same(u, x)), None)
            # The published table clusters the tokens of out_proj and of no other product.
            axis: Axis = "token" if path.endswith("out_proj") else "tensor"
            modules[path] = calibrate_linear(
                linear,
                x,
                of_input,
                axis,
                config.k,
                bits.weight_bits,
                bits.act_bits,
                search_weight=not _makes_patches(prefix + path),
            )
            granularity[path] = (
                f"weight: tensor; output: {'tensor' if axis == 'tensor' else f'{config.k} token clusters'}"
            )
        reports = site_reports(stage, modules, inputs, granularity)
        outputs = capture_outputs(stage, inputs.exact, config.batch_size)
        for path, output in outputs.items():
            resolved = settings.resolve(prefix + path)
            if resolved is not None:
                modules[path] = RoundedModule(_module(stage, path), output, k=config.k, bits=resolved.act_bits)
        return Fitted(modules, reports)

    return quantize_stages(model, images, settings, fit, progress=progress)


def _makes_patches(path: str) -> bool:
    """Convolutions that make patches, by their path in the model: in the stem, or between the levels of a pyramid."""
    return path.startswith("stem.") or ".downsample." in path


def _same(u: Array, x: Array) -> bool:
    return u.shape == x.shape and bool((u == x).all())


def _module(stage: Any, path: str) -> Any:
    return next(m for p, m in nnx.iter_modules(stage) if ".".join(map(str, p)) == path)


class RoundedLinear(nnx.Module):
    """A linear layer with one scale for its weights and a rounded output. The product is of floats: see the file."""

    def __init__(
        self, linear: nnx.Linear, weight_scale: Array, out_scale: Array, in_scale: Array | None, bits: tuple[int, int]
    ):
        self.bits = bits
        self.dtype = linear.dtype
        kernel = linear.kernel[...].astype(jnp.float32)
        self.levels = Levels(levels_of(kernel, weight_scale, bits[0]).astype(jnp.int8), bits=bits[0])
        self.weight_scale = Scale(weight_scale)
        self.out_scale = Scale(out_scale)
        self.in_scale = None if in_scale is None else Scale(in_scale)
        self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... O"]:
        tokens = as_tokens(x).astype(jnp.float32)
        _check_tokens(tokens, self.out_scale[...])
        if self.in_scale is not None:  # the scan's u, which silu rounds for both of its readers
            tokens = round_to(tokens, self.in_scale[...], self.bits[1])
        y = tokens @ (self.levels[...].astype(jnp.float32) * self.weight_scale[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)[None, None]
        y = round_to(y, self.out_scale[...], self.bits[1])
        return y.reshape(*x.shape[:-1], -1).astype(self.dtype)


def _check_tokens(x: Array, scale: Array) -> None:
    if scale.shape[0] not in (1, x.shape[1]):
        raise ValueError(
            f"this model was calibrated at {scale.shape[0]} tokens per sample and got {x.shape[1]}; "
            "quantise it again at this input size."
        )


def calibrate_linear(
    linear: nnx.Linear,
    x: Float[Array, "B L K"],
    in_scale: Array | None,
    axis: Axis,
    k: int,
    weight_bits: int,
    act_bits: int,
    *,
    search_weight: bool = True,
) -> RoundedLinear:
    """The quantised layer: scales by the cosine to the float output, weights and outputs in turn.

    Without `search_weight` the weight's scale covers its range.
    """
    kernel = linear.kernel[...].astype(jnp.float32)
    bias = jnp.zeros(kernel.shape[1:]) if linear.bias is None else linear.bias[...].astype(jnp.float32)
    exact = as_tokens(x).astype(jnp.float32) @ kernel + bias[None, None]
    weight_scale = interval(jnp.max(jnp.abs(kernel)), weight_bits)[None, None]
    member = find_clusters(exact, axis, k)
    clusters = int(member.max()) + 1
    out_scale = interval(jnp.max(jnp.abs(exact)), act_bits)[None, None]
    for _ in range(ROUNDS):
        if search_weight:
            weight_scale = _search_weight(x, kernel, bias, exact, out_scale, weight_bits, act_bits)
        produced = _product(x, kernel, bias, weight_scale, weight_bits)
        out_scale = search_output_scale(exact, produced, member, k=clusters, bits=act_bits, pow2=axis == "token")
    return RoundedLinear(linear, weight_scale, out_scale, in_scale, (weight_bits, act_bits))


@partial(jax.jit, static_argnames="bits")
def _product(x, kernel, bias, scale, bits):
    return x.astype(jnp.float32) @ (levels_of(kernel, scale, bits) * scale) + bias[None, None]


@partial(jax.jit, static_argnames=("weight_bits", "act_bits"))
def _search_weight(x, kernel, bias, exact, out_scale, weight_bits, act_bits):
    largest = interval(jnp.max(jnp.abs(kernel)), weight_bits)[None, None]

    def similarity(fraction: Array) -> Array:
        produced = _product(x, kernel, bias, largest * fraction, weight_bits)
        return jnp.mean(cosine(exact, round_to(produced, out_scale, act_bits)))

    return largest * best_fraction(similarity)


class RoundedModule(nnx.Module):
    """A convolution along tokens or maps, or a norm, with rounded weights and output.

    A convolution's output has power-of-two clusters of channels, a norm's one scale. Weights: the range, 8 bits.
    """

    def __init__(self, inner: Any, output: Float[Array, "B L C"], *, k: int, bits: int):
        self.bits = bits
        self.inner = nnx.clone(inner)
        is_conv = hasattr(inner, "kernel")
        weight = self.inner.kernel if is_conv else self.inner.scale
        value = weight[...].astype(jnp.float32)
        scale = interval(jnp.max(jnp.abs(value)), WIDE)
        weight.set_value((levels_of(value, jnp.broadcast_to(scale, value.shape), WIDE) * scale).astype(weight.dtype))
        axis: Axis = "channel" if is_conv else "tensor"
        self.out_scale = Scale(output_scale(output, axis, k=k, bits=bits, pow2=True))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = self.inner(x)
        return round_to(as_tokens(y), self.out_scale[...], self.bits).reshape(y.shape).astype(y.dtype)


def capture_outputs(stage: nnx.Module, x: Array, batch_size: int) -> dict[str, Float[Array, "B L C"]]:
    """Outputs of what has a kernel or a scale and is no site: convolutions and norms, whatever the family."""
    sites = {path for path, _ in iter_sites(stage)}
    paths = []
    for parts, module in nnx.iter_modules(stage):
        values = vars(module).values()
        computes = hasattr(module, "kernel") or hasattr(module, "scale")
        if computes and not any(isinstance(v, nnx.Module) for v in values) and ".".join(map(str, parts)) not in sites:
            paths.append(".".join(map(str, parts)))
    graphdef, state = nnx.split(stage)
    batches = [
        _capture_outputs(graphdef, tuple(paths), state, x[i : i + batch_size]) for i in range(0, len(x), batch_size)
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)


@partial(jax.jit, static_argnums=(0, 1))
def _capture_outputs(graphdef: Any, paths: tuple[str, ...], state: nnx.State, x: Array) -> dict[str, Array]:
    stage = nnx.merge(graphdef, state)
    outputs: dict[str, Array] = {}

    def spy(path: str, module: Any) -> Callable[[Array], Array]:
        def call(x: Array) -> Array:
            y = module(x)
            outputs[path] = as_tokens(y)
            return y

        return call

    for path in paths:
        set_module(stage, path, spy(path, _module(stage, path)))
    stage(x)
    return outputs


class Factors(NamedTuple):
    """Rank-one scaling of one scan's hidden states: h' = h / (channel (G, E) * token (G, L) * state (G, N))."""

    channel: Float32[Array, "G E"]
    token: Float32[Array, "G L"]
    state: Float32[Array, "G N"]


def reparameterisation(
    over_channels: Float[Array, "G E"], over_tokens: Float[Array, "G L"], over_states: Float[Array, "G N"]
) -> Factors:
    """Factors from the mean magnitude of h along each axis: rep^p + 1e-15.

    p is the share of an axis in the sum of the three standard deviations, so the axis that varies most gives most.
    """
    reps = (over_channels, over_tokens, over_states)
    spread = [jnp.std(rep, axis=1, keepdims=True) for rep in reps]
    total = jnp.maximum(spread[0] + spread[1] + spread[2], MIN_SCALE)
    return Factors(
        *(rep ** jnp.broadcast_to(s / total, rep.shape) + 1e-15 for rep, s in zip(reps, spread, strict=True))
    )


class KSQScan(SelectiveScan):
    """A selective scan with rounded u, step sizes, hidden states and y.

    Hidden states are rounded as h' = h / (r_C r_L r_D) and scaled back at once: in exact arithmetic the recurrence on
    h' with the factors moved into exp(delta A), B x and C, which is how the paper runs it. As every token has a scale
    of its own, r_L is part of it: `state_scale` is the scale of h' times r_L.
    """

    def __init__(self, scan: SelectiveScan, scales: dict[str, Array], factors: Factors, bits: int):
        self.bits = bits
        self.directions, self.dtype = scan.directions, scan.dtype
        self.dt_bias, self.A_log, self.D = scan.dt_bias, scan.A_log, scan.D
        self.u_scale = Scale(scales["u"])
        self.delta_scale = Scale(scales["delta"])
        self.y_scale = Scale(scales["y"])
        self.state_scale = Scale(scales["h"])
        self.channel_factor = Scale(factors.channel)
        self.state_factor = Scale(factors.state)

    def scan(self, u, delta, A, B, C, D, *, collect=None, state_transform=None) -> ScanOutput:
        """As `SelectiveScan.scan`."""
        _check_tokens(u, self.y_scale[...][0])
        u = _round_groups(u, self.u_scale[...], self.bits)
        delta = _round_groups(step_sizes(self, delta), self.delta_scale[...], self.bits)
        out = selective_scan(
            merge_groups(u), merge_groups(delta), A, B, C, collect=collect, state_transform=self._round_states
        )
        y = _round_groups(out.y.reshape(u.shape), self.y_scale[...], self.bits)
        y = y + D.reshape(1, 1, *u.shape[2:]) * u.astype(jnp.float32)
        return out._replace(y=y.astype(u.dtype))

    def _round_states(self, h: Float[Array, "B D N"], t: Array) -> Float[Array, "B D N"]:
        at_t = lax.dynamic_index_in_dim(self.state_scale[...], t, axis=1)  # (G, 1)
        channels, states = self.channel_factor[...], self.state_factor[...]
        scale = ((at_t * channels)[..., None] * states[:, None]).reshape(1, *h.shape[1:])
        return levels_of(h, scale, WIDE) * scale


def _round_groups(x: Float[Array, "B L G C"], scale: Float[Array, "G l c"], bits: int) -> Array:
    groups = [round_to(x[:, :, g], scale[g], bits) for g in range(x.shape[2])]
    return jnp.stack(groups, axis=2).astype(x.dtype)


def calibrate_scan(scan: SelectiveScan, u: Array, delta: Array, B: Array, C: Array, *, k: int, bits: int) -> KSQScan:
    """The quantised scan, everything found on the float scan's operands (B, L, G, E) and (B, L, G, N)."""
    _, _, A, _, _, _ = scan.operands(u, delta, B, C)
    sizes = step_sizes(scan, delta)
    y, factors = _mean_states(u, sizes, A, B, C)
    found = {"h": search_state_scales(u, sizes, A, B, C, factors)}
    clustered: tuple[tuple[str, Array, Axis], ...] = (
        ("u", u, "channel"),
        ("delta", sizes, "channel"),
        ("y", y, "token"),
    )
    for name, x, axis in clustered:
        scale = partial(output_scale, axis=axis, k=k, bits=bits, pow2=axis == "token")
        found[name] = jnp.stack([scale(x[:, :, g]) for g in range(scan.directions)])
    return KSQScan(scan, found, factors, bits)


@jax.jit
def _mean_states(u, delta, A, B, C) -> tuple[Array, Factors]:
    """(y without the skip, the factors)."""

    def observe(step: Step):
        size = jnp.mean(jnp.abs(step.h), axis=0)
        return jnp.mean(size, axis=2), jnp.mean(size, axis=1)

    y, _, (channels, states) = walk_scan(u, delta, A, B, C, observe=observe)  # (L, G, E), (L, G, N)
    return y, reparameterisation(jnp.mean(channels, axis=0), jnp.mean(channels, axis=2).T, jnp.mean(states, axis=0))


@jax.jit
def search_state_scales(u, delta, A, B, C, factors: Factors) -> Float32[Array, "G L"]:
    """Scale of h / (r_C r_D) after every token, by direction.

    For the largest cosine, over channels, of the next token's y; of the last token's own y at the end.
    """
    rank_one = (factors.channel[:, :, None] * factors.state[:, None])[None]  # (1, G, E, N)

    def search(h: Array, decay: Array, add: Array, C: Array) -> Array:
        scaled = h / rank_one
        start = interval(jnp.max(jnp.abs(scaled), axis=(0, 2, 3)), WIDE)
        exact = read_state(decay * h + add, C)

        def similarity(fraction: Array) -> Array:
            scale = (start * fraction)[None, :, None, None]
            rounded = levels_of(scaled, scale, WIDE) * scale * rank_one
            return jnp.mean(cosine(exact, read_state(decay * rounded + add, C)), axis=0)

        return start * best_fraction(similarity)

    def observe(step: Step):
        return search(step.h_before, step.decay, step.add, step.C)

    _, last, scales = walk_scan(u, delta, A, B, C, observe=observe)  # (L, G), of the state before each token
    last = last.reshape(last.shape[0], *rank_one.shape[1:])
    one, none = jnp.ones_like(last), jnp.zeros_like(last)
    of_last = search(last, one, none, C[:, -1].astype(jnp.float32))
    return jnp.concatenate([scales[1:], of_last[None]]).T
