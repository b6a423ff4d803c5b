"""The optimisation loop: noise to images, batch by batch, reproducible, resumable and watched."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, Int

from ouromamba_jax.data.preprocessing import Preprocessing, image_shape
from ouromamba_jax.files import local_path
from ouromamba_jax.gen.config import GenConfig
from ouromamba_jax.gen.network import Network, image_losses, split
from ouromamba_jax.gen.prior import noise, optimiser
from ouromamba_jax.gen.resume import RunState, restore, run_identity
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.ops.cpu_miscompile import warn_if_miscompiled
from ouromamba_jax.sharding import data_mesh, replicate, split_samples, to_host, without_mesh

Progress = Callable[[int, int, dict[str, float]], None]

_DISPATCH = 10
"""Iterations per call of the compiled update: losses are read and checked this often."""


class Generated(NamedTuple):
    """Synthetic images and how they came to be.

    `images` are normalised as the model takes them, `targets` the class each was optimised for. `history` maps every
    loss (unweighted, mean over the batch), "total" and "gradient" (norm) to an array (batches, iterations).

    Examples:
      >>> import ouromamba_jax as om
      >>> om.Generated._fields
      ('images', 'targets', 'history')
    """

    images: Float[Array, "N H W I"]
    targets: Int[Array, " N"]
    history: dict[str, Float[np.ndarray, "batches iterations"]]


def _pixel_range(preprocessing: Preprocessing) -> tuple[Array, Array]:
    """Normalised values of black and white, (1, 1, 1, I) each."""
    mean, std = (jnp.asarray(x) for x in preprocessing.mean_and_std())
    return (0.0 - mean) / std, (1.0 - mean) / std


def _of_no_mesh(key: Array) -> Array:
    """The same key, free to go to any device."""
    local = jax.device_put(key, SingleDeviceSharding(jax.local_devices()[0]))
    return jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(local))), impl=jax.random.key_impl(key))


def _shifted(images: Array, key: Array, config: GenConfig) -> Array:
    reach = tuple(int(config.jitter * side) for side in images.shape[1:3])
    for axis, side in enumerate(reach, start=1):
        shift = jax.random.randint(jax.random.fold_in(key, axis), (), -side, side + 1, jnp.int32)
        images = jnp.roll(images, shift, axis=axis) if side else images
    return images


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(
    network: Network,
    config: GenConfig,
    weights: Any,
    state: tuple[Array, Any],
    targets: Array,
    key: Array,
    start: Array,
    stop: Array,
) -> tuple[tuple[Array, Any], dict[str, Array]]:
    """Iterations start..stop-1 (at most `_DISPATCH`) of one batch; start and stop are traced, so it compiles once."""
    low, high = _pixel_range(network.preprocessing)
    adam = optimiser(config)
    record = {name: jnp.zeros((_DISPATCH,), jnp.float32) for name in (*config.loss_names, "total", "gradient")}

    def update(iteration: Array, carry: Any) -> Any:
        (pixels, moments), record = carry

        def total(pixels: Array) -> tuple[Array, dict[str, Array]]:
            seen = _shifted(pixels, jax.random.fold_in(key, iteration), config)
            losses = image_losses(network, weights, seen, targets, config)
            weighted = [getattr(config, name) * value for name, value in losses.items()]
            # The sum over images gives every image the gradient that it would have alone.
            return jnp.sum(functools.reduce(jnp.add, weighted)), losses

        (value, losses), gradient = jax.value_and_grad(total, has_aux=True)(pixels)
        updates, moments = adam.update(gradient, moments)
        pixels = jnp.clip(pixels + updates, low, high)
        losses = {name: jnp.mean(loss) for name, loss in losses.items()}
        losses |= {"total": value / pixels.shape[0], "gradient": jnp.sqrt(jnp.sum(gradient**2))}
        record = {name: values.at[iteration - start].set(losses[name]) for name, values in record.items()}
        return (pixels, moments), record

    return jax.lax.fori_loop(start, stop, update, (state, record))


@without_mesh
def generate_images(
    model: VisionModel,
    config: GenConfig,
    key: Array,
    *,
    targets: Int[Array | np.ndarray, " N"] | Sequence[int] | None = None,
    progress: Progress | bool | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
) -> Generated:
    """Makes images for calibration from the model's weights alone (OuroMamba, Algorithm 1).

    Pixels start as Gaussian noise; Adam lowers `config`'s losses, and after every update the pixels are clipped to the
    normalised range of real ones. The same key gives the same bits: an image depends on it, on its batch and on its
    target. Batches are full but the last, which starts from the noise of a full one and differs from it in rounding.

    Args:
      model: a float model of any family.
      config: see `GenConfig`.
      key: a `jax.random` key; the images do not depend on the number of devices that a batch is spread over, save for
        rounding.
      targets: the class of every image; by default `class_targets` of the classes that the model's head has.
      progress: True for a progress bar on the terminal, or a function of (iteration, total, losses), both counted over
        all batches.
      checkpoint_dir: where to keep the state of the run. If it holds one, the run continues from there, bit for bit; so
        does one that made fewer images.

    Raises:
      FloatingPointError: if a loss or gradient is not finite; the message names the iteration.
      ValueError: if the model is quantised, a target is no class of its head, or `checkpoint_dir` holds the run of
        another model, config or key, of another number of iterations, or of more images.

    Examples:
      >>> import jax
      >>> import ouromamba_jax as om
      >>> config = om.GenConfig(num_images=2, iterations=3, contrastive=0)
      >>> made = om.generate_images(om.load("vim_micro"), config, jax.random.key(0), targets=[3, 8])
      >>> made.images.shape, made.history["total"].shape
      ((2, 32, 32, 3), (1, 3))
    """
    warn_if_miscompiled()
    key = _of_no_mesh(key)
    network, weights = split(model)
    if any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(weights)):  # integer levels; no float model has any
        raise ValueError("the model is quantised, so its images have no gradient: generate them from the float model.")
    classes = _head_classes(model)
    if config.output and not classes:
        raise ValueError("the model has no classes to make images for; load it with its head, or set output=0.")
    wanted = _checked_targets(targets, config, classes)
    batch_size = config.batch_size
    batches = -(-config.num_images // batch_size)
    one = image_shape(model.config)
    low, high = _pixel_range(network.preprocessing)
    names = (*config.loss_names, "total", "gradient")
    # Without the fields that no update depends on, so that they do not compile it again.
    update = dataclasses.replace(config, num_images=1, batch_size=1, checkpoint_every=1)

    run = RunState(
        done=np.zeros((0, *one), np.float32),
        history={name: np.zeros((batches, config.iterations), np.float32) for name in names},
        targets=wanted,
    )
    path = None if checkpoint_dir is None else local_path(checkpoint_dir) / "generation.npz"
    identity = "" if path is None else run_identity(model, weights, config, key)
    saved = None if path is None else restore(path, identity, run, batch_size)

    with ExitStack() as stack:
        report = _progress_bar(stack, batches * config.iterations) if progress is True else (progress or None)
        mesh = None
        for batch in range(-(-len(run.done) // batch_size), batches):
            batch_targets = wanted[batch * batch_size : (batch + 1) * batch_size]
            shape = (len(batch_targets), *one)
            if mesh is None or len(batch_targets) < batch_size:  # the first and the last one may be of other sizes
                mesh = data_mesh(len(batch_targets))
                placed_weights = replicate(mesh, weights)
            batch_targets = split_samples(mesh, batch_targets)
            batch_key = jax.random.fold_in(key, batch + 1)
            noise_key, update_key = jax.random.split(batch_key)
            pixels = jnp.clip(noise(noise_key, shape, config), low, high)
            state, start = (pixels, optimiser(config).init(pixels)), 0
            if saved is not None:
                state, start = jax.tree.unflatten(jax.tree.structure(state), saved.leaves), saved.iteration
                saved = None
            while start < config.iterations:
                due = start - start % config.checkpoint_every + config.checkpoint_every
                stop = min(start + _DISPATCH, due, config.iterations)
                bounds = jnp.int32(start), jnp.int32(stop)
                placed = split_samples(mesh, state)  # as before, or the next call would compile again
                state, record = _advance(network, update, placed_weights, placed, batch_targets, update_key, *bounds)
                record = {name: to_host(mesh, record[name])[: stop - start] for name in names}
                _check_finite(record, batch, start)
                for name, values in record.items():
                    run.history[name][batch, start:stop] = values
                start = stop
                if path is not None and start == due and start < config.iterations:
                    run.save(path, identity, start, [to_host(mesh, leaf) for leaf in jax.tree.leaves(state)])
                if report is not None:
                    losses = {name: float(values[-1]) for name, values in record.items()}
                    report(batch * config.iterations + stop, batches * config.iterations, losses)
            run.done = np.concatenate([run.done, to_host(mesh, state[0])])
            if path is not None:
                run.save(path, identity, 0, [])
    return Generated(jnp.asarray(run.done), jnp.asarray(wanted), run.history)


def class_targets(config: GenConfig, num_classes: int) -> Int[Array, " N"]:
    """The class that each image of `generate_images` is made for by default, whatever images come after it.

    `num_classes` images in a row have every class once, and the first ones are spread over all of them: in the order of
    the multiples of the golden section. (The first classes alone would be one kind of thing: ImageNet begins with 398
    animals.)

    Examples:
      >>> import ouromamba_jax as om
      >>> from ouromamba_jax.gen import class_targets
      >>> class_targets(om.GenConfig(num_images=5), num_classes=1000).tolist()
      [0, 618, 236, 854, 472]
    """
    order = np.argsort(np.argsort(np.arange(num_classes) * ((5**0.5 - 1) / 2) % 1))
    return jnp.asarray(order[np.arange(config.num_images) % num_classes], jnp.int32)


def _head_classes(model: VisionModel) -> int:
    """How many classes the model tells apart: its head's outputs, which the config may not have followed."""
    kernel = getattr(getattr(model.head, "proj", None), "kernel", None)
    return model.config.num_classes if kernel is None else kernel.shape[-1]


def _checked_targets(targets: Any, config: GenConfig, classes: int) -> Int[np.ndarray, " N"]:
    if targets is None:
        return np.asarray(class_targets(config, max(classes, 1)))
    targets = np.asarray(targets)
    if targets.ndim != 1 or targets.dtype.kind not in "iu":
        raise ValueError(f"targets are {targets.dtype} of shape {targets.shape}; give one whole number per image.")
    if len(targets) != config.num_images:
        raise ValueError(
            f"there are {len(targets)} targets for {config.num_images} images; give one each, or set num_images."
        )
    if targets.min() < 0 or targets.max() >= max(classes, 1):
        wrong = targets[(targets < 0) | (targets >= classes)][0]
        raise ValueError(f"there is a target {wrong}, but the model has {classes} classes; count them from 0.")
    return targets.astype(np.int32)


def _check_finite(record: dict[str, np.ndarray], batch: int, start: int) -> None:
    bad = {name: np.flatnonzero(~np.isfinite(values)) for name, values in record.items()}
    first = {name: int(steps[0]) for name, steps in bad.items() if len(steps)}
    if first:
        name = min(first, key=lambda name: first[name])
        raise FloatingPointError(
            f"{name} is not finite at iteration {start + first[name]} of batch {batch}; "
            "check the model's weights for non-finite values, or lower learning_rate."
        )


def _progress_bar(stack: ExitStack, total: int) -> Progress:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TextColumn

    columns = (*Bar.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}"))
    bar = stack.enter_context(Bar(*columns, console=Console(stderr=True)))
    task = bar.add_task("generating", total=total, loss=float("nan"))
    return lambda iteration, total, losses: bar.update(task, completed=iteration, loss=losses["total"])
