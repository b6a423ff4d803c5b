"""What every model's config says about its input: how pixels become images of its size."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


@dataclass(frozen=True)
class Preprocessing:
    """Evaluation transform of a published model: resize, centre crop, scale to [0, 1], normalise.

    Args:
      mean, std: per RGB channel, in units of [0, 1] pixels.
      crop_pct: side of the centre crop over the side that the image is resized to.
      interpolation: one of `INTERPOLATIONS`; inputs that are not square are resized bilinearly.

    Raises:
      ValueError: for values that no picture can be prepared with.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self):
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON has it; not hashable
                object.__setattr__(self, name, value := tuple(value))
            if not isinstance(value, tuple) or len(value) != 3 or not all(map(_is_finite, value)):
                raise ValueError(f"{name} is {value}, but it must be three numbers, one per channel; change it.")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}, but pixels are divided by it; use positive numbers.")
        if not _is_finite(self.crop_pct) or not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}, but it is a share of the side; use one in (0, 1].")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"there is no interpolation {self.interpolation!r}; use one of {', '.join(INTERPOLATIONS)}."
            )

    def mean_and_std(self) -> tuple[Float32[np.ndarray, "1 1 1 3"], Float32[np.ndarray, "1 1 1 3"]]:
        """Both as arrays, for images (N, H, W, 3)."""
        mean, std = (np.asarray(values, np.float32)[None, None, None] for values in (self.mean, self.std))
        return mean, std

    def check_normalised(self, images: Float[Any, "..."], what: str = "images") -> None:
        """Refuses what can be no model input: integers, values that are not finite, pixels as they are in a file.

        Noise and synthetic images may lie outside what pixels become, so only ten times as much is too much.

        Raises:
          ValueError: naming `what` and the way out.
        """
        way_out = "load_images takes uint8 pixels and normalises them"
        if np.dtype(images.dtype).kind in "biu":
            raise ValueError(f"{what} are {images.dtype}, but a model takes normalised floats; {way_out}.")
        largest = float(abs(images).max(initial=0))
        if not math.isfinite(largest):
            raise ValueError(f"{what} hold values that are not finite; make them again.")
        mean, std = self.mean_and_std()
        limit = float(max((mean / std).max(), ((1 - mean) / std).max()))
        if largest > 10 * limit:
            raise ValueError(
                f"{what} reach {largest:.4g}, but pixels normalised for this model {limit:.2g}; {way_out}."
            )


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """`img_size` as (height, width)."""
    return (int(size), int(size)) if isinstance(size, int | np.integer) else (int(size[0]), int(size[1]))


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
