"""What no quantised model can beat: its linear layers as bare int8 products, their inputs split for nothing."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from ouromamba_jax.models.layers import as_tokens
from ouromamba_jax.quantize import QuantLinear
from ouromamba_jax.quantize.sites import set_module


class BareLinear(nnx.Module):
    """One int8 product of a layer's weight with stored levels (L, K), and one float epilogue: to be timed, not used.

    The levels stand for any input. They are zero where it exceeds infinity: nowhere, which the compiler does not know,
    so what makes the input is computed as before, and only the levels are written.
    """

    def __init__(self, layer: QuantLinear):
        weight = layer.weight
        rng = np.random.default_rng(0)
        levels = np.clip(np.rint(2 * rng.standard_normal((layer.spec.tokens, weight.shape[0]))), -7, 7)
        self.levels = nnx.Variable(jnp.asarray(levels, jnp.int8))
        self.token_scale = nnx.Variable(jnp.full(layer.spec.tokens, 0.5, jnp.float32))
        self.infinity = nnx.Variable(jnp.float32(jnp.inf))
        self.weight = nnx.Variable(weight.values)
        self.weight_scale = nnx.Variable(weight.scale[0].astype(jnp.float32))
        self.bias = None if layer.bias is None else nnx.Variable(layer.bias[...])
        self.dtype = layer.dtype

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... O"]:
        """Numbers of the shape and type of the layer's output."""
        tokens, levels = as_tokens(x), self.levels[...][None]
        beyond = tokens.astype(jnp.float32) > self.infinity[...]
        # Fused into the product, the comparison would keep it from XLA's fast routines on CPUs.
        levels = lax.optimization_barrier(jnp.where(beyond, jnp.zeros_like(levels), levels))
        product = lax.dot_general(levels, self.weight[...], (((2,), (0,)), ((), ())), preferred_element_type=jnp.int32)
        y = product.astype(jnp.float32) * self.token_scale[...][None, :, None] * self.weight_scale[...][None, None]
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)[None, None]
        return y.astype(self.dtype).reshape(*x.shape[:-1], -1)


def with_bare_products[Module: nnx.Module](module: Module) -> Module:
    """A copy of a quantised model or stage whose linear layers are `BareLinear`; its scans stay as they are."""
    bare = nnx.clone(module)
    for path, layer in list(nnx.iter_modules(module)):
        if isinstance(layer, QuantLinear):
            set_module(bare, ".".join(map(str, path)), BareLinear(layer))
    return bare
