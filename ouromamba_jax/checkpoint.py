"""Native checkpoints: a folder with `config.json` (what to build) and `arrays/` (Orbax), float or quantised.

4-bit weights are packed two to a byte on disk and unpacked to int8 once, here, when loaded: XLA's CPU integer products
take int8 operands.
"""

import dataclasses
import importlib.resources
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from ouromamba_jax.models import build_model, config_class
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.models.config import Preprocessing
from ouromamba_jax.qtensor import pack_int4, unpack_int4
from ouromamba_jax.quantize.modules import Levels, apply_specs, quantized_specs, spec_from_json, spec_to_json

_FORMAT = 1


class CheckpointError(ValueError):
    """A native checkpoint that cannot be read; the message names the file and the problem."""


def save(path: str | Path, model: VisionModel) -> None:
    """Writes `model`, float or quantised, to the new folder `path`, whole or not at all.

    Raises:
      FileExistsError: if `path` exists and is not an empty folder.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists; choose another path or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    description = {
        "format": _FORMAT,
        "family": model.family,
        "config": dataclasses.asdict(model.config),
        "dtype": jnp.dtype(model.dtype).name,
        "quantization": {site: spec_to_json(spec) for site, spec in quantized_specs(model).items()},
    }
    leaves = _leaves(nnx.state(model))
    arrays = {name: pack_int4(leaf[...]) if _is_packed(leaf) else leaf[...] for name, leaf in leaves.items()}
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(staging / "arrays", arrays)
        (staging / "arrays" / "commit_success.txt").unlink(missing_ok=True)  # names the staging folder
        (staging / "config.json").write_text(json.dumps(description, indent=1) + "\n")
        staging.chmod(0o755)
        staging.replace(path)  # one rename: `path` appears whole
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def load(path: str | Path) -> VisionModel:
    """The model that `save` wrote to `path`; a name such as "vim_micro" loads the checkpoint shipped with the package.

    Raises:
      CheckpointError: if the folder is missing, damaged or does not fit the config it holds; every mismatch is named.
    """
    path = resolve(path)
    description = read_description(path)
    try:
        config_type = config_class(description["family"])
        fields = dict(description["config"])
        fields["preprocessing"] = Preprocessing(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in fields["preprocessing"].items()}
        )
        config = config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        specs = {site: spec_from_json(spec) for site, spec in description["quantization"].items()}
        dtype = jnp.dtype(description["dtype"])
        model = nnx.eval_shape(lambda: apply_specs(build_model(config, dtype=dtype), specs))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / 'config.json'} does not describe a model of this version: {error}.") from error
    graphdef, state = nnx.split(model)
    arrays = _restore(path, _leaves(state))
    flat = [(key, leaf.replace(arrays[_name(key)])) for key, leaf in nnx.to_flat_state(state)]
    restored: VisionModel = nnx.merge(graphdef, nnx.from_flat_state(flat))  # type: ignore[assignment]
    return restored


def resolve(path: str | Path) -> Path:
    """`path` itself, or the folder of the embedded checkpoint of that name.

    Raises:
      CheckpointError: if neither exists.
    """
    folder = Path(path).absolute()
    if folder.exists():
        return folder
    embedded = Path(str(importlib.resources.files("ouromamba_jax") / "checkpoints"))
    if (embedded / str(path)).is_dir() and Path(path).name == str(path):
        return embedded / str(path)
    names = ", ".join(sorted(p.name for p in embedded.iterdir())) if embedded.is_dir() else "none"
    raise CheckpointError(f"there is no checkpoint at {path}; give the folder of one, or a shipped one ({names}).")


def read_description(path: Path) -> dict[str, Any]:
    """`config.json` of the checkpoint at `path`: family, config, dtype, and the quantised sites.

    Raises:
      CheckpointError: if it is missing, damaged or of another format.
    """
    try:
        description = json.loads((path / "config.json").read_text())
    except OSError as error:
        raise CheckpointError(f"{path} is not a checkpoint: it has no readable config.json.") from error
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'} is damaged: {error}.") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        raise CheckpointError(f"{path} has checkpoint format {found}; this version reads format {_FORMAT}.")
    return description


def _restore(path: Path, leaves: dict[str, nnx.Variable]) -> dict[str, jax.Array]:
    """Arrays by name, checked against the model's leaves both ways, in shape and in type."""
    stored = {name: _stored_shape(leaf) for name, leaf in leaves.items()}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path / "arrays").item_metadata
            found = {} if metadata is None else dict(metadata.tree)
            problems = [f"{name} is missing" for name in sorted(stored.keys() - found.keys())]
            problems += [f"{name} is not part of the model" for name in sorted(found.keys() - stored.keys())]
            for name in sorted(stored.keys() & found.keys()):
                want, have = stored[name], found[name]
                # Parameters come back in the floating type they were saved in: a quantised model keeps them in 16 bits.
                if isinstance(leaves[name], nnx.Param) and jnp.issubdtype(have.dtype, jnp.floating):
                    want = stored[name] = jax.ShapeDtypeStruct(want.shape, have.dtype)
                if (tuple(have.shape), jnp.dtype(have.dtype)) != (want.shape, want.dtype):
                    problems.append(f"{name} is {have.dtype}{list(have.shape)}, not {want.dtype}{list(want.shape)}")
            if problems:
                more = f", and {len(problems) - 10} more" if len(problems) > 10 else ""
                raise CheckpointError(f"{path} does not fit its config: {'; '.join(problems[:10])}{more}.")
            target = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=device) for k, v in stored.items()}
            arrays = checkpointer.restore(path / "arrays", target)
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for damaged files
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the arrays of {path} cannot be read: {first_line}") from error
    return {
        name: unpack_int4(arrays[name], leaf.shape[0]) if _is_packed(leaf) else arrays[name]
        for name, leaf in leaves.items()
    }


def _leaves(state: nnx.State) -> dict[str, nnx.Variable]:
    return {_name(key): leaf for key, leaf in nnx.to_flat_state(state)}


def _name(key: tuple) -> str:
    return ".".join(map(str, key))


def _is_packed(leaf: nnx.Variable) -> bool:
    return isinstance(leaf, Levels) and leaf.bits <= 4


def _stored_shape(leaf: nnx.Variable) -> jax.ShapeDtypeStruct:
    if _is_packed(leaf):
        return jax.ShapeDtypeStruct(((leaf.shape[0] + 1) // 2, leaf.shape[1]), jnp.uint8)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
