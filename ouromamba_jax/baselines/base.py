"""What the published rivals share: settings, the ends of a linear layer, and the account of a site."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.fields import check_types
from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.quantize.config import FloatDtype, QuantConfig, QuantRule
from ouromamba_jax.quantize.report import SiteReport
from ouromamba_jax.quantize.sites import iter_sites
from ouromamba_jax.quantize.stages import StageInputs

EDGES = (QuantRule(r"^(stem|head)\.", weight_bits=8, act_bits=8),)
"""The first and the last layer at 8 bits, as in the presets of `QuantConfig`."""
SCAN_INPUTS = ("u", "delta", "B", "C")
"""What enters a scan, by its name among what was captured."""


@dataclass(frozen=True)
class BaselineConfig:
    """Widths of a rival and how its calibration is run; every method adds its own fields.

    Args:
      weight_bits: 2 to 8.
      act_bits: 2 to 8.
      batch_size: images per step of calibration.
      float_dtype: type in which parameters that stay float are kept.
      rules: exceptions by path, the general ones first: see `QuantRule`.
    """

    weight_bits: int = 4
    act_bits: int = 4
    batch_size: int = 16
    float_dtype: FloatDtype = "float16"
    rules: tuple[QuantRule, ...] = EDGES

    def __post_init__(self):
        check_types(self)
        self.settings()

    def settings(self, **fields: Any) -> QuantConfig:
        """The same widths and rules as settings of sites, without outliers.

        Raises:
          ValueError: for widths that do not exist.
        """
        common = dict(detection="none", outlier_bits=8, operands=(), weight_rounding="nearest", tune_epochs=0)
        return QuantConfig(
            **{**common, **fields},
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            batch_size=self.batch_size,
            float_dtype=self.float_dtype,
            rules=self.rules,
        )


def linear_sites(stage: nnx.Module, configs: dict[str, QuantConfig]) -> dict[str, nnx.Linear]:
    """The linear layers of a stage that have settings."""
    return {path: site for path, site in iter_sites(stage) if path in configs and isinstance(site, nnx.Linear)}


def scan_sites(stage: nnx.Module, configs: dict[str, QuantConfig]) -> dict[str, SelectiveScan]:
    """The scans of a stage that have settings."""
    return {path: site for path, site in iter_sites(stage) if path in configs and isinstance(site, SelectiveScan)}


def add_bias(y: Float[Array, "B L O"], bias: nnx.Param | None) -> Float[Array, "B L O"]:
    """y plus a linear layer's bias, if it has one, in y's type."""
    return y if bias is None else y + bias[...].astype(y.dtype)[None, None]


def from_tokens(y: Float[Array, "B L O"], like: Float[Array, "... K"], dtype: Any) -> Float[Array, "... O"]:
    """Undoes `as_tokens`: what a linear layer made of the tokens of `like`, in its shape but for the channels."""
    return y.reshape(*like.shape[:-1], -1).astype(dtype)


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
        names = SCAN_INPUTS if isinstance(sites[path], SelectiveScan) else ("input",)
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
