"""Data-free quantisation of vision Mamba models (OuroMamba) in JAX: convert, generate, quantise."""

from importlib.metadata import version as _version

from ouromamba_jax.checkpoint import load, save
from ouromamba_jax.convert import from_torch
from ouromamba_jax.data_free import quantize
from ouromamba_jax.export import export
from ouromamba_jax.gen import GenConfig, Generated, generate_images
from ouromamba_jax.models import Trace, create_model, list_models, pure
from ouromamba_jax.ops.attention import implicit_attention
from ouromamba_jax.ops.matmul import outlier_matmul
from ouromamba_jax.ops.qtensor import QTensor, quantize_array
from ouromamba_jax.ops.scan import selective_scan
from ouromamba_jax.ops.scan_types import ScanOutput
from ouromamba_jax.ops.split import OutlierConfig, Split, split_outliers
from ouromamba_jax.quantize import MemoryReport, QuantConfig, QuantReport, QuantRule, memory_report

__all__ = [
    "GenConfig",
    "Generated",
    "MemoryReport",
    "OutlierConfig",
    "QTensor",
    "QuantConfig",
    "QuantReport",
    "QuantRule",
    "ScanOutput",
    "Split",
    "Trace",
    "create_model",
    "export",
    "from_torch",
    "generate_images",
    "implicit_attention",
    "list_models",
    "load",
    "memory_report",
    "outlier_matmul",
    "pure",
    "quantize",
    "quantize_array",
    "save",
    "selective_scan",
    "split_outliers",
]

__version__ = _version("ouromamba_jax")
