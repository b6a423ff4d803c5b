"""The choice of a backend: by name, or the first that supports a call."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Backend(NamedTuple):
    """One implementation of an operation; both functions take the operation's arguments.

    `supports` looks at shapes, dtypes and what is None, never at values; it returns a reason against the call, or None.
    """

    supports: Callable[..., str | None]
    run: Callable[..., Any]


def choose(
    operation: str, backends: Mapping[str, Backend], implementation: str | None, *args: Any, **kwargs: Any
) -> Backend:
    """The backend `implementation`, or with None the first that supports the call.

    Raises:
      ValueError: an unknown name, or one whose backend does not support the call.
    """
    if implementation is None:
        return next(backend for backend in backends.values() if backend.supports(*args, **kwargs) is None)
    if implementation not in backends:
        raise ValueError(
            f"unknown {operation} implementation {implementation!r}; choose one of {', '.join(backends)} or None."
        )
    if reason := backends[implementation].supports(*args, **kwargs):
        raise ValueError(
            f"{operation} implementation {implementation!r} cannot run this call: {reason}; pass None instead."
        )
    return backends[implementation]
