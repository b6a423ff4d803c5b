"""The rivals by name, for scripts that loop over them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Array, Float

from ouromamba_jax.baselines.ksq_vmm import KSQConfig, quantize_ksq_vmm
from ouromamba_jax.baselines.ptq4vm import PTQ4VMConfig, quantize_ptq4vm
from ouromamba_jax.baselines.qmamba_like import QMambaLikeConfig, quantize_qmamba_like
from ouromamba_jax.baselines.released import ReleasedConfig, quantize_released
from ouromamba_jax.baselines.rtn import RTNConfig, quantize_rtn
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.names import did_you_mean
from ouromamba_jax.quantize.report import QuantReport
from ouromamba_jax.quantize.stages import Progress


@dataclass(frozen=True)
class Baseline:
    """A rival: its name in tables, and how to make its config and run it.

    Args:
      title: its name in tables.
      config: makes its config from fields.
      run: quantises by a config.
      configs: what makes the config instead, by family, where a method was published with other settings for it.
    """

    title: str
    config: Callable[..., Any]
    run: Callable[..., tuple[VisionModel, QuantReport]]
    configs: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def config_for(self, model: VisionModel) -> Callable[..., Any]:
        """What makes the config for a model of this family."""
        return self.configs.get(model.family, self.config)


def _rtn(granularity: str) -> Callable[..., RTNConfig]:
    def config(**fields: Any) -> RTNConfig:
        return RTNConfig(**{"granularity": granularity, **fields})

    return config


BASELINES: dict[str, Baseline] = {
    "rtn_tensor": Baseline("RTN, per tensor", _rtn("tensor"), quantize_rtn),
    "rtn_token": Baseline("RTN, per token", _rtn("token"), quantize_rtn),
    "ptq4vm": Baseline("PTQ4VM", PTQ4VMConfig, quantize_ptq4vm, {"vmamba": PTQ4VMConfig.vmamba}),
    "ksq_vmm": Baseline("kSQ-VMM", KSQConfig, quantize_ksq_vmm),
    "qmamba_like": Baseline("QMamba-like", QMambaLikeConfig, quantize_qmamba_like),
    "released": Baseline("OuroMamba, released code", ReleasedConfig, quantize_released),
}


def quantize_baseline(
    model: VisionModel,
    images: Float[Array, "N H W I"],
    name: str,
    *,
    weight_bits: int,
    act_bits: int,
    progress: Progress | None = None,
    **fields: Any,
) -> tuple[VisionModel, QuantReport]:
    """A copy of `model` quantised by the rival `name`, and the account of it; `model` itself is left as it is.

    Settings are those published for the model's family, if there are any.

    Args:
      model: a float model.
      images: normalised calibration images, synthetic or real.
      name: one of `BASELINES`.
      weight_bits, act_bits: 2 to 8.
      progress: called as progress(done, total, stage name).
      fields: other fields of the method's config.

    Raises:
      ValueError: for an unknown name, widths that do not exist, or as `quantize_stages`.

    Examples:
      >>> import jax
      >>> import ouromamba_jax as om
      >>> from ouromamba_jax.baselines import quantize_baseline
      >>> model = om.create_model("vim_micro", depth=1)
      >>> images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1, maxval=1)
      >>> low, report = quantize_baseline(model, images, "rtn_token", weight_bits=8, act_bits=8)
      >>> report.outlier_rate
      0.0
    """
    if name not in BASELINES:
        hint = did_you_mean(name, BASELINES) or f"choose one of {', '.join(BASELINES)}."
        raise ValueError(f"there is no baseline {name!r}; {hint}")
    baseline = BASELINES[name]
    config = baseline.config_for(model)(weight_bits=weight_bits, act_bits=act_bits, **fields)
    return baseline.run(model, images, config, progress=progress)
