"""Statistics of more samples than memory holds: reductions over batches, of which each pass serves all that are asked.

What needs several passes is written as a generator: it yields a pytree of `Ask`s, is sent what they found over all
batches, and returns its result in the end.
"""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

type Asking[T] = Generator[Any, Any, T]
"""Yields a pytree of `Ask`s, is sent the same pytree of what they found, returns T."""


@dataclass(frozen=True)
class Ask:
    """A reduction: `of` makes arrays, a pytree, of a batch; `join` makes one array of those of two batches."""

    of: Callable[[Any], Any]
    join: Callable[[Array, Array], Array] = jnp.add


def together[T](parts: dict[str, Asking[T]]) -> Asking[dict[str, T]]:
    """Several side by side, in as many passes as the longest needs; what they return, under the same names."""
    asked: dict[str, Any] = {}
    returned: dict[str, T] = {}

    def advance(name: str, found: Any) -> None:
        asked.pop(name, None)
        try:
            asked[name] = parts[name].send(found)
        except StopIteration as stop:
            returned[name] = stop.value

    for name in parts:
        advance(name, None)
    while asked:
        found = yield dict(asked)
        for name in found:
            advance(name, found[name])
    return {name: returned[name] for name in parts}


def gather[T](asking: Asking[T], batches: Callable[[], Iterable[Any]]) -> T:
    """What `asking` returns; `batches()` goes over all of them once more."""

    def one_pass(asked: Any) -> Any:
        total = None
        for batch in batches():
            found = jax.tree.map(lambda ask, batch=batch: ask.of(batch), asked)
            total = found if total is None else jax.tree.map(_joined, asked, total, found)
        return total

    try:
        asked = next(asking)
        while True:
            asked = asking.send(one_pass(asked))
    except StopIteration as stop:
        return stop.value


def _joined(ask: Ask, before: Any, found: Any) -> Any:
    return jax.tree.map(ask.join, before, found)
