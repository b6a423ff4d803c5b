"""The losses, one value per image each: patch contrast, patch-similarity entropy, output, total variation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ouromamba_jax.gen.config import Negatives
from ouromamba_jax.ops.attention import neighbourhood_mask


def cosine_similarities(features: Float[Array, "B M F"]) -> Float[Array, "B M M"]:
    """Cosine similarity of every pair of tokens, float32, with finite gradients for zero features."""
    x = features.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    # Relative to the image's mean, the guard neither hides small features nor lets a vanishing one explode.
    guard = 1e-6 * jax.lax.stop_gradient(jnp.mean(square, axis=1, keepdims=True)) + 1e-20
    x = x * jax.lax.rsqrt(square + guard)
    return jnp.einsum("btf,bkf->btk", x, x)


@functools.cache  # every block of a model asks for the same
def contrastive_pairs(
    grid: tuple[int, int], neighbourhood: int, positives: int, negatives: Negatives
) -> tuple[Bool[np.ndarray, "M M"], Bool[np.ndarray, "M M"], Int[np.ndarray, " M"]]:
    """Whom each token may be drawn to (M, M), pushed from (M, M), and how many it is pushed from (M,), on one grid."""
    near = neighbourhood_mask(grid, neighbourhood) & ~np.eye(grid[0] * grid[1], dtype=bool)
    pool = near if negatives == "neighbourhood" else ~np.eye(len(near), dtype=bool)
    return near, pool, pool.sum(axis=1) - np.minimum(near.sum(axis=1), positives)


def contrastive_loss(
    features: Float[Array, "B M F"],
    *,
    grid: tuple[int, int],
    neighbourhood: int = 5,
    positives: int = 12,
    negatives: Negatives = "all",
    temperature: float = 0.1,
) -> Float[Array, " B"]:
    """Patch-contrastive loss (InfoNCE) of one layer, one value per image.

    Token t is drawn to P(t), the `positives` most similar tokens of its neighbourhood (of equals the first; the
    selection has no gradient), and pushed away from Neg(t), the rest of the neighbourhood or of all tokens:

        L_t = mean_{p in P(t)} -log(e^{s(t,p)/T} / (e^{s(t,p)/T} + sum_{n in Neg(t)} e^{s(t,n)/T})) / log(1 + |Neg(t)|)

    averaged over the tokens that have negatives. Windows are clipped at the border. The division makes the loss 1 where
    all similarities are equal, whatever the number of tokens. A reconstruction of OuroMamba's L^C: its temperature,
    negatives and normalisation are not public.

    Raises:
      ValueError: if no token of the grid has a negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ouromamba_jax.gen import contrastive_loss
      >>> contrastive_loss(jnp.ones((1, 64, 8)), grid=(8, 8)).round(3).tolist()
      [1.0]
    """
    near, pool, count = contrastive_pairs(grid, neighbourhood, positives, negatives)
    candidates = near.sum(axis=1)
    positives = min(positives, int(candidates.max()))
    if not positives or not count.any():
        raise ValueError(
            f"on a grid of {grid[0]} x {grid[1]} tokens the contrastive loss has no negatives; "
            'use fewer positives, negatives="all", or contrastive=0.'
        )
    similar = cosine_similarities(features)
    ranked, index = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(near[None], similar, -jnp.inf)), positives)
    valid = ranked > -jnp.inf  # border tokens have fewer neighbours than positives
    chosen = jnp.put_along_axis(jnp.zeros(similar.shape, bool), index, valid, axis=-1, inplace=False)
    logits = similar / temperature
    pushed = jax.nn.logsumexp(jnp.where(pool[None] & ~chosen, logits, -1e30), axis=-1)
    pulled = jnp.take_along_axis(logits, index, axis=-1)
    per_pair = jnp.where(valid, jax.nn.softplus(pushed[..., None] - pulled), 0.0)
    per_token = jnp.sum(per_pair, axis=-1) / jnp.asarray(np.minimum(candidates, positives), jnp.float32)[None]
    scale = np.where(count > 0, 1 / np.log1p(np.maximum(count, 1)), 0.0) / np.count_nonzero(count)
    return jnp.sum(per_token * jnp.asarray(scale, jnp.float32)[None], axis=-1)


def patch_similarity_entropy(features: Float[Array, "B M F"], *, bandwidth: float = 0.05, points: int = 10) -> Array:
    """Minus the differential entropy of the tokens' pairwise cosine similarities (B,), after PSAQ-ViT (Li et al. 2022).

    Their density is a Gaussian kernel estimate at equidistant points between the image's least and largest similarity.

    Examples:
      >>> import jax
      >>> from ouromamba_jax.gen import patch_similarity_entropy
      >>> patch_similarity_entropy(jax.random.normal(jax.random.key(0), (2, 64, 8))).shape
      (2,)
    """
    similar = cosine_similarities(features).reshape(features.shape[0], -1)
    low, high = jax.lax.stop_gradient((jnp.min(similar, axis=1), jnp.max(similar, axis=1)))
    at = low[:, None] + (high - low)[:, None] * jnp.linspace(0.0, 1.0, points, dtype=jnp.float32)[None]
    z = (at[:, :, None] - similar[:, None]) / bandwidth
    density = jnp.mean(jnp.exp(-0.5 * z * z), axis=2) / (bandwidth * np.sqrt(2 * np.pi).item())
    step = (high - low) / (points - 1)
    return jnp.sum(density * jnp.log(density + 1e-12), axis=1) * step


def output_loss(logits: Float[Array, "B K"], targets: Int[Array, " B"]) -> Float[Array, " B"]:
    """Cross-entropy to the target class, one value per image.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ouromamba_jax.gen import output_loss
      >>> round(float(output_loss(jnp.zeros((1, 10)), jnp.asarray([3]))[0]), 2)  # log(10)
      2.3
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def total_variation(images: Float[Array, "B H W I"]) -> Float[Array, " B"]:
    """Mean absolute difference of vertical and of horizontal neighbours, one value per image.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ouromamba_jax.gen import total_variation
      >>> edge = jnp.repeat(jnp.asarray([0.0, 1.0])[None, None, :, None], 3, axis=3)  # one image of 1 x 2 pixels
      >>> float(total_variation(jnp.repeat(edge, 2, axis=1))[0])
      1.0
    """
    vertical, horizontal = jnp.abs(jnp.diff(images, axis=1)), jnp.abs(jnp.diff(images, axis=2))
    return jnp.mean(vertical, axis=(1, 2, 3)) + jnp.mean(horizontal, axis=(1, 2, 3))
