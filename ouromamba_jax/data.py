"""Images and labels from anywhere, as a model takes them: an image folder, an .npz, TFDS, or the embedded digits."""

import io
import math
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
DIGITS_TEST_PER_CLASS = 50
_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


class PreprocessingConfig(Protocol):
    """What a model's config says about its input; `ouromamba_jax.models.config.Preprocessing` is one."""

    @property
    def mean(self) -> tuple[float, float, float]: ...
    @property
    def std(self) -> tuple[float, float, float]: ...
    @property
    def crop_pct(self) -> float: ...
    @property
    def interpolation(self) -> str: ...


class Dataset(NamedTuple):
    """Normalised images, their classes (None where the source has none) and, if known, the names of the classes."""

    images: Float[np.ndarray, "N H W 3"]
    labels: Int[np.ndarray, " N"] | None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Source:
    """`example(i)` is picture i (PIL image, uint8 pixels, or float32 model input) and its label or None."""

    length: int
    example: Callable[[int], tuple[Any, int | None]]
    classes: tuple[str, ...] | None = None


def load_images(
    source: str | Path,
    split: str,
    img_size: int | tuple[int, int],
    preprocessing: PreprocessingConfig,
    *,
    limit: int | None = None,
    seed: int | None = None,
    labelled: bool = False,
) -> Dataset:
    """The images of a source in memory, ready for a model.

    Args:
      source: one of
        "digits" (scikit-learn's handwritten digits, splits "train" and "test");
        an image folder, one subfolder per class or flat and then without labels;
        an .npz with `images` and optionally `labels`, `classes`, or with JPEG files end to end in `jpeg` and
        their boundaries in `offsets`. uint8 images are pixels; float images are model input already;
        "tfds:NAME" or "tfds:NAME:SPLIT", a data set that TFDS has prepared.
        A "{split}" in a path is replaced by `split`.
      split: e.g. "train" or "test"; paths without "{split}" have only one.
      img_size: input side of the model, or (height, width).
      preprocessing: the model's `config.preprocessing`.
      limit: take this many images, evenly spaced over the source.
      seed: draw those at random instead, by this seed.
      labelled: refuse images without a class (no labels, or negative ones): nothing can be scored on them.

    Raises:
      ValueError, FileNotFoundError, ImportError: one sentence that names the file and what to do.
    """
    opened = _open(str(source), split)
    indices = _spread(opened.length, limit)
    if seed is not None:
        indices = np.random.default_rng(seed).permutation(opened.length)[: len(indices)]
    with ThreadPoolExecutor() as pool:
        dataset = _read(opened, indices, img_size, preprocessing, pool)
    if labelled:
        _check_labels(dataset, str(source), split)
    return dataset


def iterate_batches(
    source: str | Path,
    split: str,
    img_size: int | tuple[int, int],
    preprocessing: PreprocessingConfig,
    *,
    batch_size: int,
    limit: int | None = None,
    labelled: bool = False,
) -> Iterator[Dataset]:
    """As `load_images`, but `batch_size` images at a time; the last batch holds what is left."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use at least 1.")
    opened = _open(str(source), split)
    indices = _spread(opened.length, limit)

    def batches() -> Iterator[Dataset]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(indices), batch_size):
                batch = _read(opened, indices[start : start + batch_size], img_size, preprocessing, pool)
                if labelled:
                    _check_labels(batch, str(source), split)
                yield batch

    return batches()  # a source that cannot be opened is reported now, not at the first batch


def preprocess(
    image: Image.Image | UInt8[np.ndarray, "..."],
    img_size: int | tuple[int, int],
    preprocessing: PreprocessingConfig,
) -> Float[np.ndarray, "H W 3"]:
    """One picture to model input: timm's evaluation transform.

    The picture is resized, keeping its proportions, so that it just covers floor(img_size / crop_pct); the centre
    is cropped, scaled to [0, 1] and normalised per channel. As in timm, a target that is not square is resized
    bilinearly, whatever `preprocessing.interpolation` (timm.data.transforms_imagenet_eval, crop_mode "center").
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image = image.convert("RGB")
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    target = math.floor(height / preprocessing.crop_pct), math.floor(width / preprocessing.crop_pct)
    scaled = _cover((image.height, image.width), target)
    if preprocessing.interpolation not in _RESAMPLING:
        raise ValueError(
            f"there is no interpolation {preprocessing.interpolation!r}; use one of {', '.join(_RESAMPLING)}."
        )
    interpolation = preprocessing.interpolation if target[0] == target[1] else "bilinear"
    image = image.resize(scaled[::-1], _RESAMPLING[interpolation])
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / np.float32(255)
    mean, std = _statistics(preprocessing)
    return (pixels - mean[0]) / std[0]


def to_pixels(images: Float[Any, "N H W 3"], preprocessing: PreprocessingConfig) -> UInt8[np.ndarray, "N H W 3"]:
    """Model input back to uint8 pixels, for pictures: the inverse of the normalisation."""
    mean, std = _statistics(preprocessing)
    pixels = np.asarray(images, np.float32) * std + mean
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def digits_split(labels: Int[np.ndarray, " N"], split: str) -> Int[np.ndarray, " M"]:
    """Which of the digits belong to "train" or "test": fixed, disjoint, 50 of each class in "test".

    The order is random, but the same on every machine: it comes from raw PCG64 output, whose stream NumPy keeps.
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


def _open(source: str, split: str) -> _Source:
    if source == "digits":
        return _open_digits(split)
    if source.startswith("tfds:"):
        return _open_tfds(source, split)
    path = Path(source.replace("{split}", split)).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f'{path} does not exist; give an image folder, an .npz file, "tfds:NAME" or "digits" as the source.'
        )
    if path.suffix != ".npz":
        raise ValueError(f"{path} is neither a folder nor an .npz file; give the folder that holds the images.")
    return _open_npz(path)


def _open_digits(split: str) -> _Source:
    try:
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

    return _Source(len(chosen), example, tuple(str(digit) for digit in range(10)))


def _open_folder(folder: Path) -> _Source:
    flat = _image_files(folder.iterdir())
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    members = [_image_files((folder / name).rglob("*")) for name in classes]
    if flat and any(members):
        raise ValueError(f"{folder} holds images beside class folders; move them into a class folder or away.")
    files = flat or [path for paths in members for path in paths]
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); give the folder that does.")
    empty = [name for name, paths in zip(classes, members, strict=True) if not paths]
    if empty and not flat:
        # A class without images would shift no label, but it usually means an unfinished download.
        raise ValueError(f"{folder} has class folders without images ({', '.join(empty[:5])}); fill or remove them.")
    labels = None if flat else np.repeat(np.arange(len(classes)), [len(paths) for paths in members])

    def example(i: int) -> tuple[Any, int | None]:
        return _decode(files[i], str(files[i])), None if labels is None else int(labels[i])

    return _Source(len(files), example, None if flat else tuple(classes))


def _open_npz(path: Path) -> _Source:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an .npz of plain arrays ({error}); write it again.") from error
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

    def example(i: int) -> tuple[Any, int | None]:
        return picture(i), None if labels is None else int(labels[i])

    return _Source(length, example, None if classes is None else tuple(str(name) for name in classes))


def _pixel_reader(path: Path, images: np.ndarray) -> tuple[int, Callable[[int], Any]]:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"`images` in {path} has shape {images.shape}; (N, height, width, 3) is needed.")
    if images.dtype == np.uint8:
        return len(images), lambda i: images[i]
    if images.dtype.kind != "f":
        raise ValueError(f"`images` in {path} is {images.dtype}; store uint8 pixels or normalised floats.")
    if not np.isfinite(images).all():
        raise ValueError(f"`images` in {path} holds values that are not finite; write the file again.")
    return len(images), lambda i: images[i].astype(np.float32)


def _jpeg_reader(path: Path, data: np.ndarray, offsets: np.ndarray) -> tuple[int, Callable[[int], Any]]:
    valid = data.dtype == np.uint8 and data.ndim == offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets)
    if not valid or offsets[0] != 0 or offsets[-1] != len(data) or (offsets[1:] <= offsets[:-1]).any():
        raise ValueError(f"`offsets` in {path} must rise from 0 to the length of the uint8 array `jpeg`, {data.size}.")

    def picture(i: int) -> Image.Image:
        return _decode(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes()), f"image {i} of {path}")

    return len(offsets) - 1, picture


def _open_tfds(source: str, split: str) -> _Source:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(f'{source} needs TFDS; pip install "ouromamba_jax[data]".') from error
    name, _, named_split = source.removeprefix("tfds:").partition(":")
    try:
        # Random access over ArrayRecord files; TensorFlow is not imported.
        examples = tfds.data_source(name, split=named_split or split)
    except Exception as error:  # TFDS raises a dozen types for an unknown name, split or file format
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"TFDS cannot open {name!r}, split {named_split or split!r} ({reason}); prepare it once with "
            f"`tfds build {name} --file_format=array_record`."
        ) from error

    def example(i: int) -> tuple[Any, int | None]:
        record = examples[i]
        if "image" not in record:
            raise ValueError(f"{source} has no field `image`, only {', '.join(record)}; use a classification set.")
        picture = record["image"]
        return picture[..., 0] if picture.shape[-1] == 1 else picture, int(
            record["label"]
        ) if "label" in record else None

    return _Source(len(examples), example)


def _read(
    source: _Source,
    indices: Int[np.ndarray, " M"],
    img_size: int | tuple[int, int],
    preprocessing: PreprocessingConfig,
    pool: ThreadPoolExecutor,
) -> Dataset:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size

    def load(i: int) -> tuple[np.ndarray, int | None]:
        picture, label = source.example(i)
        if not (isinstance(picture, np.ndarray) and picture.dtype == np.float32):
            return preprocess(picture, img_size, preprocessing), label
        if picture.shape != (height, width, 3):
            raise ValueError(
                f"the float images are {picture.shape[0]}x{picture.shape[1]}, but the model takes {height}x{width}; "
                f"store uint8 pixels, which are resized, or build the model with another img_size."
            )
        return picture, label

    pictures, labels = zip(*pool.map(load, indices.tolist()), strict=True)
    return Dataset(np.stack(pictures), None if labels[0] is None else np.asarray(labels, np.int32), source.classes)


def _check_labels(dataset: Dataset, source: str, split: str) -> None:
    if dataset.labels is None:
        raise ValueError(f"{source} has no labels; give one folder per class, or an .npz with `labels`.")
    if dataset.labels.min() >= 0:
        return
    if source.startswith("tfds:"):
        name, _, named_split = source.removeprefix("tfds:").partition(":")
        raise ValueError(
            f"the split {named_split or split!r} of {name} has images without a class (label {dataset.labels.min()}); "
            f"name one that is labelled, e.g. tfds:{name}:validation."
        )
    raise ValueError(f"{source} has the label {dataset.labels.min()}, which is no class; count the classes from 0.")


def _spread(length: int, limit: int | None) -> Int[np.ndarray, " M"]:
    """At most `limit` indices, evenly spaced, so that a source sorted by class gives every class."""
    if length == 0:
        raise ValueError("the source holds no images; give one that does.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; ask for at least one image.")
    count = length if limit is None else min(limit, length)
    return np.arange(count) * length // count


def _statistics(preprocessing: PreprocessingConfig) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std) of shape (1, 1, 1, 3), in float32."""
    mean, std = np.asarray(preprocessing.mean, np.float32), np.asarray(preprocessing.std, np.float32)
    return mean[None, None, None], std[None, None, None]


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


def _image_files(paths: Iterator[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _decode(file: Any, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:  # PIL's UnidentifiedImageError is one
        raise ValueError(f"{name} cannot be read as an image ({error}); remove or replace it.") from error
