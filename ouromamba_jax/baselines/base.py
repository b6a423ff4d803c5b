"""What the published rivals share: settings, the account of a site, and a scan walked step by step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.quantize.config import QuantConfig, QuantRule
from ouromamba_jax.quantize.report import SiteReport
from ouromamba_jax.quantize.sites import iter_sites
from ouromamba_jax.quantize.stages import StageInputs

EDGES = (QuantRule(r"^(stem|head)\.", weight_bits=8, act_bits=8),)
"""The first and the last layer at 8 bits, as in the presets of `QuantConfig`."""


@dataclass(frozen=True)
class BaselineConfig:
    """Widths of a rival and how its calibration is run; every method adds its own fields.

    Args:
      weight_bits: 2 to 8.
      act_bits: 2 to 8.
      batch_size: images per step of calibration.
      float_dtype: type in which parameters that stay float are kept.
    """

    weight_bits: int = 4
    act_bits: int = 4
    batch_size: int = 16
    float_dtype: str = "float16"

    def __post_init__(self):
        self.settings()

    def settings(self, **fields: Any) -> QuantConfig:
        """The same widths as settings of sites, without outliers.

        Raises:
          ValueError: for widths that do not exist.
        """
        common = dict(detection="none", outlier_bits=8, operands=(), tune_epochs=0)
        return QuantConfig(
            **{**common, **fields},
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            batch_size=self.batch_size,
            float_dtype=self.float_dtype,
        )


def site_reports(
    stage: nnx.Module, modules: dict[str, nnx.Module], inputs: StageInputs, granularity: dict[str, str]
) -> tuple[SiteReport, ...]:
    """What `modules` cost at the sites of a float stage: of a linear layer its product, of a scan its output y.

    Signal and noise are taken on the float model's activations. A linear layer's bias is in neither.

    Args:
      granularity: which entries share a scale, in words, for every site to report.
    """
    if not granularity:
        return ()
    sites = dict(iter_sites(stage))
    seen = []
    for path in granularity:
        names = ("u", "delta", "B", "C") if isinstance(sites[path], SelectiveScan) else ("act",)
        seen.append(tuple(inputs.captured[path][name] for name in names))
    splits = [nnx.split(module) for path in granularity for module in (sites[path], modules[path])]
    graphdefs, states = zip(*splits, strict=True)
    images, size = len(inputs.exact), next(iter(inputs.configs.values())).batch_size

    def part(start: int, x: Array) -> Array:  # a site may see several samples, windows, of each image
        samples = len(x) // images
        return x[start * samples : (start + size) * samples]

    sums = [
        np.asarray(_signal_and_noise(graphdefs, states, jax.tree.map(partial(part, i), seen)))
        for i in range(0, images, size)
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        signal, noise = np.sum(np.asarray(sums, np.float64), axis=0).T
        sqnr = 10 * np.log10(signal / noise)
    return tuple(
        SiteReport(
            path=path,
            kind="matmul" if isinstance(sites[path], nnx.Linear) else "operand",
            weight_bits=inputs.configs[path].weight_bits if isinstance(sites[path], nnx.Linear) else None,
            act_bits=inputs.configs[path].act_bits,
            outlier_bits=None,
            granularity=text,
            outlier_rate=0.0,
            shifted_rows=0.0,
            sqnr_db=float(sqnr[i]),
        )
        for i, (path, text) in enumerate(granularity.items())
    )


@partial(jax.jit, static_argnums=0)
def _signal_and_noise(graphdefs: Any, states: Any, inputs: list[tuple[Array, ...]]) -> Float[Array, "sites 2"]:
    modules = [nnx.merge(graphdef, state) for graphdef, state in zip(graphdefs, states, strict=True)]
    found = []
    for site, module, seen in zip(modules[::2], modules[1::2], inputs, strict=True):
        exact, low = site(*seen), module(*seen)
        if isinstance(site, SelectiveScan):
            exact, low = exact.y, low.y
        exact, low = exact.astype(jnp.float32), low.astype(jnp.float32)
        bias = getattr(site, "bias", None)
        signal = exact if bias is None else exact - bias[...].astype(jnp.float32)[None, None]
        found.append(jnp.stack([jnp.sum(signal**2), jnp.sum((exact - low) ** 2)]))
    return jnp.stack(found)


def linear_sites(stage: nnx.Module, configs: dict[str, QuantConfig]) -> dict[str, nnx.Linear]:
    """The linear layers of a stage that have settings."""
    return {path: site for path, site in iter_sites(stage) if path in configs and isinstance(site, nnx.Linear)}


def scan_sites(stage: nnx.Module, configs: dict[str, QuantConfig]) -> dict[str, SelectiveScan]:
    """The scans of a stage that have settings."""
    return {path: site for path, site in iter_sites(stage) if path in configs and isinstance(site, SelectiveScan)}


def step_sizes(scan: SelectiveScan, delta: Float[Array, "B L G E"]) -> Float[Array, "B L G E"]:
    """softplus(delta + bias) in float32."""
    delta = delta.astype(jnp.float32)
    return jax.nn.softplus(delta + scan.delta_bias(delta))


class Step(NamedTuple):
    """Token t's part of the recurrence h = decay * h_before + add; y = <C, h>. decay, add and both states are
    (B, G, E, N), C is (B, G, N)."""

    t: Array
    h_before: Array
    decay: Array
    add: Array
    h: Array
    C: Array


def walk_scan(
    u: Float[Array, "B L G E"],
    delta: Float[Array, "B L G E"],
    A: Float[Array, "D N"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    *,
    round_decay: Callable[[Array], Array] | None = None,
    round_state: Callable[[Array, Array], Array] | None = None,
    collect: Callable[[Array], Any] | None = None,
    observe: Callable[[Step], Any] | None = None,
) -> tuple[Float[Array, "B L G E"], Array, Any]:
    """The selective scan token by token, for methods that round exp(delta A) or look at each state.

    Args:
      delta: step sizes, after bias and softplus.
      round_decay: applied to exp(delta A), (B, G, E, N).
      round_state: (h (B, G, E, N), token index) -> h, applied before the state is read and carried on.
      collect: as in `selective_scan`: reduces the state (B, D, N), stacked over the tokens on axis 1.
      observe: what else to keep of a step before the state is rounded, stacked over the tokens on axis 0.

    Returns:
      (y without the skip D u, the last state (B, D, N), what was collected, or else observed).
    """
    _, length, groups, channels = u.shape

    def flat(h):
        return h.reshape(h.shape[0], -1, h.shape[-1])

    A = A.reshape(1, groups, channels, -1)

    def step(h, xs):
        u, delta, B, C, t = xs
        decay = jnp.exp(delta[..., None] * A)
        decay = decay if round_decay is None else round_decay(decay)
        add = (delta * u)[..., None] * B[:, :, None, :]
        new = decay * h + add
        kept = new if round_state is None else round_state(new, t)
        seen = None if observe is None else observe(Step(t, h, decay, add, new, C))
        if collect is not None:
            seen = collect(flat(kept))
        return kept, (read_state(kept, C), seen)

    inputs = [jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in (u, delta, B, C)]
    start = jnp.zeros((*u.shape[:1], *A.shape[1:]), jnp.float32)
    last, (y, seen) = jax.lax.scan(step, start, (*inputs, jnp.arange(length, dtype=jnp.int32)))
    if collect is not None:
        seen = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), seen)
    return jnp.moveaxis(y, 0, 1), flat(last), seen


def read_state(h: Float[Array, "B G E N"], C: Float[Array, "B G N"]) -> Float[Array, "B G E"]:
    """<C, h>, one state index after the other: a reduction's order, and so a sample's bits, may depend on the batch."""
    y = h[..., 0] * C[:, :, None, 0]
    for n in range(1, h.shape[-1]):
        y = y + h[..., n] * C[:, :, None, n]
    return y
