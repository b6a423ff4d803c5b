"""The public loaders: a whole source in memory, or batch by batch."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ouromamba_jax.data.classes import align_classes
from ouromamba_jax.data.preprocessing import Preprocessing, height_width
from ouromamba_jax.data.sources import Source, open_source, tfds_name
from ouromamba_jax.data.transform import preprocess


class Dataset(NamedTuple):
    """Normalised images, their classes (None where the source has none) and, if known, the names of the classes."""

    images: Float[np.ndarray, "N H W I"]
    labels: Int[np.ndarray, " N"] | None
    classes: tuple[str, ...] | None = None


class Batches(Iterator[Dataset]):
    """Data sets one after the other, of `num_images` images in all."""

    def __init__(self, num_images: int, batches: Iterator[Dataset]):
        self.num_images = num_images
        self._batches = batches

    def __next__(self) -> Dataset:
        return next(self._batches)


def load_images(
    source: str | Path,
    split: str,
    img_size: int | tuple[int, int],
    preprocessing: Preprocessing,
    *,
    limit: int | None = None,
    seed: int | None = None,
    labelled: bool = False,
    classes: int | Sequence[str] | None = None,
) -> Dataset:
    """The images of a source in memory, ready for a model.

    Args:
      source: one of
        "digits" (scikit-learn's handwritten digits, splits "train" and "test");
        an image folder, one subfolder per class or flat and then without labels; pictures are turned as their EXIF
        orientation says, GIFs give their first frame, and kinds that are not read are counted in a warning;
        an .npz with `images` and optionally `labels`, `classes`, or with JPEG files end to end in `jpeg` and
        their boundaries in `offsets`. uint8 images are pixels; float images are model input already;
        "tfds:NAME" or "tfds:NAME:SPLIT", a data set that TFDS has prepared; "cifar10" is short for "tfds:cifar10".
        A "{split}" in a path is replaced by `split`.
      split: e.g. "train" or "test"; paths without "{split}" have only one.
      img_size: input side of the model, or (height, width).
      preprocessing: the model's `config.preprocessing`; its channels are the images'.
      limit: take this many images, evenly spaced over the source.
      seed: draw those at random instead, by this seed.
      labelled: refuse images without a class (no labels, or negative ones): nothing can be scored on them.
      classes: the model's: how many, or their names in the order of its logits. Labels then count these, and a source
        whose classes are others is refused; see `align_classes`.

    Raises:
      ValueError, FileNotFoundError, ImportError: one sentence that names the file and what to do.

    Examples:
      >>> import ouromamba_jax as om
      >>> from ouromamba_jax.data import load_images
      >>> config = om.load("vim_micro").config
      >>> data = load_images("digits", "test", config.img_size, config.preprocessing, limit=8)
      >>> data.images.shape, data.labels.shape
      ((8, 32, 32, 3), (8,))
    """
    opened = _open(source, split, preprocessing, classes)
    indices = _spread(opened.length, limit)
    if seed is not None:
        indices = np.random.default_rng(seed).permutation(opened.length)[: len(indices)]
    with ThreadPoolExecutor() as pool:
        dataset = _read(opened, str(source), indices, img_size, preprocessing, pool)
    if labelled:
        _check_labels(dataset, str(source), split)
    return dataset


def iterate_batches(
    source: str | Path,
    split: str,
    img_size: int | tuple[int, int],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    limit: int | None = None,
    labelled: bool = False,
    classes: int | Sequence[str] | None = None,
) -> Batches:
    """As `load_images`, but `batch_size` images at a time; the last batch holds what is left.

    Examples:
      >>> import ouromamba_jax as om
      >>> from ouromamba_jax.data import iterate_batches
      >>> config = om.load("vim_micro").config
      >>> batches = iterate_batches("digits", "test", config.img_size, config.preprocessing, batch_size=4, limit=6)
      >>> batches.num_images, [len(batch.images) for batch in batches]
      (6, [4, 2])
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use at least 1.")
    opened = _open(source, split, preprocessing, classes)
    indices = _spread(opened.length, limit)

    def batches() -> Iterator[Dataset]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(indices), batch_size):
                batch = _read(opened, str(source), indices[start : start + batch_size], img_size, preprocessing, pool)
                if labelled:
                    _check_labels(batch, str(source), split)
                yield batch

    return Batches(len(indices), batches())  # a source that cannot be opened is reported now, not at the first batch


def _open(source: str | Path, split: str, preprocessing: Preprocessing, classes: int | Sequence[str] | None) -> Source:
    opened = open_source(str(source), split)
    if opened.floats is not None:
        preprocessing.check_normalised(opened.floats, f"the float images of {source}")
    return opened if classes is None else align_classes(opened, str(source), classes)


def _read(
    source: Source,
    name: str,
    indices: Int[np.ndarray, " M"],
    img_size: int | tuple[int, int],
    preprocessing: Preprocessing,
    pool: ThreadPoolExecutor,
) -> Dataset:
    shape = (*height_width(img_size), preprocessing.channels)

    def load(i: int) -> tuple[np.ndarray, int | None]:
        picture, label = source.example(i)
        if not (isinstance(picture, np.ndarray) and picture.dtype == np.float32):
            return preprocess(picture, img_size, preprocessing), label
        if picture.shape != shape:
            raise ValueError(
                f"the float images of {name} are {'x'.join(map(str, picture.shape))}, but the model takes "
                f"{'x'.join(map(str, shape))}; store uint8 pixels, which are resized, or build the model with another "
                "img_size or in_channels."
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
        name, split = tfds_name(source, split)
        raise ValueError(
            f"the split {split!r} of {name} has images without a class (label {dataset.labels.min()}); "
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
