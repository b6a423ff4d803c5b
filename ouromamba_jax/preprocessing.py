"""What every model's config says about its input: how pixels become images of its size."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True)
class Preprocessing:
    """Evaluation transform of a published model: resize, centre crop, scale to [0, 1], normalise.

    Args:
      mean, std: per RGB channel, in units of [0, 1] pixels.
      crop_pct: side of the centre crop over the side that the image is resized to.
      interpolation: "bicubic", "bilinear" or "nearest"; inputs that are not square are resized bilinearly.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def mean_and_std(self) -> tuple[Float32[np.ndarray, "1 1 1 3"], Float32[np.ndarray, "1 1 1 3"]]:
        """Both as arrays, for images (N, H, W, 3)."""
        mean, std = (np.asarray(values, np.float32)[None, None, None] for values in (self.mean, self.std))
        return mean, std


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """`img_size` as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
