"""Checkpoints of a generation: one .npz that is replaced whole and names the run that it belongs to."""

import dataclasses
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ouromamba_jax.files import checksum, read_npz, whole_file
from ouromamba_jax.gen.config import GenConfig
from ouromamba_jax.models.base import VisionModel


@dataclass
class Unfinished:
    """Where inside a batch a checkpoint was taken: pixels and optimiser moments, and the iterations they have seen."""

    iteration: int
    leaves: list[Array]


@dataclass
class RunState:
    """What a run has made so far: finished images (N, H, W, I), the losses of all iterations; all targets."""

    done: np.ndarray
    history: dict[str, np.ndarray]
    targets: np.ndarray

    def save(self, path: Path, identity: str, iteration: int, leaves: list[Array]) -> None:
        """Writes everything to `path` at once; an interrupted write leaves the previous file."""
        arrays: dict[str, Any] = {f"history/{name}": values for name, values in self.history.items()}
        arrays |= {f"leaf/{k:03d}": np.asarray(leaf) for k, leaf in enumerate(leaves)}
        arrays |= {"identity": np.asarray(identity), "iteration": np.asarray(iteration), "targets": self.targets}
        with whole_file(path) as file:
            np.savez(file, done=self.done, **arrays)


def restore(path: Path, identity: str, run: RunState, batch_size: int) -> Unfinished | None:
    """Fills `run` from the file, which may be of a run for fewer images, and returns the state of an unfinished batch.

    Of a last batch that was shorter than it is now nothing is kept: the others in a batch move an image's last bits.

    Raises:
      ValueError: if the file is damaged, or of a run that `run` does not continue.
    """
    if not path.exists():
        return None
    try:
        arrays = read_npz(path)
        if str(arrays["identity"]) != identity:
            raise ValueError(
                f"{path} belongs to another model, config or key, or was made elsewhere; delete it or use another "
                "directory."
            )
        done, iteration, targets = arrays["done"], int(arrays["iteration"]), arrays["targets"]
        history = {name: arrays[f"history/{name}"] for name in run.history}
    except KeyError as error:
        raise ValueError(f"{path} is not the state of a generation: {error} is missing; delete it.") from error
    iterations = history["total"].shape[1]
    if iterations != run.history["total"].shape[1]:
        raise ValueError(
            f"{path} holds a run of {iterations} iterations, and another number changes the learning rate of each; ask "
            f"for {iterations}, delete it, or use another directory."
        )
    if len(done) > len(run.targets):
        raise ValueError(f"{path} already holds {len(done)} images; ask for as many or more, or use another directory.")
    if len(done) < len(run.targets):
        done = done[: len(done) // batch_size * batch_size]
    leaves = [jnp.asarray(arrays[name]) for name in sorted(arrays) if name.startswith("leaf/")]
    if leaves and len(leaves[0]) != min(batch_size, len(run.targets) - len(done)):
        leaves = []
    kept = len(done) + (len(leaves[0]) if leaves else 0)
    if not np.array_equal(targets[:kept], run.targets[:kept]):
        raise ValueError(f"{path} holds images of other targets; give the same ones first or use another directory.")
    run.done = done
    for name, values in run.history.items():
        batches = -(-kept // batch_size)
        values[:batches] = history[name][:batches]
    return Unfinished(iteration, leaves) if leaves else None


def run_identity(model: VisionModel, weights: Any, config: GenConfig, key: Array) -> str:
    """What a batch's bits depend on, as text: config, key, the model with a checksum of its weights, precision, JAX.

    Without what may differ between a run and the one that continues it, or has a message of its own.
    """
    config = dataclasses.replace(config, num_images=1, iterations=1, checkpoint_every=1)
    digest = checksum(jax.tree.leaves(weights))
    precision = (
        f"{jnp.dtype(model.dtype).name} jax {jax.__version__} {version('ouromamba_jax')} {jax.default_backend()}"
    )
    return f"{config} {np.asarray(jax.random.key_data(key)).tolist()} {model.config} {digest:08x} {precision}"
