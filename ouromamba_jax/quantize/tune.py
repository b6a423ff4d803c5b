"""Block-wise tuning of the scales against the float block's output, after PTQ4VM's joint learning of scales."""

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


def cosine_loss(update: Float[Array, "... C"], target: Float[Array, "... C"]) -> Float[Array, ""]:
    """Mean of 1 - cos(update, target) over samples and tokens."""
    dot = jnp.sum(update * target, axis=-1)
    norms = jnp.sum(update * update, axis=-1) * jnp.sum(target * target, axis=-1)
    return jnp.mean(1 - dot * jax.lax.rsqrt(norms + 1e-12))


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
    rng = np.random.default_rng(0)
    epochs = [rng.permutation(len(x))[: len(x) - len(x) % batch] for _ in range(config.tune_epochs)]
    order = np.stack(epochs).reshape(config.tune_epochs, -1, batch)
    rate = jnp.float32(config.tune_learning_rate)
    scales, losses = _tune(graphdef, tuple(specs.items()), rate, state, scales, fixed, x, target, order)
    return scales, np.asarray(losses).tolist()


def stage_loss(graphdef, specs, state, scales, fixed, thetas, x, target) -> Float[Array, ""]:
    """`cosine_loss` of the stage's update, its scales multiplied by exp(theta)."""
    tuned = jax.tree.map(lambda s, t: s * jnp.exp(t), scales, thetas)
    stage = install_fakes(nnx.merge(graphdef, state), dict(specs), tuned, fixed)
    return cosine_loss(update_of(stage(x), x), target)


@partial(jax.jit, static_argnums=(0, 1))
def _tune(graphdef, specs, rate, state, scales, fixed, x, target, order):
    """All steps in one program; `order` (epochs, steps, batch) indexes x. A new learning rate retraces nothing."""
    steps = order.shape[0] * order.shape[1]

    def schedule(count: Array) -> Array:
        return rate * 0.5 * (1 + jnp.cos(jnp.pi * count.astype(jnp.float32) / steps))

    optimizer = optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(schedule, weight_decay=1e-5))

    def step(carry, chosen):
        thetas, opt_state = carry
        loss, grads = jax.value_and_grad(stage_loss, argnums=5)(
            graphdef, specs, state, scales, fixed, thetas, x[chosen], target[chosen]
        )
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes its int32 step count with floats
            updates, opt_state = optimizer.update(grads, opt_state, thetas)
        return (optax.apply_updates(thetas, updates), opt_state), loss

    thetas = jax.tree.map(jnp.zeros_like, scales)
    start = (thetas, optimizer.init(thetas))
    (thetas, _), losses = jax.lax.scan(step, start, order.reshape(steps, -1))
    return jax.tree.map(lambda s, t: s * jnp.exp(t), scales, thetas), losses.reshape(order.shape[:2]).mean(axis=1)
