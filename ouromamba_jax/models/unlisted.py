"""What keeps a method out of `nnx.tabulate`."""

from collections.abc import Callable
from functools import update_wrapper
from types import MethodType
from typing import Any, cast


def unlisted[F: Callable[..., Any]](method: F) -> F:
    """A method of a module that `nnx.tabulate` calls as it is.

    It traces every public function of every module's class under `jax.jit`, with all arguments as arrays: one that
    takes a flag, a name or a function, or returns one, would fail there.
    """
    return cast(F, _Unlisted(method))


class _Unlisted:
    """A method that is no function, so that whoever lists the functions of a class passes it over."""

    def __init__(self, method: Callable[..., Any]):
        update_wrapper(self, method)
        self.method = method

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self.method, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(*args, **kwargs)
