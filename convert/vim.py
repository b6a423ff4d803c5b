"""Where the tensors of hustvl/Vim's VisionMamba go; direction 0 runs forward, direction 1 (names with b) backward."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ouromamba_jax.convert.keymap import ConversionError, Rule, depthwise1d, fill, linear, patches, squeeze
from ouromamba_jax.models.positions import resize_positions
from ouromamba_jax.models.vim import VimConfig, class_indices

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
        Rule("patch_embed.proj.weight", "stem.proj.kernel", patches),
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
      interpolate_positions: resize positions of another input size first; see `resized_tensors`.

    Raises:
      ConversionError: names every tensor and leaf that does not fit, and this option where it would help.
    """
    if interpolate_positions:
        tensors = resized_tensors(tensors, model.config)
    try:
        return fill(model, tensors, vim_rules(model.config))
    except ConversionError as error:
        if not has_other_input_size(tensors, model.config):
            raise
        option = "interpolate_positions=True (--interpolate-positions on the command line)"
        hint = f"pass {option} to resize the positions to the model's input size"
        raise ConversionError(f"{str(error).removesuffix('.')}; {hint}.") from error


def has_other_input_size(tensors: Mapping[str, np.ndarray], config: VimConfig) -> bool:
    """Whether the checkpoint's positions differ from the model's in their number, and in nothing else."""
    positions = _positions(tensors, config)
    return positions is not None and positions.shape[1] != config.num_tokens


def resized_tensors(tensors: Mapping[str, np.ndarray], config: VimConfig) -> dict[str, np.ndarray]:
    """The tensors with `pos_embed` (1, tokens, embed_dim) resized to the model's grid of patches.

    The class tokens' positions are kept as they are; see `models.positions`. The checkpoint's grid is square if the
    number of its patches is a square number, else of the model's shape.

    Raises:
      ConversionError: if the checkpoint's grid is neither.
    """
    positions = _positions(tensors, config)
    if positions is None:
        return dict(tensors)  # the table of rules names the problem
    patches = positions.shape[1] - len(config.class_indices)
    grid = _source_grid(patches, config.grid)
    if grid == config.grid:
        return dict(tensors)
    places = class_indices(config.class_token, patches), config.class_indices
    with np.errstate(over="ignore", invalid="ignore"):  # `fill` refuses what is not finite
        resized = resize_positions(positions[0].astype(np.float64), grid, config.grid, places)
    return {**tensors, "pos_embed": resized[None]}


def _positions(tensors: Mapping[str, np.ndarray], config: VimConfig) -> np.ndarray | None:
    """`pos_embed` (1, tokens, embed_dim), or None if it is missing, not used or of another width."""
    positions = tensors.get("pos_embed") if config.positions else None
    if positions is None or positions.ndim != 3 or not jnp.issubdtype(positions.dtype, jnp.floating):
        return None
    return positions if (positions.shape[0], positions.shape[2]) == (1, config.embed_dim) else None


def _source_grid(patches: int, target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in patches: a square, else the one grid that is within a patch of the target's aspect ratio."""
    side = math.isqrt(max(patches, 0))
    if patches > 0 and side**2 == patches:
        return side, side
    ratio = target[1] / target[0]
    for height in range(1, patches + 1):
        width = patches // height
        if height * width == patches and abs(height * ratio - width) < 1 and abs(width / ratio - height) < 1:
            return height, width
    raise ConversionError(
        f"pos_embed has {patches} positions beside the class token, which form neither a square nor a grid shaped like "
        f"the model's {target[0]} x {target[1]}; build the model at the checkpoint's img_size."
    )
