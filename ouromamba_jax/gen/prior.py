"""What is known about pictures before any is seen: coarse structure is stronger than fine, and colours vary together.

Both the noise that images start from and every update are sums over resolutions, with amplitudes proportional to the
cell size (the 1/f spectrum of natural images), of which a share `chroma` is independent between colours. Gray images,
of one channel, have the common part alone. Plain pixel updates of a Vim end in fine patterns around its class token,
and the activations that these cause are too small.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ouromamba_jax.gen.config import GenConfig

Pyramid = tuple[Float[Array, "B h w parts"], ...]


def pyramid_shapes(shape: tuple[int, ...], scales: int | None) -> list[tuple[int, ...]]:
    """Shapes of the coefficients of images (B, H, W, I), finest first: of all colours and their common part."""
    batch, height, width, channels = shape
    if scales is None:
        scales = max(1, (min(height, width) // 4).bit_length())
    parts = 1 if channels == 1 else channels + 1
    return [(batch, -(-height // 2**k), -(-width // 2**k), parts) for k in range(scales)]


def compose(pyramid: Pyramid, shape: tuple[int, ...], chroma: float) -> Float[Array, "B H W I"]:
    """Images from their coefficients; linear."""
    images, channels = jnp.zeros(shape, jnp.float32), shape[-1]
    for k, coefficients in enumerate(pyramid):
        if channels > 1:
            coefficients = chroma * coefficients[..., :channels] + (1 - chroma) * coefficients[..., channels:]
        images += 2.0 ** (k + 1 - len(pyramid)) * jax.image.resize(coefficients, shape, "linear")
    return images


def noise(key: Array, shape: tuple[int, ...], config: GenConfig) -> Float[Array, "B H W I"]:
    """Gaussian noise of the prior's spectrum and colours; white with one scale and chroma 1."""
    shapes = pyramid_shapes(shape, config.scales)
    keys = jax.random.split(key, len(shapes))
    pyramid = tuple(jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True))
    return compose(pyramid, shape, config.chroma)


def optimiser(config: GenConfig) -> optax.GradientTransformation:
    """Adam on the coefficients with a cosine schedule; takes the gradient of the pixels and returns their update."""
    adam = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.iterations))

    def zeros(images: Array) -> Pyramid:
        return tuple(jnp.zeros(shape, jnp.float32) for shape in pyramid_shapes(images.shape, config.scales))

    def init(images: Array) -> optax.OptState:
        return adam.init(zeros(images))

    def update(gradient: Array, state: optax.OptState, params: Array | None = None) -> tuple[Array, optax.OptState]:
        del params
        _, transpose = jax.vjp(lambda pyramid: compose(pyramid, gradient.shape, config.chroma), zeros(gradient))
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in int32 and multiplies them with floats
            updates, state = adam.update(transpose(gradient)[0], state)
        return compose(updates, gradient.shape, config.chroma), state

    return optax.GradientTransformation(init, update)
