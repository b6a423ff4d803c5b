"""OuroMamba-Quant: dynamic outliers, integer inference, scales tuned block by block."""

from ouromamba_jax.quantize.config import OPERANDS, PRESETS, QuantConfig, QuantRule
from ouromamba_jax.quantize.linear import QuantLinear
from ouromamba_jax.quantize.report import MemoryReport, QuantReport, SiteReport, memory_report
from ouromamba_jax.quantize.run import quantize
from ouromamba_jax.quantize.scan import QuantSelectiveScan

__all__ = [
    "OPERANDS",
    "PRESETS",
    "MemoryReport",
    "QuantConfig",
    "QuantLinear",
    "QuantReport",
    "QuantRule",
    "QuantSelectiveScan",
    "SiteReport",
    "memory_report",
    "quantize",
]
