"""`quantize` without data: where there are no calibration images, they are generated first."""

import os

import jax
from jaxtyping import Array, Float

from ouromamba_jax.files import local_path
from ouromamba_jax.gen import GenConfig, generate_images
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.quantize import QuantConfig, QuantReport
from ouromamba_jax.quantize.run import quantize as quantize_with
from ouromamba_jax.quantize.sites import resolve_sites
from ouromamba_jax.quantize.stages import Progress


def quantize(
    model: VisionModel,
    images: Float[Array, "N H W I"] | None,
    config: QuantConfig,
    *,
    generation: GenConfig | None = None,
    key: Array | None = None,
    progress: Progress | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> tuple[VisionModel, QuantReport]:
    """A low-bit copy of `model`, and the account of what was done; `model` itself is left as it is.

    Every linear layer becomes an integer product and every selective scan runs on rounded operands (OuroMamba,
    Algorithm 2). Static scales are searched on the float model's activations; then, stage by stage, they are tuned so
    that the quantised stage, fed by the quantised stages before it, gives the float stage's output.

    Args:
      model: a float model of any family.
      images: normalised calibration images, synthetic or real; None generates them.
      config: see `QuantConfig`.
      generation: how images are generated, by default `GenConfig()`.
      key: of the generation, by default `jax.random.key(0)`.
      progress: called as progress(done, total, what comes next), in iterations and then in stages.
      resume: folder in which to keep what is finished. If it holds some, the run goes on behind it, to the bits of one
        that was not interrupted.

    Raises:
      ValueError: if the model is already quantised, the images are no normalised ones, a rule decides nothing, a weight
        group does not divide a layer's inputs, the activations of a site are not finite, a layer computes what is not
        known here, or the model reads its weight itself, the model multiplies matrices where no rule and no site covers
        them, `resume` is of another run, or a generation is described though there are images.

    Examples:
      >>> import jax
      >>> import ouromamba_jax as om
      >>> images = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3), minval=-1, maxval=1)
      >>> config = om.QuantConfig.preset("w4a4", tune_epochs=0)
      >>> low, report = om.quantize(om.load("vim_micro"), images, config)
      >>> low(images).shape, report.mean_bits < 8
      ((4, 10), True)
    """
    if images is None:
        resolve_sites(model, config)  # what is wrong with the rules is said before images are made
        images = generate_images(
            model,
            generation or GenConfig(),
            jax.random.key(0) if key is None else key,
            progress=progress and (lambda done, total, _: progress(done, total, "images")),
            checkpoint_dir=None if resume is None else local_path(resume) / "images",
        ).images
    elif generation is not None or key is not None:
        raise ValueError("there are images already; leave out generation and key, or pass images=None.")
    return quantize_with(model, images, config, progress=progress, resume=resume)
