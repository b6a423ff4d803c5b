"""Block-wise tuning of the scales against the float block's output, as inherited from PTQ4VM's joint learning of scales."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.fake import Scales, install_fakes
from ouromamba_jax.quantize.modules import SiteSpec


def update_of(stage_output: Array, x: Array) -> Array:
    """What a stage adds to its input, where both have one shape: the residual stream would drown it in the loss."""
    return stage_output - x if stage_output.shape == x.shape else stage_output


def tune_scales(
    stage: nnx.Module,
    specs: dict[str, SiteSpec],
    scales: Scales,
    fixed: dict[str, Any],
    x: Array,
    target: Array,
    config: QuantConfig,
) -> tuple[Scales, list[float]]:
    """Scales that bring the quantised stage's update on x close to `target`, the float stage's.

    Each scale is s0 * exp(theta): it stays positive, and one learning rate suits scales of any size. Minimises the mean
    over samples and tokens of 1 - cosine over channels with AdamW (weight decay 1e-5, gradient clipping at 2.0, cosine
    schedule) and straight-through roundings. Deterministic: batches are drawn by a fixed seed.

    Returns:
      (scales, mean loss of every epoch).
    """
    graphdef, state = nnx.split(stage)
    batch = min(config.batch_size, len(x))
    schedule = jnp.asarray([config.tune_learning_rate, max(config.tune_epochs * (len(x) // batch), 1)], jnp.float32)
    thetas = jax.tree.map(jnp.zeros_like, scales)
    opt_state = _optimizer(schedule).init(thetas)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(config.tune_epochs):
        order = rng.permutation(len(x))[: len(x) - len(x) % batch].reshape(-1, batch)
        thetas, opt_state, loss = _epoch(
            graphdef, tuple(specs.items()), schedule, state, scales, fixed, thetas, opt_state, x[order], target[order]
        )
        losses.append(loss)
    return jax.tree.map(lambda s, t: s * jnp.exp(t), scales, thetas), [float(loss) for loss in losses]


def stage_loss(graphdef, specs, state, scales, fixed, thetas, x, target) -> Float[Array, ""]:
    """Mean of 1 - cos(update, target) over samples and tokens, of the stage with its scales multiplied by exp(theta)."""
    tuned = jax.tree.map(lambda s, t: s * jnp.exp(t), scales, thetas)
    stage = install_fakes(nnx.merge(graphdef, state), dict(specs), tuned, fixed)
    update = update_of(stage(x), x)
    dot = jnp.sum(update * target, axis=-1)
    norms = jnp.sum(update * update, axis=-1) * jnp.sum(target * target, axis=-1)
    return jnp.mean(1 - dot * jax.lax.rsqrt(norms + 1e-12))


def _optimizer(schedule: Float[Array, "2"]) -> optax.GradientTransformation:
    """AdamW on a cosine schedule; (peak, steps) are an array, so that another rate compiles nothing again."""
    peak, steps = schedule

    def rate(count: Array) -> Array:
        return peak * 0.5 * (1 + jnp.cos(jnp.pi * count.astype(jnp.float32) / steps))

    return optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(rate, weight_decay=1e-5))


@partial(jax.jit, static_argnums=(0, 1))
def _epoch(graphdef, specs, schedule, state, scales, fixed, thetas, opt_state, xs, targets):
    optimizer = _optimizer(schedule)

    def step(carry, batch):
        thetas, opt_state = carry
        loss, grads = jax.value_and_grad(stage_loss, argnums=5)(graphdef, specs, state, scales, fixed, thetas, *batch)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes its int32 step count with floats
            updates, opt_state = optimizer.update(grads, opt_state, thetas)
        return (optax.apply_updates(thetas, updates), opt_state), loss

    (thetas, opt_state), losses = jax.lax.scan(step, (thetas, opt_state), (xs, targets))
    return thetas, opt_state, jnp.mean(losses)
