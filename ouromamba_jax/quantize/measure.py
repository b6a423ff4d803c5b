"""What rounding costs at every site, measured on the float model's activations."""

from collections.abc import Iterator
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
    stage: nnx.Module, low: nnx.Module, specs: dict[str, SiteSpec], captured: Captured, images: int, batch_size: int
) -> Iterator[SiteReport]:
    """One report per matmul and operand of a stage, its path relative to the stage.

    Args:
      stage: the float stage.
      low: the same stage quantised.
      captured: what entered every site on the calibration images; a site may see several samples (windows) of each.
      images: number of calibration images.
    """
    floats = dict(iter_sites(stage))
    modules = dict(named_modules(low))

    def part(start: int, x: Array) -> Array:
        samples = len(x) // images
        return x[start * samples : (start + batch_size) * samples]

    for path, spec in specs.items():
        graphdefs, states = zip(*map(nnx.split, (floats[path], modules[path])), strict=True)
        batches = [
            _measure_site(graphdefs, states, jax.tree.map(partial(part, start), captured[path]))
            for start in range(0, images, batch_size)
        ]
        for name in batches[0]:
            total = jax.tree.map(lambda *parts: float(sum(map(float, parts))), *(batch[name] for batch in batches))
            facts = kind_of(floats[path]).describe(name, spec)
            yield _site_report(f"{path}.{name}" if name else path, facts, total)


# Site by site, not the stage at once: equal sites, such as the directions of a block, share one compiled program.
@partial(jax.jit, static_argnums=0)
def _measure_site(graphdefs: Any, states: Any, seen: dict[str, Array]) -> dict[str, Measured]:
    """By operand; "" stands for the site itself."""
    site, module = (nnx.merge(graphdef, state) for graphdef, state in zip(graphdefs, states, strict=True))
    return kind_of(site).measure(site, module, seen)


def _site_report(path: str, facts: dict[str, Any], total: Measured) -> SiteReport:
    with np.errstate(divide="ignore", invalid="ignore"):
        sqnr = float(10 * np.log10(np.divide(total.signal, total.noise)))
    return SiteReport(path=path, **facts, outlier_rate=total.outliers / total.entries, sqnr_db=sqnr)
