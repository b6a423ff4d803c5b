"""What OuroMamba-Gen optimises, and how."""

from dataclasses import dataclass
from typing import Literal

from ouromamba_jax.fields import check_types
from ouromamba_jax.ops.attention import Weighting, neighbourhood_mask

Features = Literal["readout", "attention"]
Negatives = Literal["neighbourhood", "all"]


@dataclass(frozen=True)
class GenConfig:
    """What is optimised, and how. A loss with weight 0 is not computed.

    Args:
      num_images: images to make; the last batch holds what is left.
      iterations: updates per batch. The paper takes 1000; scored on training images (docs/study), the images of 50 to
        100 calibrate best on a micro model, those of 200 and 400 slightly worse.
      batch_size: images optimised together, at most; an image depends on the key, its batch and its target.
      learning_rate: Adam's at the start of a cosine schedule that ends at 0; in units of normalised pixels.
      scales: resolutions that noise and updates are the sum of (see `prior.py`), each half the one before; 1 is plain
        pixels, None goes down to about 4 x 4 cells.
      chroma: share of noise and updates that is independent between the colours, between 0 (gray images) and 1;
        images of one channel have none.
      contrastive: weight of the patch-contrastive loss, which is 1 where all similarities are equal.
      output: weight of the output loss, the cross-entropy to the image's target.
      pse: weight of PSAQ-ViT's patch-similarity entropy, the loss that the contrastive one replaces.
      total_variation: weight of the mean absolute difference of neighbouring pixels, in units of [0, 1] pixels.
      weighting: weights of the hidden states in the patched sum: "delta" (mean over channels) or "uniform".
      features: per-token features of both patch losses: the patched "readout" C_t h_p(t), or the rows of the patched
        implicit "attention", which costs L times more.
      neighbourhood: odd side of the window of the patched sum and of the positives.
      positives: most similar neighbours that a token is drawn to.
      negatives: what it is pushed away from: the rest of its "neighbourhood", or "all" other tokens.
      temperature: of the contrastive softmax.
      jitter: every iteration sees the images shifted (cyclically) by up to this share of their height and width.
      checkpoint_every: iterations between two checkpoints, where `generate_images` is given a directory.

    Examples:
      >>> import ouromamba_jax as om
      >>> om.GenConfig(num_images=8, contrastive=0).loss_names
      ('output', 'total_variation')
    """

    num_images: int = 128
    iterations: int = 50
    batch_size: int = 32
    learning_rate: float = 0.2
    scales: int | None = None
    chroma: float = 0.2
    contrastive: float = 0.1
    output: float = 1.0
    pse: float = 0.0
    total_variation: float = 0.5
    weighting: Weighting = "delta"
    features: Features = "readout"
    neighbourhood: int = 5
    positives: int = 12
    negatives: Negatives = "all"
    temperature: float = 0.1
    jitter: float = 0.125
    checkpoint_every: int = 50

    def __post_init__(self):
        check_types(self)
        for name in ("num_images", "iterations", "batch_size", "positives", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1.")
        for name in ("contrastive", "output", "pse", "total_variation"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 (off) or more.")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use a positive number.")
        for name in ("chroma", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use a share between 0 and 1.")
        if self.scales is not None and self.scales < 1:
            raise ValueError(f"scales is {self.scales}; use at least 1, or None.")
        if not self.loss_names:
            raise ValueError("every loss has weight 0, so nothing would be optimised; give one a positive weight.")
        if self.contrastive and self.negatives == "neighbourhood" and self.positives >= self.neighbourhood**2 - 1:
            raise ValueError(
                f"{self.positives} positives leave no negatives in a {self.neighbourhood} x {self.neighbourhood} "
                'neighbourhood; use fewer positives or negatives="all".'
            )
        neighbourhood_mask((1, 1), self.neighbourhood)  # refuses even windows

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses whose weight is not 0."""
        return tuple(name for name in ("contrastive", "output", "pse", "total_variation") if getattr(self, name))
