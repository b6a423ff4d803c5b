"""Bicubic interpolation from its definition in float64, sample by sample."""

import math

import numpy as np


def bicubic(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """x (H, W, C) at `size`: cubic convolution (Keys 1981) with a = -0.75, centres aligned, borders repeated."""
    height, width = x.shape[:2]
    out = np.zeros((*size, x.shape[2]))
    for i in range(size[0]):
        for j in range(size[1]):
            row, column = (i + 0.5) * height / size[0] - 0.5, (j + 0.5) * width / size[1] - 0.5
            for r in range(math.floor(row) - 1, math.floor(row) + 3):
                for c in range(math.floor(column) - 1, math.floor(column) + 3):
                    sample = x[min(max(r, 0), height - 1), min(max(c, 0), width - 1)].astype(np.float64)
                    out[i, j] += _weight(row - r) * _weight(column - c) * sample
    return out


def _weight(t: float, a: float = -0.75) -> float:
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0
