"""Learned positions of one grid of patches, resized to another as PyTorch's `interpolate` does."""

from functools import reduce
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

_A = -0.75  # of the cubic convolution; PyTorch's value


def resize_grid(x: Float[Any, "H W C"], size: tuple[int, int]) -> Float[Any, "h w C"]:
    """`x`, of NumPy or JAX, at another (height, width), in its own type.

    Bicubic with a = -0.75, centres aligned (align_corners=False), borders repeated, no antialiasing, as
    `torch.nn.functional.interpolate(mode="bicubic")`.
    """
    xp = x.__array_namespace__()
    rows, columns = (cubic_weights(before, after).astype(x.dtype) for before, after in zip(x.shape, size, strict=False))
    with jax.default_matmul_precision("highest"):
        return xp.tensordot(xp.tensordot(rows, x, axes=1), columns, axes=(1, 1)).swapaxes(1, 2)


def cubic_weights(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Row i holds what every source sample contributes to target sample i."""
    centres = (np.arange(target) + 0.5) * (source / target) - 0.5
    first = np.floor(centres).astype(int)
    weights = np.zeros((target, source))
    for tap in range(-1, 3):
        index = first + tap
        np.add.at(weights, (np.arange(target), index.clip(0, source - 1)), _kernel(np.abs(centres - index)))
    return weights


def resize_positions(
    positions: Float[Any, "L C"],
    source: tuple[int, int],
    target: tuple[int, int],
    places: tuple[tuple[int, ...], tuple[int, ...]],
) -> Float[Any, "l C"]:
    """Positions of a grid `source` of patches for a grid `target`.

    Those of the class tokens are kept and moved from `places[0]` to `places[1]`, their places among all tokens.
    """
    xp = positions.__array_namespace__()
    patches = xp.delete(positions, np.asarray(places[0], int), axis=0).reshape(*source, -1)
    resized = resize_grid(patches, target).reshape(-1, positions.shape[1])
    ordered = zip(*places, strict=True)  # ascending, so each insertion leaves the places before it alone
    return reduce(lambda x, place: xp.insert(x, place[1], positions[place[0]][None], axis=0), ordered, resized)


def _kernel(distance: np.ndarray) -> np.ndarray:
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * _A - 4 * _A
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))
