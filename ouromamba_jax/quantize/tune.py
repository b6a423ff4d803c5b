"""Block-wise tuning of the scales against the float block's output, after PTQ4VM's joint learning of scales."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ouromamba_jax.ops.qtensor import QTensor
from ouromamba_jax.ops.split_calibration import Calibration
from ouromamba_jax.quantize.activation import SiteSpec
from ouromamba_jax.quantize.config import QuantConfig
from ouromamba_jax.quantize.kinds import StageCalibration, install_fakes
from ouromamba_jax.sharding import data_mesh, replicate


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
    calibrated: StageCalibration,
    x: Array,
    target: Array,
    config: QuantConfig,
) -> tuple[StageCalibration, list[float]]:
    """`calibrated` with scales that bring the quantised stage's update on x close to `target`, the float stage's.

    Each scale is s0 * exp(factor): it stays positive, and one learning rate suits scales of any size. Minimises the
    mean over samples and tokens of 1 - cosine over channels with AdamW (weight decay 1e-5, gradient clipping at 2.0,
    cosine schedule) and straight-through roundings. Deterministic: batches are drawn by a fixed seed.

    Returns:
      (calibrated, mean loss of every epoch).
    """
    graphdef, state = nnx.split(stage)
    batch = min(config.batch_size, len(x))
    rng = np.random.default_rng(0)
    epochs = [rng.permutation(len(x))[: len(x) - len(x) % batch] for _ in range(config.tune_epochs)]
    order = np.stack(epochs).reshape(config.tune_epochs, -1, batch)
    rate = jnp.float32(config.tune_learning_rate)
    mesh = data_mesh(batch)
    inputs = (rate, state, calibrated, x, target, order)
    inputs = replicate(mesh, inputs) if mesh.size > 1 else inputs
    tuned, losses = _tune(graphdef, tuple(specs.items()), mesh, *inputs)
    # The scales of one device are as good as those of all, and need no mesh afterwards.
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tuned), np.asarray(losses).tolist()


def _has_scale(leaf: Any) -> bool:
    return isinstance(leaf, Calibration | QTensor)


def log_factors(calibrated: StageCalibration) -> Any:
    """Zeros, one for each scale of activations, weights, parameters and states."""

    def zeros(c: Any) -> Array:
        return jnp.zeros_like(c.scale if _has_scale(c) else c)

    return jax.tree.map(zeros, calibrated, is_leaf=_has_scale)


def rescaled(calibrated: StageCalibration, factors: Any) -> StageCalibration:
    """`calibrated`, every scale multiplied by exp(factor)."""

    def rescale(c: Any, factor: Array) -> Any:
        return replace(c, scale=c.scale * jnp.exp(factor)) if _has_scale(c) else c * jnp.exp(factor)

    return jax.tree.map(rescale, calibrated, factors, is_leaf=_has_scale)


def stage_loss(graphdef, specs, state, calibrated, factors, x, target) -> Float[Array, ""]:
    """`cosine_loss` of the stage's update, its scales multiplied by exp(factor)."""
    stage = install_fakes(nnx.merge(graphdef, state), dict(specs), rescaled(calibrated, factors))
    return cosine_loss(update_of(stage(x), x), target)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _tune(graphdef, specs, mesh, rate, state, calibrated, x, target, order):
    """All steps in one program; `order` (epochs, steps, batch) indexes x. A new learning rate retraces nothing.

    Every device takes its share of a batch.
    """
    steps = order.shape[0] * order.shape[1]

    def schedule(count: Array) -> Array:
        return rate * 0.5 * (1 + jnp.cos(jnp.pi * count.astype(jnp.float32) / steps))

    optimizer = optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(schedule, weight_decay=1e-5))

    def step(carry, chosen):
        factors, opt_state = carry
        batch = x[chosen], target[chosen]
        if mesh.size > 1:
            batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec("data")))
        loss, grads = jax.value_and_grad(stage_loss, argnums=4)(graphdef, specs, state, calibrated, factors, *batch)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes its int32 step count with floats
            updates, opt_state = optimizer.update(grads, opt_state, factors)
        return (optax.apply_updates(factors, updates), opt_state), loss

    factors = log_factors(calibrated)
    start = (factors, optimizer.init(factors))
    (factors, _), losses = jax.lax.scan(step, start, order.reshape(steps, -1))
    return rescaled(calibrated, factors), losses.reshape(order.shape[:2]).mean(axis=1)
