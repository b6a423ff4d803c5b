"""The check that no matrix product of a stage stays float unseen, however deep it hides."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from draws import normal
from flax import nnx

from ouromamba_jax.quantize.coverage import check_coverage


class Toy(nnx.Module):
    """A stage that multiplies by a matrix of its own, behind a linear layer."""

    def __init__(self, product):
        self.product = product
        self.linear = nnx.Linear(5, 5, dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.weight = nnx.Param(normal(0, (5, 5)))

    def __call__(self, x):
        return self.product(self.linear(x), self.weight[...])


def scanned(x, w):
    return jax.lax.scan(lambda c, _: (c @ w, None), x, length=2)[0]


def convolved(x, w):
    return jax.lax.conv_general_dilated(x, w[None], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))


HIDDEN_PRODUCTS = {
    "dot": jnp.dot,
    "einsum": partial(jnp.einsum, "blc,cd->bld"),
    "convolution": convolved,
    "jit": jax.jit(jnp.matmul),
    "scan": scanned,
    "cond": lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x),
    "checkpoint": jax.checkpoint(jnp.matmul),
    "vmap": jax.vmap(jnp.dot, (0, None)),
    "custom": jax.custom_vjp(jnp.matmul),
}
HIDDEN_PRODUCTS["custom"].defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: r)


@pytest.mark.parametrize("kind", HIDDEN_PRODUCTS)
def test_a_product_outside_of_the_sites_is_found(kind):
    x = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)
    with pytest.raises(ValueError, match=r"toy has 1 matrix products outside of its linear layers and scans"):
        check_coverage(Toy(HIDDEN_PRODUCTS[kind]), x, "toy")
    check_coverage(Toy(lambda x, w: x * w[None, :3]), x, "toy")
