"""Cases that only `pytest -m slow` runs."""

from typing import Any

import pytest


def slow(*cases: Any) -> list[Any]:
    """The cases of a `parametrize`, marked; a tuple is several arguments."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
