"""The published rivals, re-implemented (QMamba: stood in for): same models, images and evaluation as `quantize`."""

from ouromamba_jax.baselines.base import BaselineConfig
from ouromamba_jax.baselines.ksq_vmm import KSQConfig, quantize_ksq_vmm
from ouromamba_jax.baselines.ptq4vm import PTQ4VMConfig, quantize_ptq4vm
from ouromamba_jax.baselines.qmamba_like import QMambaLikeConfig, quantize_qmamba_like
from ouromamba_jax.baselines.registry import BASELINES, Baseline, quantize_baseline
from ouromamba_jax.baselines.released import ReleasedConfig, quantize_released
from ouromamba_jax.baselines.rtn import RTNConfig, quantize_rtn

__all__ = [
    "BASELINES",
    "Baseline",
    "BaselineConfig",
    "KSQConfig",
    "PTQ4VMConfig",
    "QMambaLikeConfig",
    "RTNConfig",
    "ReleasedConfig",
    "quantize_baseline",
    "quantize_ksq_vmm",
    "quantize_ptq4vm",
    "quantize_qmamba_like",
    "quantize_released",
    "quantize_rtn",
]
