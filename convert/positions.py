"""Learned positions of a checkpoint of another input size: resized if that is asked for, else refused by that name."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ouromamba_jax.convert.keymap import ConversionError, Rule, fill


def fill_with_positions(
    model: Any, tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], *, beside: int, interpolate: bool
) -> Any:
    """`keymap.fill` for a model whose `stem.positions`, if it has any, are the checkpoint's `pos_embed` (1, L, C).

    Args:
      beside: positions of tokens that are no patches.
      interpolate: resize positions of another grid of patches to the model's, as its config does. The checkpoint's
        grid is square if the number of its patches is a square number, else of the model's shape.

    Raises:
      ConversionError: names every tensor and leaf that does not fit, and this option where it would help; or says that
        the checkpoint's grid has neither shape.
    """
    leaf = model.stem.positions
    shape = (0, 0) if leaf is None else leaf.shape
    positions = _positions(tensors, shape[1])
    if interpolate and positions is not None:
        grid = _source_grid(len(positions) - beside, model.config.grid)
        if grid != model.config.grid:
            with np.errstate(over="ignore", invalid="ignore"):  # `fill` refuses what is not finite
                positions = np.asarray(model.config.resize_positions(positions.astype(np.float64), grid))
            tensors = {**tensors, "pos_embed": positions[None]}
    try:
        return fill(model, tensors, rules)
    except ConversionError as error:
        if positions is None or len(positions) == shape[0]:
            raise
        option = "interpolate_positions=True (--interpolate-positions on the command line)"
        hint = f"pass {option} to resize the positions to the model's input size"
        raise ConversionError(f"{str(error).removesuffix('.')}; {hint}.") from error


def _positions(tensors: Mapping[str, np.ndarray], width: int) -> np.ndarray | None:
    """`pos_embed` (L, width), or None if it is missing, not used or of another width."""
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3 or not jnp.issubdtype(positions.dtype, jnp.floating):
        return None
    return positions[0] if (positions.shape[0], positions.shape[2]) == (1, width) else None


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
