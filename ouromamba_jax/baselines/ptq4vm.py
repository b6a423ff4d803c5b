"""PTQ4VM (Cho et al., WACV 2025): smoothing, per-token static asymmetric activations, joint learning of scales.

As published, only linear layers inside the blocks are quantised: stem, head, downsampling convolutions, the scan and
everything around it stay float at any bits. Smoothing divides the activations at run time; no norm takes it up.

Where ours departs from the published code:
- All scales and smoothing factors learn. In the code for Vim those of x_proj and dt_proj get no gradient: these layers
  run inside a function with a backward pass of its own, which returns none for them.
- The best epoch's parameters are kept, not the last one's (see `learn`).
- The loss compares a block's whole update, in VMamba with that of its MLP, over channels. In the code for VMamba the
  cosine is taken over the last axis of channels-first maps, their width.
- MambaVision, for which nothing is published, takes the settings for Vim. The convolutions of its blocks count as
  linear layers; the products of its attention stay float.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from ouromamba_jax.baselines.base import BaselineConfig, linear_sites, site_reports
from ouromamba_jax.baselines.ptq4vm_linear import (
    SMALLEST,
    AsymmetricLinear,
    FakeAsymmetricLinear,
    Params,
    find_parameters,
)
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.quantize.config import QuantRule
from ouromamba_jax.quantize.report import QuantReport
from ouromamba_jax.quantize.sites import set_module
from ouromamba_jax.quantize.stages import Fitted, Progress, StageInputs, quantize_stages
from ouromamba_jax.quantize.tune import cosine_loss, update_of


@dataclass(frozen=True)
class PTQ4VMConfig(BaselineConfig):
    """PTQ4VM; the defaults are the settings of its Vim script.

    Args:
      alpha: share of the activations in the smoothing factors.
      epochs: passes over the calibration images in the joint learning of scales; 0 leaves everything as found.
      train_batch: images per step of learning; None takes all, one step per epoch.
      scale_learning_rate: AdamW's, for the scales of weights and activations themselves.
      smooth_learning_rate: AdamW's, for the smoothing factors themselves.

    The default `rules` are what the published code leaves in float.
    """

    alpha: float = 0.5
    epochs: int = 100
    train_batch: int | None = None
    scale_learning_rate: float = 5e-4
    smooth_learning_rate: float = 1e-2
    rules: tuple[QuantRule, ...] = (QuantRule(r"^(stem|head)\.|downsample", skip=True),)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in 0..1, not {self.alpha}.")
        if self.epochs < 0 or (self.train_batch is not None and self.train_batch < 1):
            raise ValueError("epochs must be at least 0 and train_batch at least 1.")
        if min(self.scale_learning_rate, self.smooth_learning_rate) <= 0:
            raise ValueError("scale_learning_rate and smooth_learning_rate must be positive.")

    @classmethod
    def vmamba(cls, **overrides: Any) -> "PTQ4VMConfig":
        """The settings of its VMamba script."""
        published = dict(alpha=0.65, epochs=50, train_batch=32, scale_learning_rate=1e-4, smooth_learning_rate=1e-4)
        return cls(**{**published, **overrides})


def quantize_ptq4vm(
    model: VisionModel,
    images: Float[Array, "N H W I"],
    config: PTQ4VMConfig,
    *,
    progress: Progress | None = None,
) -> tuple[VisionModel, QuantReport]:
    """`model` quantised by PTQ4VM, and the account of it.

    Raises:
      ValueError: as `quantize_stages`.
    """

    def fit(stage: nnx.Module, inputs: StageInputs) -> Fitted:
        linears = linear_sites(stage, inputs.configs)
        bits = {path: (c.weight_bits, c.act_bits) for path, c in inputs.configs.items() if path in linears}
        params, zeros = {}, {}
        for path, linear in linears.items():
            x, kernel = inputs.captured[path]["input"], linear.kernel[...].astype(jnp.float32)
            params[path], zeros[path] = find_parameters(x, kernel, *bits[path], config.alpha)
        losses: tuple[float, ...] = ()
        if config.epochs and linears:
            target = update_of(inputs.exact_out, inputs.exact)
            params, losses = learn(stage, bits, params, zeros, inputs.quantised, target, config)
        modules: dict[str, nnx.Module] = {
            path: AsymmetricLinear(linear, params[path], zeros[path], *bits[path]) for path, linear in linears.items()
        }
        granularity = dict.fromkeys(modules, "weight: output channel; input: token, smoothed")
        return Fitted(modules, site_reports(stage, modules, inputs, granularity), losses)

    return quantize_stages(model, images, config.settings(), fit, progress=progress)


def learn(
    stage: nnx.Module,
    bits: dict[str, tuple[int, int]],
    params: dict[str, Params],
    zeros: dict[str, Array],
    x: Array,
    target: Array,
    config: PTQ4VMConfig,
) -> tuple[dict[str, Params], tuple[float, ...]]:
    """Joint learning of scales and smoothing factors: the stage's update on x is brought close to `target`.

    Minimises the mean over samples and tokens of 1 - cosine over channels by AdamW (weight decay 1e-5, gradients
    clipped at 2.0, constant rates, on the parameters themselves), with straight-through roundings. Zero points stay.
    One more epoch only measures, and the parameters that opened the epoch of the smallest loss are kept: with fixed
    rates, scales far smaller than a step may otherwise end up worse than they began.

    Returns:
      (parameters, mean loss of every epoch, the last one after all steps).
    """
    graphdef, state = nnx.split(stage)
    batch = min(config.train_batch or len(x), len(x))
    rng = np.random.default_rng(0)
    epochs = [rng.permutation(len(x))[: len(x) - len(x) % batch] for _ in range(config.epochs + 1)]
    order = np.stack(epochs).reshape(config.epochs + 1, -1, batch)
    rates = {
        "weight": jnp.float32(config.scale_learning_rate),
        "act": jnp.float32(config.scale_learning_rate),
        "smooth": jnp.float32(config.smooth_learning_rate),
    }
    params, losses = _learn(graphdef, tuple(bits.items()), rates, state, params, zeros, x, target, order)
    return params, tuple(np.asarray(losses).tolist())


def stage_loss(params, graphdef, bits, state, zeros, x, target) -> Float[Array, ""]:
    """`cosine_loss` of the stage's update."""
    stage = nnx.merge(graphdef, state)
    linears = linear_sites(stage, dict(bits))
    for path, widths in bits:
        set_module(stage, path, FakeAsymmetricLinear(linears[path], params[path], zeros[path], *widths))
    return cosine_loss(update_of(stage(x), x), target)


@partial(jax.jit, static_argnums=(0, 1))
def _learn(graphdef, bits, rates, state, params, zeros, x, target, order):
    optimizer = optax.chain(
        optax.clip_by_global_norm(2.0), optax.scale_by_adam(), optax.add_decayed_weights(1e-5)
    )  # AdamW, but for the rate

    def step(carry, chosen):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(stage_loss)(params, graphdef, bits, state, zeros, x[chosen], target[chosen])
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes its int32 step count with floats
            updates, opt_state = optimizer.update(grads, opt_state, params)
        params = {
            path: {name: jnp.maximum(p - rates[name] * updates[path][name], SMALLEST[name]) for name, p in own.items()}
            for path, own in params.items()
        }
        return (params, opt_state), loss

    def epoch(carry, chosen):
        (params, opt_state), best, best_loss = carry
        after, losses = lax.scan(step, (params, opt_state), chosen)
        loss = jnp.mean(losses)
        better = loss < best_loss
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best)
        return (after, best, jnp.where(better, loss, best_loss)), loss

    start = ((params, optimizer.init(params)), params, jnp.float32(jnp.inf))
    (_, best, _), losses = lax.scan(epoch, start, order)
    return best, losses
