"""From named checkpoint tensors to the leaves of a model: a table of rules, applied without exceptions.

Every leaf is filled exactly once, every tensor is used exactly once, and every shape, type and value is checked.
All problems are collected and raised together, by the checkpoint's own names.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike, Shaped

from ouromamba_jax.convert.unpickle import shown

_LISTED = 20


class ConversionError(ValueError):
    """A checkpoint that does not fit the model; the message names up to 20 problems of both sides, counts the rest."""


def same(w: np.ndarray) -> np.ndarray:
    """A tensor whose layout is the leaf's."""
    return w


@dataclass(frozen=True)
class Rule:
    """Where the tensors of one kind go.

    Args:
      key: their name in the checkpoint, e.g. "layers.{i}.norm.weight".
      path: the leaf of the model, dotted, e.g. "blocks.{i}.norm.scale"; the same placeholders, which stand for numbers.
      transform: source layout to leaf layout; raises ValueError for a wrong rank.
      part: (i, n) if the tensor is the i-th of n equal parts of the leaf along its first axis.

    Several rules for one (path, part) are alternatives: a checkpoint must follow exactly one of them.
    """

    key: str
    path: str
    transform: Callable[[np.ndarray], np.ndarray] = same
    part: tuple[int, int] = (0, 1)

    def key_for(self, path: str) -> str | None:
        """The key of the tensor that fills the leaf at `path`, or None if the rule is about other leaves."""
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(self.path))
        match = re.fullmatch(pattern, path)
        return None if match is None else self.key.format(**match.groupdict())


@dataclass(frozen=True)
class StageRule(Rule):
    """A rule for a checkpoint that numbers its blocks within stages, "layers.{stage}.blocks.{block}".

    Args:
      depths: blocks of every stage. The model's blocks.{i} counts through all of them.
      downsample: the tensor belongs to the end of a stage, where the model has it at the start of the next one.
    """

    depths: tuple[int, ...] = ()
    downsample: bool = False

    def key_for(self, path: str) -> str | None:
        match = re.match(r"blocks\.([0-9]+)\.", path)
        if match is None or self.path != f"blocks.{{i}}.{path[match.end() :]}":
            return None
        stage, block = 0, int(match[1])
        while block >= self.depths[stage]:
            block -= self.depths[stage]
            stage += 1
        if self.downsample:
            return self.key.format(stage=stage - 1)
        return self.key.format(stage=stage, block=block)


def linear(w: Shaped[np.ndarray, "O I"]) -> Shaped[np.ndarray, "I O"]:
    """A torch Linear weight as a Flax kernel."""
    return _of_rank(w, 2).T


def patches(w: Shaped[np.ndarray, "O I kh kw"]) -> Shaped[np.ndarray, "P O"]:
    """A patch convolution as a matrix over patches flattened as (row, column, channel)."""
    return _of_rank(w, 4).transpose(2, 3, 1, 0).reshape(-1, w.shape[0])


def pixel_patches(channels: int) -> Callable[[np.ndarray], np.ndarray]:
    """`patches` of a convolution of images with so many channels; for one, the sum over three, as timm has it."""

    def transform(w: Shaped[np.ndarray, "O I kh kw"]) -> Shaped[np.ndarray, "P O"]:
        if channels == 1 and _of_rank(w, 4).shape[1] == 3:
            with np.errstate(invalid="ignore"):  # `fill` refuses what is not finite
                w = w.astype(np.float64).sum(axis=1, keepdims=True)
        return patches(w)

    return transform


def depthwise1d(w: Shaped[np.ndarray, "C 1 k"]) -> Shaped[np.ndarray, "k C"]:
    """A depthwise 1-D convolution, taps first."""
    return np.squeeze(_of_rank(w, 3), 1).T


def squeeze(*axes: int) -> Callable[[np.ndarray], np.ndarray]:
    """Drops axes of length 1."""
    return lambda w: np.squeeze(w, axes)


def fill[M: nnx.Module](model: M, tensors: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> M:
    """A copy of `model` with every leaf taken from `tensors`.

    Args:
      model: may be abstract (from `nnx.eval_shape`); only the shapes and types of its leaves are used.
      tensors: checkpoint tensors by key; any floating type, cast to the leaf's.
      rules: the family's table.

    Raises:
      ConversionError: names every missing, unknown, doubled, misshapen, mistyped or non-finite tensor, and every leaf
        that the table leaves empty.
    """
    graphdef, state = nnx.split(model)
    problems: list[str] = []
    used: set[str] = set()
    leaves = {}
    for path, variable in nnx.to_flat_state(state):
        slots = _slots(".".join(map(str, path)), rules)
        used.update(key for slot in slots for key, _ in slot)
        value = _leaf(path, variable.get_value(), slots, tensors, problems)
        if value is not None:
            leaves[path] = variable.replace(value)
    problems = list(dict.fromkeys(problems))  # a stacked tensor fills several leaves, each with the same complaint
    unknown = [f"{shown(key)} is not part of this model" for key in tensors if key not in used]
    problems += unknown
    if problems:
        rest = "" if len(problems) <= _LISTED else f"; and {len(problems) - _LISTED} more"
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        shown_unknown = unknown[: max(_LISTED - len(problems) + len(unknown), _LISTED // 2)]
        listed = problems[: len(problems) - len(unknown)][: _LISTED - len(shown_unknown)] + shown_unknown
        raise ConversionError(
            f"the checkpoint does not fit the model ({count}), so check the model's name and config "
            f"overrides such as num_classes and img_size, or get another copy: {'; '.join(listed)}{rest}."
        )
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def _slots(path: str, rules: Sequence[Rule]) -> list[list[tuple[str, Rule]]]:
    """What fills a leaf: for each of its parts in order, the alternatives as (key, rule)."""
    matches = [(key, rule) for rule in rules if (key := rule.key_for(path)) is not None]
    count = max((rule.part[1] for _, rule in matches), default=1)
    return [[(key, rule) for key, rule in matches if rule.part == (i, count)] for i in range(count)]


def _leaf(
    path: tuple[Any, ...],
    leaf: jax.ShapeDtypeStruct | jax.Array,
    slots: list[list[tuple[str, Rule]]],
    tensors: Mapping[str, np.ndarray],
    problems: list[str],
) -> jax.Array | None:
    """The value of one leaf, or None with the reasons added to `problems`."""
    known = len(problems)
    parts = []
    for slot in slots:
        present = [(key, rule) for key, rule in slot if key in tensors]
        if not slot:
            problems.append(f"no rule fills {'.'.join(map(str, path))} of the model")
        elif not present:
            problems.append(f"{slot[0][0]} is missing")
        elif len(present) > 1:
            problems.append(f"{' and '.join(key for key, _ in present)} are the same parameter")
        else:
            key, rule = present[0]
            shape = leaf.shape if len(slots) == 1 else (leaf.shape[0] // len(slots), *leaf.shape[1:])
            try:
                parts.append(_converted(tensors[key], rule, shape, leaf.dtype))
            except ValueError as error:
                problems.append(f"{key} {error}")
    if len(problems) > known:
        return None
    # A copy, so that the model does not change with the caller's arrays.
    return jnp.array(parts[0] if len(parts) == 1 else np.concatenate(parts))


def _converted(source: np.ndarray, rule: Rule, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """A tensor in the leaf's layout and type."""
    if not jnp.issubdtype(source.dtype, jnp.floating):
        raise ValueError(f"has type {source.dtype.name}, but the model needs floating-point numbers")
    try:
        value = rule.transform(source)
    except ValueError as error:
        raise ValueError(f"has shape {source.shape}, but the model needs another rank ({error})") from error
    if value.shape != shape:
        layout = "" if value is source else f", which is {value.shape} in the model's layout"
        raise ValueError(f"has shape {source.shape}{layout}, but the model needs {shape}")
    with np.errstate(over="ignore"):  # what overflows is found below
        value = value.astype(dtype, copy=False)
    if not np.isfinite(value).all():
        raise ValueError(f"has values that are not finite in {np.dtype(dtype).name}")
    return value


def _of_rank(w: np.ndarray, rank: int) -> np.ndarray:
    if w.ndim != rank:
        raise ValueError(f"{rank} axes expected")
    return w
