"""The networks, and every published configuration by name."""

from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.models.mambavision import MambaVision, MambaVisionConfig
from ouromamba_jax.models.registry import build_model, config_class, create_model, list_models, model_config, pure
from ouromamba_jax.models.trace import AttentionTrace, LayerTrace, ScanOrder, ScanTrace, Trace
from ouromamba_jax.models.vim import Vim, VimConfig
from ouromamba_jax.models.vit import ViT, ViTConfig
from ouromamba_jax.models.vmamba import VMamba, VMambaConfig
from ouromamba_jax.models.windows import WindowOrder

__all__ = [
    "AttentionTrace",
    "LayerTrace",
    "MambaVision",
    "MambaVisionConfig",
    "ScanOrder",
    "ScanTrace",
    "Trace",
    "VMamba",
    "VMambaConfig",
    "ViT",
    "ViTConfig",
    "Vim",
    "VimConfig",
    "VisionModel",
    "WindowOrder",
    "build_model",
    "config_class",
    "create_model",
    "list_models",
    "model_config",
    "pure",
]
