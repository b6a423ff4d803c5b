"""Round to nearest: the range of every tensor onto the grid, no search, no learning, no outliers.

The floor that every method must beat. It rounds what `quantize` rounds by default: the linear layers, the scans' delta,
B, C, A and D, and the operands of attention.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.baselines.base import BaselineConfig
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.ops.split_calibration import Calibration
from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.report import QuantReport
from ouromamba_jax.quantize.run import calibrate_sites, fitted
from ouromamba_jax.quantize.stages import Fitted, Progress, StageInputs, quantize_stages


@dataclass(frozen=True)
class RTNConfig(BaselineConfig):
    """Round to nearest, symmetric and static: max|x| over the calibration images and channels is the largest level.

    Args:
      granularity: activations have one scale per "token" position, or one for the "tensor" (of each scan direction).
        Those of some ten channels or fewer have one for the tensor in either case, as ours start from: the range of so
        few values at a token would not cover other images. Weights have one per output channel.
    """

    granularity: Literal["token", "tensor"] = "token"


def quantize_rtn(
    model: VisionModel,
    images: Float[Array, "N H W I"],
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
        specs, calibrated = calibrate_sites(stage, inputs)
        if config.granularity == "token":
            return fitted(stage, inputs, specs, calibrated)
        calibrated = jax.tree.map(_one_for_the_tensor, calibrated, is_leaf=_is_calibration)
        found = fitted(stage, inputs, specs, calibrated)
        return found._replace(
            reports=tuple(
                dataclasses.replace(report, granularity=report.granularity.replace("token", "tensor"))
                for report in found.reports
            )
        )

    return quantize_stages(model, images, settings, fit, progress=progress)


def _is_calibration(leaf: Any) -> bool:
    return isinstance(leaf, Calibration)


def _one_for_the_tensor(found: Any) -> Any:
    """The largest step of all tokens for each of them; scales of weights and parameters as they are."""
    if not _is_calibration(found):
        return found
    return dataclasses.replace(found, scale=jnp.full_like(found.scale, jnp.max(found.scale)))
