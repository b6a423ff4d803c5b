"""What rounding costs at every site, measured on the float model's activations."""

import operator
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from ouromamba_jax.quantize.activation import SiteSpec
from ouromamba_jax.quantize.capture import Captured
from ouromamba_jax.quantize.kinds import kind_of
from ouromamba_jax.quantize.report import Measured, SiteReport
from ouromamba_jax.quantize.sites import iter_sites, named_modules


def measure(
    stage: nnx.Module, low: nnx.Module, specs: dict[str, SiteSpec], batches: Iterable[Captured]
) -> list[SiteReport]:
    """One report per matmul and operand of a stage, its path relative to the stage.

    Args:
      stage: the float stage.
      low: the same stage quantised.
      batches: what entered every site on the calibration images, batch by batch.
    """
    floats = dict(iter_sites(stage))
    modules = dict(named_modules(low))
    splits = {path: zip(*map(nnx.split, (floats[path], modules[path])), strict=True) for path in specs}
    sites = {path: tuple(split) for path, split in splits.items()}
    totals: dict[str, dict[str, Measured]] = {}
    for captured in batches:
        for path, (graphdefs, states) in sites.items():
            found = jax.tree.map(float, _measure_site(graphdefs, states, captured[path]))
            before = totals.get(path)
            totals[path] = found if before is None else jax.tree.map(operator.add, before, found)
    return [
        _site_report(f"{path}.{name}" if name else path, kind_of(floats[path]).describe(name, specs[path]), total)
        for path, named in totals.items()
        for name, total in named.items()
    ]


# Site by site, not the stage at once: equal sites, such as the directions of a block, share one compiled program.
@partial(jax.jit, static_argnums=0)
def _measure_site(graphdefs: Any, states: Any, seen: dict[str, Array]) -> dict[str, Measured]:
    """By operand; "" stands for the site itself."""
    site, module = (nnx.merge(graphdef, state) for graphdef, state in zip(graphdefs, states, strict=True))
    return kind_of(site).measure(site, module, seen)


def _site_report(path: str, facts: dict[str, Any], total: Measured) -> SiteReport:
    with np.errstate(divide="ignore", invalid="ignore"):
        sqnr = float(10 * np.log10(np.divide(total.signal, total.noise)))
    return SiteReport(path=path, **facts, outlier_rate=float(total.outliers / total.entries), sqnr_db=sqnr)
