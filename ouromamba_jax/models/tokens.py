"""What models have in common whose blocks all pass on the tokens of one grid of patches."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.models.trace import ScanOrder


class TokenModel(VisionModel):
    """A model of one grid of patches, with tokens among them that are none. `features` counts its blocks, and gives the
    map of the last one.

    The config has depth, grid, class_indices (the places of those tokens) and resize_positions; the stem holds the
    config and learned positions, or None.
    """

    default_maps = slice(-1, None)

    @property
    def map_blocks(self) -> tuple[int, ...]:
        return tuple(range(self.config.depth))

    def to_map(self, x: Float[Array, "B L C"]) -> Float[Array, "B h w C"]:
        height, width = self.config.grid
        return ScanOrder(height, width, self.config.class_indices).to_map(x)[0]

    def for_size(self, size: tuple[int, int]) -> "TokenModel":
        model, before = super().for_size(size), self.config
        model.stem.config = config = model.config
        if self.stem.positions is not None:
            positions = self.stem.positions[...].astype(jnp.float32)
            model.stem.positions = self.stem.positions.replace(config.resize_positions(positions, before.grid))
        return model
