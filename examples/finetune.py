"""Fine-tune a model on the digits with Optax: its new head or all of it, and then, if asked, its quantised form.

    python examples/finetune.py --what all --drop-path 0.1 --quantise w4a4

takes five minutes of CPU time. It starts from `vim_micro_cifar10`, which has seen no digit, gives it a new head, and
prints the share of the 500 test images that it then knows: 98.2 % in float32, 97.4 % when quantised to W4A4, 98.0 %
when the steps, scales and floats of that were fine-tuned with straight-through gradients. `--what head` trains the new
head alone.

`--model` is a native checkpoint (`ouromamba convert` makes one). `--out` saves what was made last.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ouromamba_jax as om
from ouromamba_jax.data import Dataset, load_images
from ouromamba_jax.evaluation.evaluate import predict
from ouromamba_jax.evaluation.metrics import top1
from ouromamba_jax.models import VisionModel, build_model
from ouromamba_jax.sharding import use_all_cores


def with_new_head(checkpoint: str, classes: int, dtype: str, seed: int) -> VisionModel:
    """The model of a checkpoint that computes in `dtype`, with a random last layer; parameters are float32."""
    loaded = om.load(checkpoint)
    config = dataclasses.replace(loaded.config, num_classes=classes)
    model = build_model(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed))
    fresh = model.head.proj
    model.head.proj = loaded.head.proj = None
    nnx.update(model, nnx.state(loaded))
    model.head.proj = fresh
    return model


def is_trained(what: str, path: tuple[Any, ...], leaf: Any) -> bool:
    """Parameters, and the steps and scales of a quantised model, whose levels stay as they are; "head": only there."""
    is_float = isinstance(leaf, nnx.Param) or path[-1] in ("scale", "weight_scale", "parameter_scale")
    return is_float and (what == "all" or path[0] == "head")


def fine_tune(model: VisionModel, data: Dataset, options: argparse.Namespace, rate: float) -> list[float]:
    """Trains `model` in place and returns the loss of every step."""
    fn, state = om.pure(model)
    kept, rest = nnx.split_state(state, partial(is_trained, options.what), ...)
    floats = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), kept)  # a quantised model keeps 16 bits
    batch = min(options.batch_size, len(data.images))
    steps = options.epochs * (len(data.images) // batch)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(rate, steps)))

    @jax.jit
    def step(floats, moments, rest, images, labels, key):
        def loss(floats):
            logits = fn(nnx.merge_state(floats, rest), images, rngs=key)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(floats)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes its int32 step count with floats
            updates, moments = adam.update(gradients, moments)
        return optax.apply_updates(floats, updates), moments, value

    moments, losses = adam.init(floats), []
    order, key = np.random.Generator(np.random.PCG64(options.seed)), jax.random.key(options.seed)
    for _ in range(options.epochs):
        for chosen in order.permutation(len(data.images))[: len(data.images) // batch * batch].reshape(-1, batch):
            images, labels = jnp.asarray(data.images[chosen]), jnp.asarray(data.labels[chosen], jnp.int32)
            draws = jax.random.fold_in(key, len(losses))
            floats, moments, value = step(floats, moments, rest, images, labels, draws)
            losses.append(value)
    nnx.update(model, jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), floats, kept))
    return [float(value) for value in losses]


def run(options: argparse.Namespace) -> tuple[VisionModel, dict[str, float]]:
    """(the model that was made last, top-1 on the test images by what was done)."""
    model = with_new_head(options.model, 10, options.dtype, options.seed)
    size, preprocessing = model.config.img_size, model.config.preprocessing
    training, test = (
        load_images("digits", split, size, preprocessing, limit=options.limit, labelled=True)
        for split in ("train", "test")
    )
    scores: dict[str, float] = {}
    began = time.perf_counter()

    def report(name: str, model: VisionModel) -> None:
        scores[name] = top1(predict(model, test.images), test.labels)
        print(f"{name}: {scores[name]:.1%} of {len(test.images)} test images, {time.perf_counter() - began:.0f} s")

    model.drop_path, model.remat = options.drop_path, options.remat
    fine_tune(model, training, options, options.learning_rate)
    report(f"{options.what} in {options.dtype}", model)
    if options.quantise:
        # Fine-tuning does what tuning would do.
        config = om.QuantConfig.preset(options.quantise, tune_epochs=0)
        model, _ = om.quantize(model, training.images[:64], config)
        report(options.quantise, model)
        fine_tune(model, training, options, options.learning_rate / 10)
        report(f"{options.quantise}, fine-tuned", model)
    if options.out:
        om.save(options.out, model)
    return model, scores


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_micro_cifar10")
    parser.add_argument("--what", choices=("head", "all"), default="all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--remat", action="store_true", help="compute blocks again instead of keeping what is in them")
    parser.add_argument("--quantise", choices=("w4a4", "w4a8", "w6a6", "w8a8"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--limit", type=int, help="images of each split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="new folder for the checkpoint")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    use_all_cores()
    run(parse())
