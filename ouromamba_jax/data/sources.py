"""Where pictures come from: one opener per kind of source, each giving random access to its pictures and labels."""

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from ouromamba_jax.data.transform import to_rgb
from ouromamba_jax.files import local_path, read_npz
from ouromamba_jax.names import did_you_mean

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib",
    ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm",
)  # fmt: skip
UNREAD_SUFFIXES = (
    ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".psd",
    ".tga", ".exr", ".dng", ".cr2", ".nef", ".ico", ".pcx",
)  # fmt: skip
"""Of pictures that are not read; files of other kinds are notes, lists, archives."""
DIGITS_TEST_PER_CLASS = 50
SHORT_NAMES = {"cifar10": "tfds:cifar10"}


@dataclass(frozen=True)
class Source:
    """`example(i)` is picture i (PIL image, uint8 pixels, or float32 model input) and its label or None.

    `classes` are the names that the labels count, `floats` all pictures at once where they are model input.
    """

    length: int
    example: Callable[[int], tuple[Any, int | None]]
    classes: tuple[str, ...] | None = None
    floats: np.ndarray | None = None


def has_splits(source: str) -> bool:
    """Whether a source is a named data set, or a path with "{split}" in it, so that a split picks a part."""
    named = source == "digits" or source in SHORT_NAMES or source.startswith("tfds:")
    return named or "{split}" in source


def open_source(source: str, split: str) -> Source:
    """The source that `load_images` describes; a "{split}" in a path is replaced.

    Raises:
      ValueError, FileNotFoundError, ImportError: one sentence that names the file and what to do.
    """
    if source == "digits":
        return _open_digits(split)
    source = SHORT_NAMES.get(source, source)
    if source.startswith("tfds:"):
        return _open_tfds(source, split)
    path = local_path(source.replace("{split}", split))
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        hint = did_you_mean(source, ("digits", *SHORT_NAMES))
        hint = hint or 'give an image folder, an .npz file, "tfds:NAME" or "digits" as the source.'
        raise FileNotFoundError(f"{path} does not exist; {hint}")
    if path.suffix != ".npz":
        raise ValueError(f"{path} is neither a folder nor an .npz file; give the folder that holds the images.")
    return _open_npz(path)


def digits_split(labels: Int[np.ndarray, " N"], split: str) -> Int[np.ndarray, " M"]:
    """Which of the digits belong to "train" or "test": fixed, disjoint, 50 of each class in "test".

    The order is random, but the same on every machine: it comes from raw PCG64 output, whose stream NumPy keeps.

    Examples:
      >>> import numpy as np
      >>> from ouromamba_jax.data import digits_split
      >>> len(digits_split(np.arange(1797) % 10, "test"))
      500
    """
    if split not in ("train", "test"):
        raise ValueError(f'the digits have no split {split!r}; use "train" or "test".')
    order = np.argsort(np.random.PCG64(0).random_raw(len(labels)), kind="stable")
    shuffled = labels[order]
    rank = np.zeros(len(labels), np.int64)  # of each picture within its class
    for label in np.unique(labels):
        members = shuffled == label
        rank[members] = np.arange(members.sum())
    in_test = rank < DIGITS_TEST_PER_CLASS
    return order[in_test if split == "test" else ~in_test]


def _open_digits(split: str) -> Source:
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn; pip install "ouromamba_jax[demo]".') from error
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    chosen = digits_split(labels, split)

    def example(i: int) -> tuple[Any, int | None]:
        # Enlarged once here, whatever the model's interpolation: the 8x8 originals are not what is classified.
        picture = Image.fromarray(pixels[chosen[i]]).resize((32, 32), Image.Resampling.BICUBIC)
        return picture, int(labels[chosen[i]])

    return Source(len(chosen), example, tuple(str(digit) for digit in range(10)))


def _open_folder(folder: Path) -> Source:
    unread: Counter[str] = Counter()
    flat = _image_files(folder.iterdir(), unread)
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    members = [_image_files((folder / name).rglob("*"), Counter() if flat else unread) for name in classes]
    if flat and any(members):
        raise ValueError(f"{folder} holds images beside class folders; move them into a class folder or away.")
    files = flat or [path for paths in members for path in paths]
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
    if not files:
        found = f" but pictures of other kinds ({kinds}), so convert those" if kinds else "; give the folder that does"
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}){found}.")
    if kinds:
        warnings.warn(
            f"{sum(unread.values())} pictures in {folder} are of kinds that are not read and left out ({kinds}); "
            "convert them to PNG.",
            stacklevel=4,
        )
    empty = [name for name, paths in zip(classes, members, strict=True) if not paths]
    if empty and not flat:
        # A class without images would shift no label, but it usually means an unfinished download.
        raise ValueError(f"{folder} has class folders without images ({', '.join(empty[:5])}); fill or remove them.")
    labels = None if flat else np.repeat(np.arange(len(classes)), [len(paths) for paths in members])

    def example(i: int) -> tuple[Any, int | None]:
        return _decode(files[i], str(files[i])), None if labels is None else int(labels[i])

    return Source(len(files), example, None if flat else tuple(classes))


def _open_npz(path: Path) -> Source:
    arrays = read_npz(path)
    if "images" in arrays:
        length, picture = _pixel_reader(path, arrays["images"])
    elif "jpeg" in arrays and "offsets" in arrays:
        length, picture = _jpeg_reader(path, arrays["jpeg"], arrays["offsets"])
    else:
        raise ValueError(
            f"{path} holds {', '.join(arrays) or 'nothing'}, but an array `images`, or `jpeg` and `offsets`, is needed."
        )
    labels = arrays.get("labels")
    if labels is not None and (labels.shape != (length,) or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"{path} has {length} images but `labels` is {labels.dtype} of shape {labels.shape}; "
            f"give one integer per image."
        )
    classes = arrays.get("classes")
    floats = arrays["images"] if "images" in arrays and arrays["images"].dtype != np.uint8 else None

    def example(i: int) -> tuple[Any, int | None]:
        return picture(i), None if labels is None else int(labels[i])

    return Source(length, example, None if classes is None else tuple(str(name) for name in classes), floats)


def _pixel_reader(path: Path, images: np.ndarray) -> tuple[int, Callable[[int], Any]]:
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"`images` in {path} has shape {images.shape}; (N, height, width, 3 or 1) is needed.")
    if images.dtype == np.uint8:
        return len(images), lambda i: images[i]
    if images.dtype.kind != "f":
        raise ValueError(f"`images` in {path} is {images.dtype}; store uint8 pixels or normalised floats.")
    return len(images), lambda i: images[i].astype(np.float32)


def _jpeg_reader(path: Path, data: np.ndarray, offsets: np.ndarray) -> tuple[int, Callable[[int], Any]]:
    valid = data.dtype == np.uint8 and data.ndim == offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets)
    if not valid or offsets[0] != 0 or offsets[-1] != len(data) or (offsets[1:] <= offsets[:-1]).any():
        raise ValueError(f"`offsets` in {path} must rise from 0 to the length of the uint8 array `jpeg`, {data.size}.")

    def picture(i: int) -> "Image.Image":
        return _decode(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes()), f"image {i} of {path}")

    return len(offsets) - 1, picture


def tfds_name(source: str, split: str) -> tuple[str, str]:
    """(data set, split) of "tfds:NAME" or "tfds:NAME:SPLIT", whose own split comes first."""
    name, _, named_split = source.removeprefix("tfds:").partition(":")
    return name, named_split or split


def _open_tfds(source: str, split: str) -> Source:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(f'{source} needs TFDS; pip install "ouromamba_jax[data]".') from error
    name, split = tfds_name(source, split)
    try:
        # Random access over ArrayRecord files; TensorFlow is not imported.
        examples = tfds.data_source(name, split=split)
    except Exception as error:  # TFDS raises a dozen types for an unknown name, split or file format
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"TFDS cannot open {name!r}, split {split!r} ({reason}); prepare it once with "
            f"`tfds build {name} --file_format=array_record`."
        ) from error

    def example(i: int) -> tuple[Any, int | None]:
        record = examples[i]
        if "image" not in record:
            raise ValueError(f"{source} has no field `image`, only {', '.join(record)}; use a classification set.")
        label = record.get("label")
        return record["image"], None if label is None else int(label)

    return Source(len(examples), example)


def _image_files(paths: Iterator[Path], unread: Counter[str]) -> list[Path]:
    """Without hidden files: beside "x.jpg" macOS leaves a "._x.jpg", which is no image. `unread` counts other kinds."""
    found = []
    for path in paths:
        suffix = path.suffix.lower()
        if path.name.startswith(".") or suffix not in (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES) or not path.is_file():
            continue
        if suffix in IMAGE_SUFFIXES:
            found.append(path)
        else:
            unread[suffix] += 1
    return sorted(found)


def _decode(file: Any, name: str) -> "Image.Image":
    from PIL import Image

    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except Exception as error:  # a damaged picture makes PIL raise OSError, SyntaxError, DecompressionBombError, ...
        reason = str(error).rstrip(".")
        raise ValueError(f"{name} cannot be read as an image ({reason}); remove or replace it.") from error
