"""What every model's config holds: how pixels become inputs."""

from ouromamba_jax.preprocessing import Preprocessing, height_width

__all__ = ["Preprocessing", "height_width"]
