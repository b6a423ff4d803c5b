"""Fields of frozen configs: whatever kind of number a user gave, and held to their annotations."""

import dataclasses
import math
import types
import typing
from numbers import Integral, Real
from typing import Any

_UNIONS = (types.UnionType, typing.Union)  # the second where a Literal is in it
_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


def check_types(config: Any) -> None:
    """Holds the fields of a frozen dataclass to their annotations, numbers being finite; those of Any may be anything.

    Lists become tuples, and numbers of NumPy and JAX Python's own, in place: configs are static arguments of compiled
    functions, hashed, and written as JSON.

    Raises:
      ValueError: naming the first field that is wrong, and what it must be.
    """
    for field in dataclasses.fields(config):
        value = plain(getattr(config, field.name))
        if not fits(value, field.type):
            raise ValueError(f"{field.name} must be {_in_words(field.type)}, not {value!r}.")
        object.__setattr__(config, field.name, value)


def plain(value: Any) -> Any:
    """A list as a tuple, a number of NumPy or JAX, also in one, as Python's own."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    if getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def fits(value: Any, kind: Any) -> bool:
    """Whether a `plain` value is what an annotation says: no bool is a number, and no NaN or infinity a float."""
    parts = typing.get_args(kind)
    if kind is Any:
        return True
    if typing.get_origin(kind) is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if typing.get_origin(kind) in _UNIONS:
        return any(fits(value, part) for part in parts)
    if parts:  # a tuple: (kind, ...) or (kind, kind)
        if not isinstance(value, tuple) or (parts[1] is not ... and len(value) != len(parts)):
            return False
        return all(fits(v, parts[0]) for v in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(filter(None, (", ".join(map(repr, parts[:-1])), repr(parts[-1]))))
    if typing.get_origin(kind) in _UNIONS:
        return " or ".join(map(_in_words, parts))
    if parts:
        return "a tuple of texts" if parts[0] is str else f"a tuple of {parts[0].__name__}"
    return _WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")
