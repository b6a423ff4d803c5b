"""Derivatives of integer arithmetic: those of the same arithmetic in floats, whose roundings have slope 1."""

from collections.abc import Callable
from typing import Any

import jax


def straight_through(run: Callable[..., Any], smooth: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the values of `run` and, in reverse mode, the derivatives of `smooth`.

    Both take the same pytrees and return the same shapes and types. Without differentiation `smooth` is not even
    traced; with it, only the arguments are kept for the backward pass. Neither may close over what is differentiated.
    """

    @jax.custom_vjp
    def function(*args: Any) -> Any:
        return run(*args)

    def forward(*args: Any) -> tuple[Any, tuple[Any, ...]]:
        return run(*args), args

    def backward(args: tuple[Any, ...], cotangents: Any) -> tuple[Any, ...]:
        return jax.vjp(smooth, *args)[1](cotangents)

    function.defvjp(forward, backward)
    return function
