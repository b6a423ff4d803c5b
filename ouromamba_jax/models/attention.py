"""Self-attention with its projections, as blocks use it."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32

from ouromamba_jax.models.layers import DotProductAttention, LayerNorm, after, normalised
from ouromamba_jax.models.trace import AttentionTrace, ScanOrder


class SelfAttention(nnx.Module):
    """Multi-head self-attention between all tokens of a sample; q, k and v come from one projection, in this order.

    Args:
      qkv_bias: whether that projection has a bias.
      qk_norm: eps of a LayerNorm of every head's q, and of one of every head's k, both shared by the heads; None for
        none.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm: float | None = None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        linear: dict[str, Any] = dict(kernel_init=nnx.initializers.normal(0.02), rngs=rngs, **types)
        self.qkv = nnx.Linear(dim, 3 * dim, use_bias=qkv_bias, **linear)
        norms = (None if qk_norm is None else LayerNorm(dim // heads, eps=qk_norm, **types) for _ in range(2))
        self.q_norm, self.k_norm = norms
        self.attention = DotProductAttention(heads, dtype=dtype)
        self.proj = nnx.Linear(dim, dim, **linear)

    def __call__(
        self, x: Float[Array, "B L C"], norm: LayerNorm | None = None, residual: Float32[Array, "B L C"] | None = None
    ) -> Float[Array, "B L C"]:
        """Of x, first normalised if there is a norm; added to `residual`."""
        out = self.attention(*self._operands(normalised(self.qkv, norm, x)))
        return after(self.proj, lambda x: x, out, residual=residual)

    def trace(
        self, x: Float[Array, "B L C"], order: ScanOrder, *, collect: Callable[[Array], Any] | None = None
    ) -> tuple[Float[Array, "B L C"], AttentionTrace]:
        """(output, AttentionTrace)."""
        del collect
        out, attention = self.attention.trace(*self._operands(self.qkv(x)))
        update = self.proj(out)
        return update, AttentionTrace((), x, update, attention, order)

    def _operands(self, qkv: Float[Array, "B L D"]) -> tuple[Array, Array, Array]:
        q, k, v = jnp.split(qkv, 3, axis=-1)
        return self._by_heads(self.q_norm, q), self._by_heads(self.k_norm, k), v

    def _by_heads(self, norm: LayerNorm | None, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        return x if norm is None else norm(x.reshape(*x.shape[:2], self.heads, -1)).reshape(x.shape)
