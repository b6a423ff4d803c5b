"""Images and labels from anywhere, as a model takes them: an image folder, an .npz, TFDS, or the embedded digits."""

from ouromamba_jax.data.loaders import Dataset, iterate_batches, load_images
from ouromamba_jax.data.sources import digits_split
from ouromamba_jax.data.transform import preprocess, to_pixels

__all__ = ["Dataset", "digits_split", "iterate_batches", "load_images", "preprocess", "to_pixels"]
