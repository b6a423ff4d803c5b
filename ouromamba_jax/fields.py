"""Fields of frozen configs, whatever kind of number a user gave."""

import dataclasses
from typing import Any


def plain_numbers(config: Any) -> None:
    """Makes numbers of NumPy and JAX in the fields of a frozen dataclass Python's own, in place.

    Configs are static arguments of compiled functions, hashed, and written as JSON.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if getattr(value, "ndim", None) == 0:
            object.__setattr__(config, field.name, value.item())
