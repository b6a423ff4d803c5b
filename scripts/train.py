"""Train a classifier from scratch: AdamW, warm-up and cosine, augmentation in JAX.

The embedded `vim_micro` was made by

    python scripts/train.py --seed 0 --out ouromamba_jax/checkpoints/vim_micro

in 1832 seconds on a CPU; it reached 100 % on the 130 validation images and 98.6 % on the 500 test images.

`vmamba_micro` and `mambavision_micro` were made by

    python scripts/train.py --model vmamba_micro --out ouromamba_jax/checkpoints/vmamba_micro
    python scripts/train.py --model mambavision_micro --out ouromamba_jax/checkpoints/mambavision_micro

in 553 and 866 seconds. They reached 98.5 % and 100 % on the validation images, 99.2 % and 98.4 % on the test images.
MambaVision is trained as it runs, its convolutions without the BatchNorm of the published form.

`vim_micro_cifar10` was made on CIFAR-10, an .npz of JPEG bytes per split (see `ouromamba_jax.data.load_images`; with
TFDS it is `--data cifar10`), by

    python scripts/train.py --data "cifar10_{split}.npz" --set embed_dim=64 depth=4 d_state=8 patch_size=8 \\
        --epochs 12 --batch-size 64 --weight-decay 0.05 --label-smoothing 0.05 --ema 0.998 --validation 0.05 \\
        --flip --fill mirror --rotate 0 --scale 0 --out ouromamba_jax/checkpoints/vim_micro_cifar10

in 6118 seconds; it reached 72.0 % on the validation images and 71.0 % on the test images. Its patches of 8 x 8 pixels
overlap, at a stride of 4.

The last tenth of a seeded permutation of the training split is held out for validation; every choice was made on it.
The test split is read once, after the last step. `--out` is a new folder: the checkpoint, and beside its arrays
`training.json` with accuracies, settings, command and versions.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ouromamba_jax.checkpoint import save
from ouromamba_jax.data import Dataset, load_images
from ouromamba_jax.data.sources import SHORT_NAMES
from ouromamba_jax.evaluation.bench import provenance
from ouromamba_jax.evaluation.evaluate import predict
from ouromamba_jax.evaluation.metrics import top1
from ouromamba_jax.files import write_json
from ouromamba_jax.models import VisionModel, create_model, pure
from ouromamba_jax.sharding import data_mesh, replicate, split_samples

VALIDATE_EVERY = 5  # epochs
CHOICES = {"dtype": ("float32", "bfloat16"), "fill": ("black", "mirror")}


def default_dtype() -> str:
    """bfloat16 on a GPU or TPU, which have units for it; parameters, scan and loss stay in float32."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of each training picture, all uniform.

    `shift` in pixels, `rotate` in degrees, `scale` relative, `flip` left to right; `erase` is the probability that a
    rectangle of up to a half of each side is replaced by noise. `fill` is "black" or "mirror": what lies outside.
    """

    shift: float = 3.0
    rotate: float = 12.0
    scale: float = 0.1
    flip: bool = False
    erase: float = 0.0
    fill: str = "black"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on. `overrides` are config fields of the model, e.g. (("depths", (2, 4)),)."""

    model: str = "vim_micro"
    data: str = "digits"
    test_split: str = "test"
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    ema: float = 0.0
    validation: float = 0.1
    limit: int | None = None
    seed: int = 0
    dtype: str = dataclasses.field(default_factory=default_dtype)
    overrides: tuple[tuple[str, int | tuple[int, ...]], ...] = ()
    augmentation: Augmentation = Augmentation()


def augment(
    key: Array, images: Float[Array, "B H W I"], config: Augmentation, black: Float[Array, " I"]
) -> Float[Array, "B H W I"]:
    """Each picture shifted, rotated, scaled, flipped and partly erased at random; `black` is a black pixel's value."""
    keys = jax.random.split(key, images.shape[0])
    return jax.vmap(lambda k, image: _augment_one(k, image, config, black))(keys, images)


def _augment_one(key: Array, image: Array, config: Augmentation, black: Array) -> Array:
    height, width, _ = image.shape
    k_affine, k_flip, k_erase = jax.random.split(key, 3)
    angle, log_scale, dy, dx = jax.random.uniform(k_affine, (4,), minval=-1.0)
    angle = angle * math.radians(config.rotate)
    zoom = jnp.exp(log_scale * math.log1p(config.scale))
    mirror = jnp.where(jax.random.bernoulli(k_flip) & config.flip, -1.0, 1.0)
    y, x = jnp.meshgrid(
        jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2,
        jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2,
        indexing="ij",
    )
    x = x * mirror
    source_y = (jnp.cos(angle) * y - jnp.sin(angle) * x) * zoom + (height - 1) / 2 + dy * config.shift
    source_x = (jnp.sin(angle) * y + jnp.cos(angle) * x) * zoom + (width - 1) / 2 + dx * config.shift
    image = _bilinear(image - black[None, None], source_y, source_x, config.fill) + black[None, None]
    return _erase(k_erase, image, config.erase)


def _bilinear(image: Array, y: Array, x: Array, fill: str) -> Array:
    """The picture at fractional positions (H, W); zero, or the mirrored picture, outside."""
    height, width, _ = image.shape
    if fill == "mirror":
        y, x = (size - 1 - jnp.abs(size - 1 - t % (2 * size - 2)) for t, size in ((y, height), (x, width)))
    total = jnp.zeros_like(image)
    for row in (jnp.floor(y), jnp.floor(y) + 1):
        for column in (jnp.floor(x), jnp.floor(x) + 1):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = jnp.where(inside, (1 - jnp.abs(y - row)) * (1 - jnp.abs(x - column)), 0.0)
            near = image[
                jnp.clip(row, 0, height - 1).astype(jnp.int32), jnp.clip(column, 0, width - 1).astype(jnp.int32)
            ]
            total += weight[..., None] * near
    return total


def _erase(key: Array, image: Array, probability: float) -> Array:
    """Random erasing (Zhong et al. 2020) with noise of the range of normalised pixels."""
    k_apply, k_size, k_place, k_noise = jax.random.split(key, 4)
    extent = jnp.asarray(image.shape[:2], jnp.float32)
    size = extent * jax.random.uniform(k_size, (2,), minval=0.1, maxval=0.5)
    start = (extent - size) * jax.random.uniform(k_place, (2,))
    rows, columns = (
        (jnp.arange(length, dtype=jnp.float32) >= first) & (jnp.arange(length, dtype=jnp.float32) < first + extent)
        for length, first, extent in zip(image.shape[:2], start, size, strict=True)
    )
    inside = rows[:, None] & columns[None] & jax.random.bernoulli(k_apply, probability)
    return jnp.where(inside[..., None], jax.random.uniform(k_noise, image.shape, minval=-1.0), image)


def decayed(state: Any) -> Any:
    """Mask for weight decay: matrices and convolutions, hence no norm, bias, A_log, D, position or class token."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), state)


def optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; the learning rate warms up linearly, then falls along a cosine."""
    warmup = max(1, round(config.warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(steps, warmup + 1))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay, mask=decayed),
    )


def loss_fn(logits: Float[Array, "B K"], labels: Int[Array, " B"], smoothing: float) -> Float[Array, ""]:
    """Cross-entropy with label smoothing, mean over the batch."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def accuracy(model: VisionModel, data: Dataset) -> float:
    """Top-1, in [0, 1]."""
    return top1(predict(model, data.images), data.labels)


def split_validation(data: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training, validation) parts of a seeded permutation; the order is NumPy's raw PCG64, the same everywhere."""
    order = np.argsort(np.random.PCG64(seed).random_raw(len(data.images)), kind="stable")
    cut = len(order) - round(fraction * len(order))
    training, validation = (
        data._replace(images=data.images[part], labels=data.labels[part]) for part in (order[:cut], order[cut:])
    )
    return training, validation


def read_split(config: TrainConfig, model: Any, split: str) -> Dataset:
    """One split of the data as the model takes it, with labels that it can have."""
    named = config.data in ("digits", *SHORT_NAMES) or config.data.startswith("tfds:")
    if not named and "{split}" not in config.data:
        raise ValueError(f'--data {config.data} has one split only; write {{split}} where "train" or "test" belongs.')
    data = load_images(
        config.data, split, model.config.img_size, model.config.preprocessing, limit=config.limit, labelled=True
    )
    if data.labels.max() >= model.config.num_classes:
        raise ValueError(
            f"--data {config.data} has labels up to {data.labels.max()}, but {config.model} has "
            f"{model.config.num_classes} classes; add --set num_classes={data.labels.max() + 1}."
        )
    return data


def train(config: TrainConfig, *, progress: bool = True) -> tuple[VisionModel, dict[str, Any]]:
    """(trained model, {"train", "validation", "test": top-1; "loss": mean of each epoch; "seconds"})."""
    began = time.perf_counter()
    rngs, dtype = nnx.Rngs(config.seed), jnp.dtype(config.dtype)
    model = create_model(config.model, rngs=rngs, dtype=dtype, **dict(config.overrides))
    data, held_out = split_validation(read_split(config, model, "train"), config.validation, config.seed)
    fn, state = pure(model)
    batch = min(config.batch_size, len(data.images))
    mesh = data_mesh(batch)
    state = replicate(mesh, state)
    per_epoch = len(data.images) // batch
    tx = optimizer(config, config.epochs * per_epoch)
    mean, std = model.config.preprocessing.mean_and_std()
    black = jnp.asarray(-mean / std).reshape(-1)

    @jax.jit
    def step(state, averaged, opt_state, images, labels, key):
        images = augment(key, images, config.augmentation, black)

        def objective(state):
            return loss_fn(fn(state, images), labels, config.label_smoothing)

        loss, gradient = jax.value_and_grad(objective)(state)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes its int32 step count with floats
            updates, opt_state = tx.update(gradient, opt_state, state)
        state = optax.apply_updates(state, updates)
        return state, optax.incremental_update(state, averaged, 1 - config.ema), opt_state, loss

    averaged, opt_state, history = state, replicate(mesh, tx.init(state)), []
    key = jax.random.key(config.seed)
    order = np.random.Generator(np.random.PCG64(config.seed))
    with progress_bar(progress) as bar:
        task = bar.add_task("", total=config.epochs, loss=math.nan, validation=math.nan)
        for epoch in range(config.epochs):
            losses = []
            for chosen in order.permutation(len(data.images))[: per_epoch * batch].reshape(per_epoch, batch):
                key, step_key = jax.random.split(key)
                pictures, labels = split_samples(mesh, (data.images[chosen], data.labels[chosen]))
                state, averaged, opt_state, loss = step(state, averaged, opt_state, pictures, labels, step_key)
                losses.append(loss)
            history.append(float(np.mean(jax.device_get(losses))))
            if not math.isfinite(history[-1]):
                raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}; lower --learning-rate.")
            bar.update(task, advance=1, loss=history[-1])
            if len(held_out.images) and epoch % VALIDATE_EVERY == VALIDATE_EVERY - 1:
                nnx.update(model, averaged)
                bar.update(task, validation=accuracy(model, held_out))

    nnx.update(model, averaged)
    metrics = {
        "train": accuracy(model, data),
        "validation": accuracy(model, held_out) if len(held_out.images) else None,
        "test": accuracy(model, read_split(config, model, config.test_split)),
        "loss": history,
        "seconds": round(time.perf_counter() - began, 1),
    }
    return model, metrics


def progress_bar(shown: bool) -> Progress:
    """Epochs, with the training loss and the validation accuracy."""
    return Progress(
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  validation {task.fields[validation]:.2%}"),
        TimeRemainingColumn(),
        disable=not shown,
    )


def write_record(path: Path, config: TrainConfig, metrics: dict[str, Any]) -> None:
    """The run as JSON: accuracies, settings, command, machine and versions."""
    record = {
        "metrics": {**metrics, "loss": [round(loss, 4) for loss in metrics["loss"]]},
        "config": dataclasses.asdict(config),
        **provenance(),
    }
    write_json(path, record)


def parse(arguments: list[str] | None = None) -> tuple[TrainConfig, Path]:
    """The command line: one flag per field of TrainConfig and Augmentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        metavar="FIELD=INT[,INT...]",
        help="config fields of the model; may be given several times",
    )
    groups = (TrainConfig(), Augmentation())
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            flag = "--" + field.name.replace("_", "-")
            if isinstance(value, bool):
                parser.add_argument(flag, action="store_true")
            elif isinstance(value, int | float | str) or field.name == "limit":
                kind = int if value is None else type(value)
                parser.add_argument(flag, type=kind, default=value, choices=CHOICES.get(field.name))
    values = vars(parser.parse_args(arguments))
    overrides = []
    for item in values["set"]:
        name, _, text = item.partition("=")
        numbers = text.split(",")
        if not all(number.isdigit() for number in numbers):
            parser.error(f"--set {item} is not FIELD=INT or FIELD=INT,INT; write e.g. img_size=48 or depths=2,4.")
        overrides.append((name, int(text) if len(numbers) == 1 else tuple(map(int, numbers))))
    train_fields, augmentation_fields = (
        {f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values} for group in groups
    )
    augmentation = Augmentation(**augmentation_fields)
    return TrainConfig(**train_fields, overrides=tuple(overrides), augmentation=augmentation), values["out"]


def main() -> None:
    config, out = parse()
    try:
        if out.exists():
            raise FileExistsError(f"{out} already exists; choose another --out or remove it first.")
        model, metrics = train(config)
        save(out, model)
        write_record(out / "training.json", config, metrics)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(str(error)) from error
    shown = {name: metrics[name] for name in ("train", "validation", "test") if metrics[name] is not None}
    print("  ".join(f"{name} {value:.2%}" for name, value in shown.items()), f" {metrics['seconds']} s")


if __name__ == "__main__":
    main()
