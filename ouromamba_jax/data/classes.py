"""Which of a model's classes a picture's label means: a folder has names, a model counts."""

import functools
import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ouromamba_jax.data.sources import Source
from ouromamba_jax.files import local_path


@functools.cache
def imagenet_synsets() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in the order of every published model's logits."""
    return tuple((importlib.resources.files("ouromamba_jax.data") / "imagenet_synsets.txt").read_text().split())


def read_class_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The lines of a text file, one class each, in the order of a model's logits.

    Raises:
      ValueError: if it is no text.
      OSError: if it cannot be read.
    """
    try:
        lines = local_path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text; give a file with one class name per line.") from error
    return tuple(name for line in lines if (name := line.strip()))


def align_classes(source: Source, name: str, classes: int | Sequence[str]) -> Source:
    """The source with labels that count the model's classes.

    A source whose classes have names is sorted by them, which is the model's order only if the model was trained on the
    same folders. It is taken for that if both have as many classes; synset ids are found in ImageNet's order, however
    few there are. What may be another order is refused.

    Args:
      source: labels of one without names are left as they are.
      name: what messages call it.
      classes: how many classes the model has, or their names in the order of its logits.

    Raises:
      ValueError: if the source's classes cannot be found among the model's.
    """
    own = source.classes
    if own is None:
        if not isinstance(classes, int | np.integer):
            raise ValueError(
                f"{name} does not name its classes, so no names can be matched; leave out the class names."
            )
        return source
    way_out = (
        "name the model's classes in the order of its logits: --classes FILE, --class-names A,B,... or classes=[...]"
    )
    if not isinstance(classes, int | np.integer):
        wanted = tuple(classes)
        if len(set(wanted)) != len(wanted):
            twice = next(c for k, c in enumerate(wanted) if c in wanted[:k])
            raise ValueError(f"the class names hold {twice!r} twice; give every class one name.")
        unknown = [c for c in own if c not in set(wanted)]
        if unknown:
            raise ValueError(
                f"{name} has {len(own)} classes, of which {len(unknown)} are not among the {len(wanted)} class names "
                f"({', '.join(unknown[:5])}); rename the folders or correct the names."
            )
    elif classes == len(imagenet_synsets()) and set(own) <= set(imagenet_synsets()):
        wanted = imagenet_synsets()
    elif len(own) != classes:
        raise ValueError(f"{name} has {len(own)} classes ({_few(own)}), but the model has {classes}; {way_out}.")
    elif all(c.isdecimal() for c in own):
        if list(own) != sorted(own, key=int):
            raise ValueError(
                f"the {len(own)} classes of {name} are numbers in the order of their letters ({_few(own)}), and the "
                f"model's may be in that of their values; {way_out}."
            )
        return source
    elif classes == len(imagenet_synsets()):
        raise ValueError(
            f"{name} has {len(own)} classes like the model, but their names ({_few(own)}) are not ImageNet's synset "
            f"ids, whose order is known; {way_out}."
        )
    else:
        return source
    position = {c: k for k, c in enumerate(wanted)}
    example = source.example

    def aligned(i: int):
        picture, label = example(i)
        return picture, label if label is None or label < 0 else position[own[label]]

    return replace(source, example=aligned, classes=wanted)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
