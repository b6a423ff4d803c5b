"""Where the tensors of timm's VisionTransformer go; DeiT III's own files name its layer scales otherwise."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ouromamba_jax.convert.keymap import Rule, linear, pixel_patches, squeeze
from ouromamba_jax.convert.positions import fill_with_positions
from ouromamba_jax.models.vit import ViTConfig


def vit_rules(config: ViTConfig) -> tuple[Rule, ...]:
    """The table for a model of this config."""
    block, mixer = "blocks.{i}", "blocks.{i}.mixer"
    linears = {"attn.qkv": "mixer.qkv", "attn.proj": "mixer.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    return (
        Rule("patch_embed.proj.weight", "stem.proj.kernel", pixel_patches(config.in_channels)),
        Rule("patch_embed.proj.bias", "stem.proj.bias"),
        Rule("cls_token", "stem.class_token", squeeze(0)),
        Rule("dist_token", "stem.dist_token", squeeze(0)),
        Rule("reg_token", "stem.reg_tokens", squeeze(0)),
        Rule("pos_embed", "stem.positions", squeeze(0)),
        *_norm("norm_pre", "stem.norm"),
        *_norm(f"{block}.norm1", f"{block}.norm1"),
        *_norm(f"{block}.norm2", f"{block}.norm2"),
        *_norm(f"{block}.attn.q_norm", f"{mixer}.q_norm"),
        *_norm(f"{block}.attn.k_norm", f"{mixer}.k_norm"),
        *(rule for key, path in linears.items() for rule in _linear(f"{block}.{key}", f"{block}.{path}")),
        *(Rule(f"{block}.ls{i}.gamma", f"{block}.gamma{i}") for i in (1, 2)),
        *(Rule(f"{block}.gamma_{i}", f"{block}.gamma{i}") for i in (1, 2)),
        *_norm("norm" if config.norm_before_pooling else "fc_norm", "head.norm"),
        *_linear("head", "head.proj"),
        *_linear("head_dist", "head.proj_dist"),
    )


def fill_vit(model: Any, tensors: Mapping[str, np.ndarray], *, interpolate_positions: bool = False) -> Any:
    """A copy of `model`, which may be abstract, with every leaf taken from `tensors`; see `keymap.fill`.

    Args:
      interpolate_positions: resize positions of another input size first; see `positions`.

    Raises:
      ConversionError: names every tensor and leaf that does not fit, and this option where it would help.
    """
    config = model.config
    beside = 0 if config.no_embed_class else config.prefix_tokens
    return fill_with_positions(model, tensors, vit_rules(config), beside=beside, interpolate=interpolate_positions)


def _linear(key: str, path: str) -> tuple[Rule, Rule]:
    return Rule(f"{key}.weight", f"{path}.kernel", linear), Rule(f"{key}.bias", f"{path}.bias")


def _norm(key: str, path: str) -> tuple[Rule, Rule]:
    return Rule(f"{key}.weight", f"{path}.scale"), Rule(f"{key}.bias", f"{path}.bias")
