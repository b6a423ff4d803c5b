"""What every model's config says about its input: how pixels become images of its size."""

import math
from dataclasses import dataclass, replace
from numbers import Real
from statistics import fmean
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
CROP_MODES = ("center", "squash")


@dataclass(frozen=True)
class Preprocessing:
    """Evaluation transform of a published model: resize, centre crop, scale to [0, 1], normalise.

    Args:
      mean, std: per channel, red, green and blue or gray alone, in units of [0, 1] pixels.
      crop_pct: side of the centre crop over the side that the image is resized to.
      interpolation: one of `INTERPOLATIONS`; crop_mode "center" resizes to inputs that are not square bilinearly.
      crop_mode: "center" resizes with the picture's proportions kept, "squash" each side to its own target.

    Raises:
      ValueError: for values that no picture can be prepared with.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __post_init__(self):
        for name in ("mean", "std"):
            value = getattr(self, name)
            # Lists, as JSON has them, cannot be hashed, and JSON takes no number of NumPy's.
            value = tuple(value) if isinstance(value, list | np.ndarray) else value
            if not isinstance(value, tuple) or len(value) not in (1, 3) or not all(map(_is_finite, value)):
                raise ValueError(f"{name} is {value}, but it must be three numbers, or one for gray; change it.")
            object.__setattr__(self, name, tuple(map(float, value)))
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean is {self.mean} and std {self.std}, but both have one number per channel; change one."
            )
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}, but pixels are divided by it; use positive numbers.")
        if not _is_finite(self.crop_pct) or not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}, but it is a share of the side; use one in (0, 1].")
        object.__setattr__(self, "crop_pct", float(self.crop_pct))
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"there is no interpolation {self.interpolation!r}; use one of {', '.join(INTERPOLATIONS)}."
            )
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"there is no crop_mode {self.crop_mode!r}; use one of {', '.join(CROP_MODES)}.")

    @property
    def channels(self) -> int:
        """3 for pictures in colour, 1 for gray ones."""
        return len(self.mean)

    def for_channels(self, channels: int) -> "Preprocessing":
        """The same for images of so many channels; others than its own get the averages of mean and std, as in timm."""
        if channels == self.channels:
            return self
        return replace(self, mean=(fmean(self.mean),) * channels, std=(fmean(self.std),) * channels)

    def mean_and_std(self) -> tuple[Float32[np.ndarray, "1 1 1 I"], Float32[np.ndarray, "1 1 1 I"]]:
        """Both as arrays, for images (N, H, W, I)."""
        mean, std = (np.asarray(values, np.float32)[None, None, None] for values in (self.mean, self.std))
        return mean, std

    def checked(self, images: Any, *, finite: bool = True, may_be_bright: bool = False) -> Float[Any, "N H W I"]:
        """What a model is to be given, as one array; lists are stacked.

        Raises:
          ValueError: if they are not (batch, height, width, channels), or `check_normalised` refuses them.
        """
        if not isinstance(images, np.ndarray | jax.Array):
            try:
                images = np.asarray(images)
            except ValueError as error:  # of lists whose parts differ
                raise ValueError(
                    f"images are a {type(images).__name__} of arrays that differ in shape, but a model takes one array "
                    f"(batch, height, width, {self.channels}); resize them to one size."
                ) from error
        check_image_shape(images, None, self.channels)
        self.check_normalised(images, finite=finite, may_be_bright=may_be_bright)
        return images

    def check_normalised(
        self, images: Float[Any, "..."], what: str = "images", *, finite: bool = True, may_be_bright: bool = False
    ) -> None:
        """Refuses pixels as they are in a file, which a model takes without a word and classifies wrongly.

        The rule: integers are refused, and so are floats if they
          - are nowhere below 0 and reach twice what white becomes: pixels of 0..255;
          - lie within 0..1, are not all equal, and are not what levels of 0..255 become: pixels of 0..1. Normalised
            ones are negative wherever a picture is darker than `mean`; with a mean of 0 they never are, and all pass;
          - reach ten times beyond what black and white become, which noise and synthetic images do not.

        Args:
          images: all that are judged together, since one that is bright everywhere has no value below 0.
          what: their name in a sentence.
          finite: refuse NaN and infinities, too; otherwise they are not looked at.
          may_be_bright: do not ask whether they lie within 0..1, since those before them did not.

        Raises:
          ValueError: naming `what` and the way out.
        """
        if np.dtype(images.dtype).kind in "biucOSU":
            raise ValueError(f"{what} are {images.dtype}, but a model takes normalised floats; {_fix(' / 255')}.")
        if not images.size:
            return
        xp = jnp if isinstance(images, jax.Array) else np
        low, high = (float(images.min()), float(images.max())) if xp is np else (math.nan, math.nan)
        if not math.isfinite(high - low):  # XLA's max may drop a NaN, NumPy's does not
            valid = xp.isfinite(images)
            if finite and not valid.all():
                first = int(xp.argmin(valid.reshape(len(images), -1).all(axis=1)))
                raise ValueError(f"{what} hold values that are not finite, first in number {first}; make them again.")
            low = float(xp.min(images, where=valid, initial=np.inf))
            high = float(xp.max(images, where=valid, initial=-np.inf))
        mean, std = self.mean_and_std()
        black, white = -mean / std, (1 - mean) / std
        if low >= 0 and high > 2 * white.max():
            raise ValueError(f"{what} are 0 to {high:.4g}, but a model takes normalised pixels; {_fix(' / 255')}.")
        if (
            not may_be_bright
            and black.max() < 0 <= low < high <= 1
            and not _are_levels((images.astype(np.float32) * std + mean) * 255)
        ):
            raise ValueError(f"{what} lie within 0 and 1, but a model takes normalised pixels; {_fix('')}.")
        if max(-low, high) > 10 * max(-black.min(), white.max()):
            raise ValueError(
                f"{what} reach from {low:.4g} to {high:.4g}, but normalised black and white are {black.min():.2g} and "
                f"{white.max():.2g}; {_fix(' / 255')}."
            )


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """`img_size` as (height, width)."""
    return (int(size), int(size)) if isinstance(size, int | np.integer) else (int(size[0]), int(size[1]))


def image_shape(config: Any) -> tuple[int, int, int]:
    """(height, width, channels) of the images of a model with this config."""
    return (*height_width(config.img_size), config.in_channels)


def check_image_shape(images: Any, size: tuple[int, int] | None, channels: int) -> None:
    """Refuses images that are not (batch, height, width, channels), of `size` if there is one.

    Raises:
      ValueError: with the way out for channels that come first or are missing, a missing batch, and gray pictures.
    """
    shape = tuple(images.shape)
    if len(shape) == 4 and shape[3] == channels and 0 not in shape[1:3] and size in (None, shape[1:3]):
        return
    if len(shape) == 3 and shape[2] == channels:
        way_out = "one image is a batch of its own, images[None]"
    elif len(shape) == 3 and channels == 1:
        way_out = "gray pictures have one channel, images[..., None]"
    elif len(shape) == 4 and shape[1] == channels != shape[3]:
        way_out = "channels come last, jnp.moveaxis(images, 1, -1)"
    elif len(shape) == 4 and (channels, shape[3]) == (3, 1):
        way_out = (
            "a gray picture is one of three equal channels, jnp.repeat(images, 3, axis=-1), or is for a model with "
            "in_channels=1"
        )
    elif len(shape) == 4 and (channels, shape[3]) == (1, 3):
        way_out = "colours are for a model with in_channels=3, and load_images makes them gray"
    else:
        way_out = "resize them or build the model with another img_size"
    takes = ", ".join(map(str, size)) if size else "height, width"
    raise ValueError(f"images have shape {shape}, but this model takes (batch, {takes}, {channels}); {way_out}.")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _are_levels(pixels: Float[Any, "..."]) -> bool:
    return bool((abs(pixels - pixels.round()) < 0.01).all())


def _fix(divisor: str) -> str:
    return (
        f"compute (images{divisor} - mean) / std with mean, std = model.config.preprocessing.mean_and_std(), "
        "or give uint8 pixels to load_images"
    )
