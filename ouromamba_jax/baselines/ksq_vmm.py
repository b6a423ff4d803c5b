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
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.baselines.base import SCAN_INPUTS, BaselineConfig, linear_sites, scan_sites, site_reports
from ouromamba_jax.baselines.ksq_grids import Grid
from ouromamba_jax.baselines.ksq_linear import LinearGrids, RoundedModule, calibrate_linear
from ouromamba_jax.baselines.ksq_scan import calibrate_scan
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.models.layers import as_tokens
from ouromamba_jax.quantize.report import QuantReport
from ouromamba_jax.quantize.sites import iter_sites, set_module
from ouromamba_jax.quantize.stages import Fitted, Progress, StageInputs, quantize_stages


@dataclass(frozen=True)
class KSQConfig(BaselineConfig):
    """kSQ-VMM.

    Args:
      k: clusters of channels or tokens.
    """

    weight_bits: int = 8
    act_bits: int = 8
    k: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"k must be at least 1 cluster, not {self.k}.")


def quantize_ksq_vmm(
    model: VisionModel,
    images: Float[Array, "N H W I"],
    config: KSQConfig,
    *,
    progress: Progress | None = None,
) -> tuple[VisionModel, QuantReport]:
    """`model` quantised by kSQ-VMM, and the account of it.

    Raises:
      ValueError: as `quantize_stages`.
    """
    settings, k = config.settings(), config.k

    def fit(stage: nnx.Module, inputs: StageInputs) -> Fitted:
        captured, configs, prefix = inputs.captured, inputs.configs, inputs.name + "."
        modules: dict[str, nnx.Module] = {}
        granularity = {}
        entering: list[tuple[Array, Grid]] = []  # (u, its grid) of every scan direction
        for path, scan in scan_sites(stage, configs).items():
            u, delta, B, C = (captured[path][name] for name in SCAN_INPUTS)
            low = modules[path] = calibrate_scan(scan, u, delta, B, C, k=k, bits=configs[path].act_bits)
            entering += [(u[:, :, g], Grid(low.u_scale[...][g], low.bits)) for g in range(scan.directions)]
            granularity[path] = f"u, delta: {k} channel clusters; y: {k} token clusters; h: token"
        for path, linear in linear_sites(stage, configs).items():
            x, site = captured[path]["input"], configs[path]
            of_input = next((grid for u, grid in entering if _same(u, x)), None)
            # The published table clusters the tokens of out_proj and of no other product.
            clustered = path.endswith("out_proj")
            grids = LinearGrids(
                site.weight_bits,
                site.act_bits,
                axis="token" if clustered else "tensor",
                clusters=k,
                search_weight=not _makes_patches(prefix + path),
            )
            modules[path] = calibrate_linear(linear, x, grids, of_input)
            granularity[path] = f"weight: tensor; output: {f'{k} token clusters' if clustered else 'tensor'}"
        reports = site_reports(stage, modules, inputs, granularity)
        for path, output in capture_outputs(stage, inputs.exact, config.batch_size).items():
            resolved = settings.resolve(prefix + path)
            if resolved is not None:
                modules[path] = RoundedModule(_module(stage, path), output, k=k, bits=resolved.act_bits)
        return Fitted(modules, reports)

    return quantize_stages(model, images, settings, fit, progress=progress)


def _makes_patches(path: str) -> bool:
    """Convolutions that make patches, by their path in the model: in the stem, or between the levels of a pyramid."""
    return path.startswith("stem.") or ".downsample." in path


def _same(u: Array, x: Array) -> bool:
    return u.shape == x.shape and bool((u == x).all())


def _module(stage: Any, path: str) -> Any:
    return next(m for p, m in nnx.iter_modules(stage) if ".".join(map(str, p)) == path)


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
