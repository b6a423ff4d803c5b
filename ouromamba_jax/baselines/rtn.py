"""Round to nearest: the range of every tensor onto the grid, no search, no learning, no outliers.

The floor that every method must beat. It rounds what `quantize` rounds by default: the linear layers, the scans' delta,
B, C, A and D, and the operands of attention.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.baselines.base import BaselineConfig
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.quantize.calibrate import find_scales
from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.measure import measure
from ouromamba_jax.quantize.report import QuantReport
from ouromamba_jax.quantize.run import quantized_module
from ouromamba_jax.quantize.sites import iter_sites
from ouromamba_jax.quantize.stages import Fitted, Progress, StageInputs, quantize_stages, replace_sites


@dataclass(frozen=True)
class RTNConfig(BaselineConfig):
    """Round to nearest, symmetric and static: max|x| over the calibration images and channels is the largest level.

    Args:
      granularity: activations have one scale per "token" position, or one for the "tensor" (of each scan direction).
        Those of some ten channels or fewer have one for the tensor in either case, as ours start from: the range of so
        few values at a token would not cover other images. Weights have one per output channel.
    """

    granularity: Literal["token", "tensor"] = "token"

    def __post_init__(self):
        super().__post_init__()
        if self.granularity not in ("token", "tensor"):
            raise ValueError(f"granularity must be 'token' or 'tensor', not {self.granularity!r}.")


def quantize_rtn(
    model: VisionModel,
    images: Float[Array, "N H W 3"],
    config: RTNConfig,
    *,
    progress: Progress | None = None,
) -> tuple[VisionModel, QuantReport]:
    """`model` rounded to nearest, and the account of it; per token, `quantize` without outliers, search and tuning.

    Raises:
      ValueError: as `quantize_stages`.
    """
    settings = config.settings(scale_search="max", operands=QuantConfig.operands)

    def fit(stage: nnx.Module, inputs: StageInputs) -> Fitted:
        sites = dict(iter_sites(stage))
        specs, modules = {}, {}
        for path, site_config in inputs.configs.items():
            seen = inputs.captured[path]
            spec, scales, fixed = find_scales(sites[path], seen, site_config)
            if config.granularity == "tensor":
                for operand in scales.keys() & seen.keys():
                    largest = jnp.max(scales[operand], axis=-1, keepdims=True)
                    scales[operand] = jnp.broadcast_to(largest, scales[operand].shape)
            specs[path], modules[path] = spec, quantized_module(sites[path], spec, scales, fixed)
        reports = measure(
            stage, replace_sites(stage, modules), specs, inputs.captured, len(inputs.exact), config.batch_size
        )
        if config.granularity == "tensor":
            reports = (
                dataclasses.replace(report, granularity=report.granularity.replace("token", "tensor"))
                for report in reports
            )
        return Fitted(modules, tuple(reports))

    return quantize_stages(model, images, settings, fit, progress=progress)
