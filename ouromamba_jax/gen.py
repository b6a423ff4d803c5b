"""Images made from a model alone (OuroMamba-Gen, Algorithm 1).

Pixels are optimised until every layer's patched attention is structured like that of a picture and the output names a
class. Knows no model family: it uses stem, blocks, head and what a block's trace shows.
"""

import dataclasses
import functools
import os
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from ouromamba_jax.attention import implicit_attention, neighbourhood_mask, patched_readout
from ouromamba_jax.models.config import Preprocessing, height_width

Progress = Callable[[int, int, dict[str, float]], None]

_DISPATCH = 10
"""Iterations per call of the compiled update: losses are read and checked this often."""


@dataclass(frozen=True)
class GenConfig:
    """What is optimised, and how. A loss with weight 0 is not computed.

    Args:
      num_images: images to make; the last batch is filled up and cut.
      iterations: updates per batch.
      batch_size: images optimised together; an image depends on the key and its batch, not on num_images.
      learning_rate: Adam's at the start of a cosine schedule that ends at 0; in units of normalised pixels.
      betas: Adam's moment decays.
      contrastive: weight of the patch-contrastive loss, which is 1 where all similarities are equal.
      output: weight of the output loss.
      output_loss: "cross_entropy", or "mae" on probabilities (times classes / 2: between 0 and 1).
      pse: weight of PSAQ-ViT's patch-similarity entropy, the loss that the contrastive one replaces.
      total_variation: weight of the mean absolute difference of neighbouring pixels, in units of [0, 1] pixels.
      weighting: weights of the hidden states in the patched sum: "delta" (mean over channels) or "uniform".
      features: per-token features of both patch losses: the patched "readout" C_t h_p(t), or the rows of the patched
        implicit "attention", which costs L times more.
      neighbourhood: odd side of the window of the patched sum and of the positives.
      positives: most similar neighbours that a token is drawn to.
      negatives: what it is pushed away from: the rest of its "neighbourhood", or "all" other tokens.
      temperature: of the contrastive softmax.
      jitter: every iteration sees the images shifted by up to this many pixels (cyclically) in both directions.
      flip: every iteration sees the images mirrored with probability 1/2.
      targets: class of every image: "round_robin" over the classes, or "random".
      checkpoint_every: iterations between two checkpoints, where `generate_images` is given a directory.
    """

    num_images: int = 128
    iterations: int = 1000
    batch_size: int = 32
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    contrastive: float = 0.05
    output: float = 1.0
    output_loss: Literal["cross_entropy", "mae"] = "cross_entropy"
    pse: float = 0.0
    total_variation: float = 2.0
    weighting: Literal["delta", "uniform"] = "delta"
    features: Literal["readout", "attention"] = "readout"
    neighbourhood: int = 5
    positives: int = 12
    negatives: Literal["neighbourhood", "all"] = "all"
    temperature: float = 0.1
    jitter: int = 0
    flip: bool = False
    targets: Literal["round_robin", "random"] = "round_robin"
    checkpoint_every: int = 100

    def __post_init__(self):
        choices = {
            "output_loss": ("cross_entropy", "mae"),
            "weighting": ("delta", "uniform"),
            "features": ("readout", "attention"),
            "negatives": ("neighbourhood", "all"),
            "targets": ("round_robin", "random"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {' or '.join(map(repr, allowed))}.")
        for name in ("num_images", "iterations", "batch_size", "positives", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1.")
        for name in ("contrastive", "output", "pse", "total_variation", "jitter"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 (off) or more.")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use a positive number.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; use two numbers from 0 up to, not including, 1.")
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


class Generated(NamedTuple):
    """Synthetic images and how they came to be.

    `images` are normalised as the model takes them, `targets` the class each was optimised for. `history` maps every
    loss (unweighted, mean over the batch), "total" and "gradient" (norm) to an array (batches, iterations).
    """

    images: Float[Array, "N H W 3"]
    targets: Int[Array, " N"]
    history: dict[str, Float[np.ndarray, "batches iterations"]]


def cosine_similarities(features: Float[Array, "B M F"]) -> Float[Array, "B M M"]:
    """Cosine similarity of every pair of tokens, float32, with finite gradients for zero features."""
    x = features.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    # Relative to the image's mean, the guard neither hides small features nor lets a vanishing one explode.
    guard = 1e-6 * jax.lax.stop_gradient(jnp.mean(square, axis=1, keepdims=True)) + 1e-20
    x = x * jax.lax.rsqrt(square + guard)
    return jnp.einsum("btf,bkf->btk", x, x)


def contrastive_loss(
    features: Float[Array, "B M F"],
    *,
    grid: tuple[int, int],
    neighbourhood: int = 5,
    positives: int = 12,
    negatives: Literal["neighbourhood", "all"] = "neighbourhood",
    temperature: float = 0.1,
) -> Float[Array, " B"]:
    """Patch-contrastive loss (InfoNCE) of one layer, one value per image.

    Token t is drawn to P(t), the `positives` most similar tokens of its neighbourhood (of equals the first; the
    selection has no gradient), and pushed away from Neg(t), the rest of the neighbourhood or of all tokens:

        L_t = mean_{p in P(t)} -log(e^{s(t,p)/T} / (e^{s(t,p)/T} + sum_{n in Neg(t)} e^{s(t,n)/T})) / log(1 + |Neg(t)|)

    averaged over the tokens that have negatives. Windows are clipped at the border. The division makes the loss 1 where
    all similarities are equal, whatever the number of tokens. A reconstruction of OuroMamba's L^C: its temperature,
    negatives and normalisation are not public.

    Raises:
      ValueError: if no token of the grid has a negative.
    """
    near = neighbourhood_mask(grid, neighbourhood) & ~np.eye(grid[0] * grid[1], dtype=bool)
    candidates = near.sum(axis=1)
    positives = min(positives, int(candidates.max()))
    pool = near if negatives == "neighbourhood" else ~np.eye(len(near), dtype=bool)
    count = pool.sum(axis=1) - np.minimum(candidates, positives)  # |Neg(t)|
    if not positives or not count.any():
        raise ValueError(
            f"on a grid of {grid[0]} x {grid[1]} tokens the contrastive loss has no negatives; "
            'use fewer positives, negatives="all", or contrastive=0.'
        )
    similar = cosine_similarities(features)
    ranked, index = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(near[None], similar, -jnp.inf)), positives)
    valid = ranked > -jnp.inf  # border tokens have fewer neighbours than positives
    chosen = jnp.put_along_axis(jnp.zeros(similar.shape, bool), index, valid, axis=-1, inplace=False)
    logits = similar / temperature
    pushed = jax.nn.logsumexp(jnp.where(pool[None] & ~chosen, logits, -1e30), axis=-1)
    pulled = jnp.take_along_axis(logits, index, axis=-1)
    per_pair = jnp.where(valid, jax.nn.softplus(pushed[..., None] - pulled), 0.0)
    per_token = jnp.sum(per_pair, axis=-1) / jnp.asarray(np.minimum(candidates, positives), jnp.float32)[None]
    scale = np.where(count > 0, 1 / np.log1p(np.maximum(count, 1)), 0.0) / np.count_nonzero(count)
    return jnp.sum(per_token * jnp.asarray(scale, jnp.float32)[None], axis=-1)


def patch_similarity_entropy(features: Float[Array, "B M F"], *, bandwidth: float = 0.05, points: int = 10) -> Array:
    """Minus the differential entropy of the tokens' pairwise cosine similarities (B,), after PSAQ-ViT (Li et al. 2022).

    Their density is a Gaussian kernel estimate at equidistant points between the image's least and largest similarity.
    """
    similar = cosine_similarities(features).reshape(features.shape[0], -1)
    low, high = jax.lax.stop_gradient((jnp.min(similar, axis=1), jnp.max(similar, axis=1)))
    at = low[:, None] + (high - low)[:, None] * jnp.linspace(0.0, 1.0, points)[None]
    z = (at[:, :, None] - similar[:, None]) / bandwidth
    density = jnp.mean(jnp.exp(-0.5 * z * z), axis=2) / (bandwidth * np.sqrt(2 * np.pi).item())
    step = (high - low) / (points - 1)
    return jnp.sum(density * jnp.log(density + 1e-12), axis=1) * step


def output_loss(
    logits: Float[Array, "B K"], targets: Int[Array, " B"], kind: Literal["cross_entropy", "mae"]
) -> Float[Array, " B"]:
    """How far the output is from the target class, one value per image; see `GenConfig.output_loss`."""
    if kind == "cross_entropy":
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    difference = jax.nn.softmax(logits) - jax.nn.one_hot(targets, logits.shape[1])
    return 0.5 * jnp.sum(jnp.abs(difference), axis=1)


def total_variation(images: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
    """Mean absolute difference of vertical and of horizontal neighbours, one value per image."""
    vertical, horizontal = jnp.abs(jnp.diff(images, axis=1)), jnp.abs(jnp.diff(images, axis=2))
    return jnp.mean(vertical, axis=(1, 2, 3)) + jnp.mean(horizontal, axis=(1, 2, 3))


class _Network(NamedTuple):
    """The static part of a model: module graphs and pixel statistics."""

    stem: Any
    blocks: tuple[Any, ...]
    head: Any
    preprocessing: Preprocessing


def _split(model: Any) -> tuple[_Network, tuple[Any, tuple[Any, ...], Any]]:
    """(network, weights): the graph of each part, and its state, which jit sees as an argument."""
    stem, head, blocks = nnx.split(model.stem), nnx.split(model.head), [nnx.split(block) for block in model.blocks]
    network = _Network(stem[0], tuple(graph for graph, _ in blocks), head[0], model.config.preprocessing)
    return network, (stem[1], tuple(state for _, state in blocks), head[1])


def _patch_losses(layer: Any, config: GenConfig) -> dict[str, Float[Array, " B"]]:
    """The losses of one block's patched attention; none for a block without scans."""
    if not layer.scans or not (config.contrastive or config.pse):
        return {}
    window, weighting = config.neighbourhood, config.weighting
    if config.features == "attention":
        features = implicit_attention(layer, neighbourhood=window, weighting=weighting)
    else:
        readouts = [patched_readout(scan, neighbourhood=window, weighting=weighting) for scan in layer.scans]
        features = functools.reduce(jnp.add, readouts)
    losses = {}
    if config.contrastive:
        losses["contrastive"] = contrastive_loss(
            features,
            grid=(layer.scans[0].order.height, layer.scans[0].order.width),
            neighbourhood=config.neighbourhood,
            positives=config.positives,
            negatives=config.negatives,
            temperature=config.temperature,
        )
    if config.pse:
        losses["pse"] = patch_similarity_entropy(features)
    return losses


def image_losses(
    network: _Network, weights: Any, images: Float[Array, "B H W 3"], targets: Int[Array, " B"], config: GenConfig
) -> dict[str, Float[Array, " B"]]:
    """Every loss with a weight, unweighted, one value per image; patch losses are means over the layers."""
    stem, blocks, head = weights
    collect = (lambda h: h) if config.features == "readout" and (config.contrastive or config.pse) else None

    def run_block(graph: Any, state: Any, x: Array) -> tuple[Array, dict[str, Array]]:
        x, layer = nnx.merge(graph, state).trace(x, collect=collect)
        return x, _patch_losses(layer, config)

    x = nnx.merge(network.stem, stem)(images)
    layers = []
    for graph, state in zip(network.blocks, blocks, strict=True):
        # Rematerialised with its losses, a block leaves only x behind: never are two blocks' hidden states alive.
        x, losses = jax.checkpoint(functools.partial(run_block, graph))(state, x)
        layers.append(losses)
    losses = {}
    for name in ("contrastive", "pse"):
        values = [layer[name] for layer in layers if name in layer]
        if values:
            losses[name] = functools.reduce(jnp.add, values) / len(values)
    if config.output:
        losses["output"] = output_loss(nnx.merge(network.head, head)(x), targets, config.output_loss)
    if config.total_variation:
        std = jnp.asarray(network.preprocessing.std, jnp.float32)[None, None, None]
        losses["total_variation"] = total_variation(images * std)
    return losses


def _optimiser(config: GenConfig) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.iterations)
    return optax.adam(schedule, b1=config.betas[0], b2=config.betas[1])


def _pixel_range(preprocessing: Preprocessing) -> tuple[Array, Array]:
    """Normalised values of black and white, (1, 1, 1, 3) each."""
    mean, std = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (preprocessing.mean, preprocessing.std))
    return (0.0 - mean) / std, (1.0 - mean) / std


def _augment(images: Array, key: Array, config: GenConfig) -> Array:
    shift_key, flip_key = jax.random.split(key)
    if config.jitter:
        shift = jax.random.randint(shift_key, (2,), -config.jitter, config.jitter + 1)
        images = jnp.roll(jnp.roll(images, shift[0], axis=1), shift[1], axis=2)
    if config.flip:
        images = jnp.where(jax.random.bernoulli(flip_key), jnp.flip(images, axis=2), images)
    return images


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(
    network: _Network,
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
    optimiser = _optimiser(config)
    record = {name: jnp.zeros((_DISPATCH,), jnp.float32) for name in (*config.loss_names, "total", "gradient")}

    def update(iteration: Array, carry: Any) -> Any:
        (pixels, moments), record = carry

        def total(pixels: Array) -> tuple[Array, dict[str, Array]]:
            seen = _augment(pixels, jax.random.fold_in(key, iteration), config)
            losses = image_losses(network, weights, seen, targets, config)
            weighted = [getattr(config, name) * value for name, value in losses.items()]
            # The sum over images gives every image the gradient that it would have alone.
            return jnp.sum(functools.reduce(jnp.add, weighted)), losses

        (value, losses), gradient = jax.value_and_grad(total, has_aux=True)(pixels)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in int32 and multiplies them with floats
            updates, moments = optimiser.update(gradient, moments)
        pixels = jnp.clip(pixels + updates, low, high)
        losses = {name: jnp.mean(loss) for name, loss in losses.items()}
        losses |= {"total": value / pixels.shape[0], "gradient": jnp.sqrt(jnp.sum(gradient**2))}
        record = {name: values.at[iteration - start].set(losses[name]) for name, values in record.items()}
        return (pixels, moments), record

    return jax.lax.fori_loop(start, stop, update, (state, record))


def generate_images(
    model: Any,
    config: GenConfig,
    key: Array,
    *,
    progress: Progress | bool | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
) -> Generated:
    """Makes images for calibration from the model's weights alone (OuroMamba, Algorithm 1).

    Pixels start as Gaussian noise; Adam lowers `config`'s losses, and after every update the pixels are clipped to the
    normalised range of real ones. The same key gives the same bits.

    Args:
      model: a float model of any family.
      config: see `GenConfig`.
      key: a `jax.random` key.
      progress: True for a progress bar on the terminal, or a function of (iteration, total, losses), both counted over
        all batches.
      checkpoint_dir: where to keep the state of the run. If it holds one, the run continues from there, bit for bit.

    Raises:
      FloatingPointError: if a loss or gradient is not finite; the message names the iteration.
      ValueError: if `checkpoint_dir` holds the run of another model, config or key.
    """
    network, weights = _split(model)
    batches = -(-config.num_images // config.batch_size)
    targets = _targets(model.config.num_classes, batches * config.batch_size, config, jax.random.fold_in(key, 0))
    shape = (config.batch_size, *height_width(model.config.img_size), 3)
    low, high = _pixel_range(network.preprocessing)
    names = (*config.loss_names, "total", "gradient")
    # Without the fields that no update depends on, so that they do not compile it again.
    update = dataclasses.replace(config, num_images=1, targets="round_robin", checkpoint_every=1)

    run = _Run(
        done=np.zeros((0, *shape[1:]), np.float32),
        history={name: np.zeros((batches, config.iterations), np.float32) for name in names},
    )
    path = None if checkpoint_dir is None else Path(checkpoint_dir) / "generation.npz"
    identity = "" if path is None else _identity(model, weights, config, key)
    saved = None if path is None else _restore(path, identity, run)

    with ExitStack() as stack:
        report = _progress_bar(stack, batches * config.iterations) if progress is True else (progress or None)
        for batch in range(len(run.done) // config.batch_size, batches):
            batch_key = jax.random.fold_in(key, batch + 1)
            noise_key, update_key = jax.random.split(batch_key)
            pixels = jnp.clip(jax.random.normal(noise_key, shape), low, high)
            state, start = (pixels, _optimiser(config).init(pixels)), 0
            if saved is not None:
                state, start = jax.tree.unflatten(jax.tree.structure(state), saved.leaves), saved.iteration
                saved = None
            batch_targets = targets[batch * config.batch_size : (batch + 1) * config.batch_size]
            while start < config.iterations:
                due = start - start % config.checkpoint_every + config.checkpoint_every
                stop = min(start + _DISPATCH, due, config.iterations)
                bounds = jnp.int32(start), jnp.int32(stop)
                state, record = _advance(network, update, weights, state, batch_targets, update_key, *bounds)
                record = {name: np.asarray(record[name])[: stop - start] for name in names}
                _check_finite(record, batch, start)
                for name, values in record.items():
                    run.history[name][batch, start:stop] = values
                start = stop
                if path is not None and start == due and start < config.iterations:
                    run.save(path, identity, start, jax.tree.leaves(state))
                if report is not None:
                    losses = {name: float(values[-1]) for name, values in record.items()}
                    report(batch * config.iterations + stop, batches * config.iterations, losses)
            run.done = np.concatenate([run.done, np.asarray(state[0])])
            if path is not None:
                run.save(path, identity, 0, [])
    return Generated(jnp.asarray(run.done[: config.num_images]), targets[: config.num_images], run.history)


def _targets(classes: int, count: int, config: GenConfig, key: Array) -> Int[Array, " N"]:
    if config.targets == "random":
        return jax.random.randint(key, (count,), 0, classes)
    return jnp.arange(count, dtype=jnp.int32) % classes


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
    from rich.progress import Progress as Bar
    from rich.progress import TextColumn

    bar = stack.enter_context(Bar(*Bar.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}")))
    task = bar.add_task("generating", total=total, loss=float("nan"))
    return lambda iteration, total, losses: bar.update(task, completed=iteration, loss=losses["total"])


@dataclass
class _Saved:
    """Where inside a batch a checkpoint was taken: pixels and optimiser moments, and the iterations they have seen."""

    iteration: int
    leaves: list[Array]


@dataclass
class _Run:
    """What a run has made so far: finished images (N, H, W, 3), and the losses of all iterations."""

    done: np.ndarray
    history: dict[str, np.ndarray]

    def save(self, path: Path, identity: str, iteration: int, leaves: list[Array]) -> None:
        """Writes everything to `path` at once; an interrupted write leaves the previous file."""
        arrays: dict[str, Any] = {f"history/{name}": values for name, values in self.history.items()}
        arrays |= {f"leaf/{k:03d}": np.asarray(leaf) for k, leaf in enumerate(leaves)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez(file, identity=np.asarray(identity), iteration=np.asarray(iteration), done=self.done, **arrays)
        os.replace(partial, path)


def _restore(path: Path, identity: str, run: _Run) -> _Saved | None:
    """Fills `run` from the file, and returns the unfinished batch's state if there is one."""
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable checkpoint of a generation; delete it to start anew.") from error
    if str(arrays.get("identity")) != identity:
        raise ValueError(f"{path} belongs to another model, config or key; use another directory or delete it.")
    run.done = arrays["done"]
    for name, values in run.history.items():
        values[:] = arrays[f"history/{name}"]
    leaves = [jnp.asarray(arrays[name]) for name in sorted(arrays) if name.startswith("leaf/")]
    return _Saved(int(arrays["iteration"]), leaves) if leaves else None


def _identity(model: Any, weights: Any, config: GenConfig, key: Array) -> str:
    """What a run depends on, as text: config, key, and the model with a checksum of its weights."""
    checksum = 0
    for leaf in jax.tree.leaves(weights):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, checksum)
    return f"{config} {np.asarray(jax.random.key_data(key)).tolist()} {model.config} {checksum:08x}"
