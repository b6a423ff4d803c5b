"""One picture to model input and back: timm's evaluation transform."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from ouromamba_jax.data.preprocessing import Preprocessing, height_width

if TYPE_CHECKING:
    from PIL import Image


def preprocess(
    image: "Image.Image | UInt8[np.ndarray, '...']",
    img_size: int | tuple[int, int],
    preprocessing: Preprocessing,
) -> Float[np.ndarray, "H W I"]:
    """One picture to model input: timm's evaluation transform.

    For a model of one channel the picture becomes gray as Pillow's mode L has it (ITU-R 601-2). It is resized, keeping
    its proportions, so that it just covers floor(img_size / crop_pct), or exactly to that with crop_mode "squash"; the
    centre is cropped, scaled to [0, 1] and normalised per channel. As in timm, crop_mode "center" resizes to a target
    that is not square bilinearly, whatever `preprocessing.interpolation` (timm.data.transforms_imagenet_eval). Unlike
    there, a picture is turned first if its EXIF orientation says so.

    Examples:
      >>> import numpy as np
      >>> import ouromamba_jax as om
      >>> from ouromamba_jax.data import preprocess
      >>> config = om.load("vim_micro").config
      >>> preprocess(np.zeros((48, 64, 3), np.uint8), config.img_size, config.preprocessing).shape
      (32, 32, 3)
    """
    from PIL import Image  # only who reads pictures waits for it

    channels = preprocessing.channels
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    image = to_rgb(image)
    if channels == 1:
        image = image.convert("L")  # which gives gray levels back as they were
    height, width = height_width(img_size)
    target = math.floor(height / preprocessing.crop_pct), math.floor(width / preprocessing.crop_pct)
    squashed = preprocessing.crop_mode == "squash"
    scaled = target if squashed else _cover((image.height, image.width), target)
    interpolation = preprocessing.interpolation if squashed or target[0] == target[1] else "bilinear"
    image = image.resize(scaled[::-1], Image.Resampling[interpolation.upper()])
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / np.float32(255)
    mean, std = preprocessing.mean_and_std()
    return (pixels.reshape(height, width, channels) - mean[0]) / std[0]


def to_rgb(image: "Image.Image") -> "Image.Image":
    """A picture of any mode as 8-bit RGB, turned as its EXIF orientation says.

    Pillow's own conversion cuts 16-bit gray at 255 instead of scaling it. 16-bit colours are Pillow's: the high byte.
    Of an animation the first frame is taken; transparency is ignored, as timm does.

    Raises:
      ValueError: for 32-bit pictures, whose range nobody knows.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"a picture of mode {image.mode} has no known range; store 8 or 16 bits per channel.")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 65535 / 257 = 255
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns if this step is left out
    return image.convert("RGB")


def to_pixels(images: Float[Any, "N H W I"], preprocessing: Preprocessing) -> UInt8[np.ndarray, "N H W I"]:
    """Model input back to uint8 pixels, for pictures: the inverse of the normalisation.

    Examples:
      >>> import numpy as np
      >>> import ouromamba_jax as om
      >>> from ouromamba_jax.data import to_pixels
      >>> preprocessing = om.load("vim_micro").config.preprocessing
      >>> int(to_pixels(np.ones((1, 2, 2, 3), np.float32), preprocessing).max())
      255
    """
    mean, std = preprocessing.mean_and_std()
    pixels = np.asarray(images, np.float32) * std + mean
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _cover(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that just covers `target` with the proportions of `size`.

    As in timm, the longer side is cut to an integer for a square target and rounded for another one.
    """
    if target[0] != target[1]:
        ratio = min(size[0] / target[0], size[1] / target[1])
        return round(size[0] / ratio), round(size[1] / ratio)
    shorter = min(size)
    height, width = (int(target[0] * side / shorter) for side in size)
    return height, width
