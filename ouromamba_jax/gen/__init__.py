"""OuroMamba-Gen (Algorithm 1): images made from a model alone.

Pixels are optimised until every layer's patched attention is structured like that of a picture and the output names a
class. Knows no model family: it uses stem, blocks, head and what a block's trace shows.
"""

from ouromamba_jax.gen.config import GenConfig
from ouromamba_jax.gen.losses import contrastive_loss, output_loss, patch_similarity_entropy, total_variation
from ouromamba_jax.gen.run import Generated, class_targets, generate_images

__all__ = [
    "GenConfig",
    "Generated",
    "class_targets",
    "contrastive_loss",
    "generate_images",
    "output_loss",
    "patch_similarity_entropy",
    "total_variation",
]
