"""Checkpoints of a generation: one .npz that is replaced whole and names the run that it belongs to."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ouromamba_jax.files import read_npz, whole_file
from ouromamba_jax.gen.config import GenConfig
from ouromamba_jax.models.base import VisionModel


@dataclass
class Unfinished:
    """Where inside a batch a checkpoint was taken: pixels and optimiser moments, and the iterations they have seen."""

    iteration: int
    leaves: list[Array]


@dataclass
class RunState:
    """What a run has made so far: finished images (N, H, W, 3), and the losses of all iterations."""

    done: np.ndarray
    history: dict[str, np.ndarray]

    def save(self, path: Path, identity: str, iteration: int, leaves: list[Array]) -> None:
        """Writes everything to `path` at once; an interrupted write leaves the previous file."""
        arrays: dict[str, Any] = {f"history/{name}": values for name, values in self.history.items()}
        arrays |= {f"leaf/{k:03d}": np.asarray(leaf) for k, leaf in enumerate(leaves)}
        with whole_file(path) as file:
            np.savez(file, identity=np.asarray(identity), iteration=np.asarray(iteration), done=self.done, **arrays)


def restore(path: Path, identity: str, run: RunState) -> Unfinished | None:
    """Fills `run` from the file, and returns the unfinished batch's state if there is one."""
    if not path.exists():
        return None
    try:
        arrays = read_npz(path)
        if str(arrays["identity"]) != identity:
            raise ValueError(f"{path} belongs to another model, config or key; use another directory or delete it.")
        done, iteration = arrays["done"], int(arrays["iteration"])
        history = {name: arrays[f"history/{name}"] for name in run.history}
    except KeyError as error:
        raise ValueError(f"{path} is not the state of a generation: {error} is missing; delete it.") from error
    run.done = done
    for name, values in run.history.items():
        values[:] = history[name]
    leaves = [jnp.asarray(arrays[name]) for name in sorted(arrays) if name.startswith("leaf/")]
    return Unfinished(iteration, leaves) if leaves else None


def run_identity(model: VisionModel, weights: Any, config: GenConfig, key: Array) -> str:
    """What a run's bits depend on, as text: config, key, the model with a checksum of its weights, precision, JAX."""
    checksum = 0
    for leaf in jax.tree.leaves(weights):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, checksum)
    precision = f"{jnp.dtype(model.dtype).name} jax {jax.__version__}"
    return f"{config} {np.asarray(jax.random.key_data(key)).tolist()} {model.config} {checksum:08x} {precision}"
