"""Tiny models of every family, float and quantised, and what JAX's transformations of them must give."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from draws import normal
from tiny_models import FAMILIES, natural_model, quantised

import ouromamba_jax as om

CASES = [(family, kind) for family in FAMILIES for kind in ("float", "quantised")]


@cache
def model_of(family: str, kind: str) -> Any:
    """The quantised ones round every operand of the scans that quantisation finds by default."""
    if kind == "float":
        return natural_model(f"{family}_micro", **FAMILIES[family])
    return quantised(om.QuantConfig.preset("w4a4"), family)


def images_of(family: str, count: int = 4) -> jax.Array:
    return normal(3, (count, *FAMILIES[family]["img_size"], 3))


@cache
def program(family: str, kind: str) -> tuple[Any, Any, jax.Array, np.ndarray]:
    """(fn, state, images, logits of `jax.jit`)."""
    fn, state = om.pure(model_of(family, kind))
    images = images_of(family)
    return fn, state, images, np.asarray(jax.jit(fn)(state, images))


def loss(fn: Any) -> Any:
    """Of (state, images), for gradients to both."""
    return lambda state, images: jnp.mean(fn(state, images) ** 2)


def check_close(found: Any, expected: Any) -> None:
    """Equal but for sums in another order, and the few levels that these move across an edge."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.linalg.norm(expected) > 0
    assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)


def flat_floats(tree: Any) -> np.ndarray:
    floats = [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0]
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in floats])


def ops_inputs() -> dict[str, Any]:
    """Arguments of the public functions of arrays: two windows of ten tokens, grouped weights, a scan of two groups."""
    x = normal(0, (2, 13, 8)) * jnp.where(jnp.arange(8) == 3, 9.0, 1.0)[None, None]
    return dict(
        x=x,
        scale=jnp.full((13,), 0.3, jnp.float32),
        weight=om.quantize_array(normal(1, (8, 5)), np.int64(4), group=np.int64(4)),
        bias=normal(2, (5,)),
        delta=normal(4, (2, 13, 8)),
        A=-jnp.exp(normal(5, (8, 3))),
        B=normal(6, (2, 13, 2, 3)),
        C=normal(7, (2, 13, 2, 3)),
    )


def ops(inputs: dict[str, Any]) -> jax.Array:
    """What `split_outliers`, `outlier_matmul` and `selective_scan` make of them, in one array (2, 13, 13)."""
    split = om.split_outliers(inputs["x"], inputs["scale"], om.OutlierConfig(act_bits=np.int64(4)))
    product = om.outlier_matmul(split, inputs["weight"], bias=inputs["bias"])
    names = ("x", "delta", "A", "B", "C")
    scan = om.selective_scan(*(inputs[name] for name in names), delta_softplus=True, collect=lambda h: h.sum((1, 2)))
    return jnp.concatenate([product, scan.y + scan.states[..., None]], axis=2)
