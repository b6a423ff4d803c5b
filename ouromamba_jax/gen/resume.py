"""Checkpoints of a generation: one .npz that is replaced whole and names the run that it belongs to."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ouromamba_jax.files import whole_file
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
    return Unfinished(int(arrays["iteration"]), leaves) if leaves else None


def run_identity(model: VisionModel, weights: Any, config: GenConfig, key: Array) -> str:
    """What a run depends on, as text: config, key, and the model with a checksum of its weights."""
    checksum = 0
    for leaf in jax.tree.leaves(weights):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, checksum)
    return f"{config} {np.asarray(jax.random.key_data(key)).tolist()} {model.config} {checksum:08x}"
