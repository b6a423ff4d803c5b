"""What rounding costs at every site, measured on the float model's activations."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.models.layers import SelectiveScan
from ouromamba_jax.ops.matmul import outlier_matmul
from ouromamba_jax.ops.qtensor import max_level
from ouromamba_jax.ops.split import merge, outlier_statistics
from ouromamba_jax.quantize.calibrate import Captured
from ouromamba_jax.quantize.config import PARAMETER_OPERANDS
from ouromamba_jax.quantize.modules import ActQuantizer, QuantLinear, SiteSpec, is_asymmetric
from ouromamba_jax.quantize.report import SiteReport
from ouromamba_jax.quantize.rounding import scan_parameter
from ouromamba_jax.quantize.scan import QuantSelectiveScan
from ouromamba_jax.quantize.sites import iter_sites, named_modules


class Measured(NamedTuple):
    """Sums over the entries of some samples, and shares of them."""

    signal: Array | float
    noise: Array | float
    outlier_rate: Array | float
    shifted_rows: Array | float


def measure(
    stage: nnx.Module, low: nnx.Module, specs: dict[str, SiteSpec], captured: Captured, images: int, batch_size: int
) -> Iterator[SiteReport]:
    """One report per matmul and scan operand of a stage, its path relative to the stage.

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

    sizes = [min(batch_size, images - start) for start in range(0, images, batch_size)]
    for path, spec in specs.items():
        graphdefs, states = zip(*map(nnx.split, (floats[path], modules[path])), strict=True)
        batches = [
            _measure_site(graphdefs, states, jax.tree.map(partial(part, start), captured[path]))
            for start in range(0, images, batch_size)
        ]
        for name in batches[0]:
            parts = [Measured(*map(float, batch[name])) for batch in batches]
            facts = _describe(name, spec, isinstance(floats[path], nnx.Linear))
            yield _site_report(f"{path}.{name}" if name else path, facts, parts, sizes)


# Site by site, not the stage at once: equal sites, such as the directions of a block, share one compiled program.
@partial(jax.jit, static_argnums=0)
def _measure_site(graphdefs: Any, states: Any, seen: dict[str, Array]) -> dict[str, Measured]:
    """By operand; "" stands for the site itself."""
    site, module = (nnx.merge(graphdef, state) for graphdef, state in zip(graphdefs, states, strict=True))
    if isinstance(module, QuantLinear):
        x = seen["act"]
        split = module.act.split(x, with_mask=True)
        stats = outlier_statistics(split)
        exact = x.astype(jnp.float32) @ site.kernel[...].astype(jnp.float32)
        return {"": _compare(exact, outlier_matmul(split, module.weight), stats.rate, stats.shifted_rows)}
    if isinstance(module, QuantSelectiveScan):
        return _measure_scan(site, module, seen)
    return {"": _measure_activation([module.act], seen["act"][:, :, None])}


def _measure_scan(scan: SelectiveScan, module: QuantSelectiveScan, seen: dict[str, Array]) -> dict[str, Measured]:
    found = {}
    for name, quantizers in module.act.items():
        x = seen[name]
        if is_asymmetric(name, module.spec.config):
            x = x + scan.delta_bias(x)
        found[name] = _measure_activation(list(quantizers), x)
    for name, levels in module.parameter_levels.items():
        largest_inlier = max_level(module.spec.config.act_bits)
        rate = jnp.mean((jnp.abs(levels[...].astype(jnp.int32)) > largest_inlier).astype(jnp.float32))
        found[name] = _compare(scan_parameter(scan, name), module.parameter(name), rate, jnp.zeros(()))
    if module.state_scale is not None:
        # States never leave the scan, so the rounding of h is judged by what it does to y, all else exact.
        operands = scan.operands(*(seen[name] for name in ("u", "delta", "B", "C")))
        rounded = scan.scan(*operands, state_transform=module.state_transform(seen["u"]))
        found["h"] = _compare(seen["y"], rounded.y, jnp.zeros(()), jnp.zeros(()))
    return found


def _measure_activation(quantizers: Sequence[ActQuantizer], x: Float[Array, "B L G C"]) -> Measured:
    """All directions together."""
    if quantizers[0].zero is not None:
        pairs = [quantizer.round_asymmetric(x[:, :, g]) for g, quantizer in enumerate(quantizers)]
        rate = jnp.mean(jnp.stack([mask for _, mask in pairs]).astype(jnp.float32))
        return _compare(x, jnp.stack([value for value, _ in pairs], axis=2), rate, jnp.zeros(()))
    splits = [quantizer.split(x[:, :, g], with_mask=True) for g, quantizer in enumerate(quantizers)]
    stats = [outlier_statistics(split) for split in splits]
    rate = jnp.mean(jnp.stack([s.rate for s in stats]))
    shifted = jnp.mean(jnp.stack([s.shifted_rows for s in stats]))
    return _compare(x, jnp.stack([merge(split) for split in splits], axis=2), rate, shifted)


def _compare(exact: Array, rounded: Any, rate: Array, shifted: Array) -> Measured:
    exact = exact.astype(jnp.float32)
    return Measured(jnp.sum(exact**2), jnp.sum((exact - rounded.astype(jnp.float32)) ** 2), rate, shifted)


def _site_report(path: str, facts: dict[str, Any], parts: list[Measured], sizes: list[int]) -> SiteReport:
    """The account of one operand from its batches of `sizes` images."""
    signal, noise = sum(part.signal for part in parts), sum(part.noise for part in parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        sqnr = float(10 * np.log10(np.divide(signal, noise)))
    return SiteReport(
        path=path,
        **facts,
        outlier_rate=float(np.average([part.outlier_rate for part in parts], weights=sizes)),
        shifted_rows=float(np.average([part.shifted_rows for part in parts], weights=sizes)),
        sqnr_db=sqnr,
    )


def _describe(name: str, spec: SiteSpec, matmul: bool) -> dict[str, Any]:
    """Kind, bits and granularity of the operand `name`, "" being the site itself."""
    config = spec.config
    bits = dict(weight_bits=None, act_bits=config.act_bits, outlier_bits=config.outlier_bits)
    if name in PARAMETER_OPERANDS:
        granularity = "direction x state" if name == "A" else "direction"
        return dict(kind="parameter", granularity=granularity, **{**bits, "outlier_bits": 8})
    if name == "h":
        return dict(kind="operand", granularity="direction x token", weight_bits=None, act_bits=8, outlier_bits=None)
    if name:
        return dict(kind="operand", granularity="direction x token", **bits)
    if not matmul:
        return dict(kind="operand", granularity="token", **bits)
    group = config.weight_group
    weights = "output channel" if group is None else f"{group} inputs x output channel"
    granularity = f"weight: {weights}; input: token"
    return dict(kind="matmul", granularity=granularity, **{**bits, "weight_bits": config.weight_bits})
