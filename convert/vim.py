"""Where the tensors of hustvl/Vim's VisionMamba go; direction 0 runs forward, direction 1 (names with b) backward."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ouromamba_jax.convert.keymap import Rule, depthwise1d, linear, pixel_patches, squeeze
from ouromamba_jax.convert.positions import fill_with_positions
from ouromamba_jax.models.vim import VimConfig

_MIXER = "layers.{i}.mixer"
_TARGET = "blocks.{i}.mixer"


def _direction(index: int, b: str) -> tuple[Rule, ...]:
    """One scan direction: its own convolution and projections, and its half of the scan's parameters."""
    own, half = f"{_TARGET}.directions.{index}", (index, 2)
    return (
        Rule(f"{_MIXER}.conv1d{b}.weight", f"{own}.conv.kernel", depthwise1d),
        Rule(f"{_MIXER}.conv1d{b}.bias", f"{own}.conv.bias"),
        Rule(f"{_MIXER}.x_proj{b}.weight", f"{own}.x_proj.kernel", linear),
        Rule(f"{_MIXER}.dt_proj{b}.weight", f"{own}.dt_proj.kernel", linear),
        Rule(f"{_MIXER}.dt_proj{b}.bias", f"{_TARGET}.scan.dt_bias", part=half),
        Rule(f"{_MIXER}.A{b}_log", f"{_TARGET}.scan.A_log", part=half),
        Rule(f"{_MIXER}.D{b}", f"{_TARGET}.scan.D", part=half),
    )


def vim_rules(config: VimConfig) -> tuple[Rule, ...]:
    """The table for a model of this config."""
    token = {"ends": ((), ("_head", "_tail")), "none": ((), ())}.get(config.class_token, (("",), ()))
    return (
        Rule("patch_embed.proj.weight", "stem.proj.kernel", pixel_patches(config.in_channels)),
        Rule("patch_embed.proj.bias", "stem.proj.bias"),
        *(Rule(f"cls_token{end}", "stem.class_token", squeeze(0, 1)) for end in token[0]),
        *(Rule(f"cls_token{end}", "stem.class_token", squeeze(0), part=(i, 2)) for i, end in enumerate(token[1])),
        Rule("pos_embed", "stem.positions", squeeze(0)),
        Rule("layers.{i}.norm.weight", "blocks.{i}.norm.scale"),
        Rule(f"{_MIXER}.in_proj.weight", f"{_TARGET}.in_proj.kernel", linear),
        *_direction(0, ""),
        *_direction(1, "_b"),
        Rule(f"{_MIXER}.out_proj.weight", f"{_TARGET}.out_proj.kernel", linear),
        Rule("norm_f.weight", "head.norm.scale"),
        Rule("head.weight", "head.proj.kernel", linear),
        Rule("head.bias", "head.proj.bias"),
    )


def fill_vim(model: Any, tensors: Mapping[str, np.ndarray], *, interpolate_positions: bool = False) -> Any:
    """A copy of `model`, which may be abstract, with every leaf taken from `tensors`; see `keymap.fill`.

    Args:
      interpolate_positions: resize positions of another input size first; see `positions`.

    Raises:
      ConversionError: names every tensor and leaf that does not fit, and this option where it would help.
    """
    config = model.config
    beside = len(config.class_indices)
    return fill_with_positions(model, tensors, vim_rules(config), beside=beside, interpolate=interpolate_positions)
