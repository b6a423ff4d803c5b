"""The least model that images can be generated for: one linear layer on the pixels, which compiles in a second."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from ouromamba_jax.data.preprocessing import Preprocessing


@dataclass(frozen=True)
class LinearConfig:
    num_classes: int = 5
    img_size: int = 4
    in_channels: int = 3
    preprocessing: Preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    @property
    def inputs(self):
        return self.img_size**2 * self.in_channels


class Identity(nnx.Module):
    def __call__(self, x):
        return x


class LinearHead(nnx.Module):
    def __init__(self, inputs, classes):
        self.proj = nnx.Linear(inputs, classes, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.proj(x.reshape(len(x), -1))


class LinearModel(nnx.Module):
    """Images (B, 4, 4, channels) to logits of `classes`, by default those of the config."""

    def __init__(self, classes=None, config=None):
        self.config, self.dtype = LinearConfig() if config is None else config, jnp.float32
        self.stem, self.blocks = Identity(), nnx.List([])
        self.head = LinearHead(self.config.inputs, self.config.num_classes if classes is None else classes)
