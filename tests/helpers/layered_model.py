"""A model of any layers, combined by any function: what users' own modules do with layers."""

import jax.numpy as jnp
from draws import normal
from flax import nnx
from linear_model import LinearConfig

WIDTH = 12
IMAGES = normal(0, (6, 4, 4, 3))


def linear(seed=0, kind=nnx.Linear, **fields):
    return kind(WIDTH, WIDTH, rngs=nnx.Rngs(seed), **fields)


class Stage(nnx.Module):
    """(B, L, C) to the same, by what `call` does with the layers."""

    def __init__(self, call, **layers):
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, x):
        return self.call(self, x)


class Model(nnx.Module):
    """Stages behind each other on the rows of an image (B, 4, 4, 3) as tokens."""

    def __init__(self, *stages):
        self.config, self.dtype = LinearConfig(), jnp.float32
        rows = Stage(lambda self, x: x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x)
        self.blocks = nnx.List([rows, *stages])

    @property
    def stages(self):
        return tuple((f"blocks.{i}", block) for i, block in enumerate(self.blocks))

    def __call__(self, images):
        for block in self.blocks:
            images = block(images)
        return images
