"""Native checkpoints: a folder with `config.json` (what to build) and `arrays/` (Orbax), float or quantised.

`arrays/` holds one flat array per type: all leaves of that type, one after the other, by name. (Orbax writes more than
a kilobyte beside every array; a small model has a thousand leaves of a few hundred bytes.) `config.json` has the
index of the leaves, the settings of the quantised sites, each distinct one once, and the SHA-256 of every file.

Levels of fewer than 8 bits are packed without gaps on disk and unpacked to int8 once, here, when loaded: XLA's CPU
integer products take int8 operands. Where the GPU kernels run, weights are then laid out for those.
"""

import dataclasses
import hashlib
import importlib.resources
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ouromamba_jax.data.preprocessing import Preprocessing
from ouromamba_jax.files import check_writable, local_path
from ouromamba_jax.models import build_model, config_class, list_models
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.models.registry import override_config
from ouromamba_jax.names import did_you_mean
from ouromamba_jax.ops.qtensor import max_level, pack_levels, packed_rows, unpack_levels
from ouromamba_jax.quantize.activation import KernelLayout, Levels, SiteSpec, Typed
from ouromamba_jax.quantize.kinds import apply_specs, prepare_weights, quantized_specs
from ouromamba_jax.sharding import without_mesh

_FORMAT = 3
_MAY_DIFFER = ("drop_path", "remat", "param_dtype")  # of a module; no result of inference depends on them


class CheckpointError(ValueError):
    """A native checkpoint that cannot be read; the message names the file and the problem."""


@without_mesh
def save(path: str | Path, model: VisionModel) -> None:
    """Writes `model`, float or quantised, to the new folder `path`, whole or not at all.

    The number of classes that is written is the head's, also where it was replaced.

    Raises:
      CheckpointError: if `load` could not give the model back, because its modules, their settings or its parameters
        are not those that its config describes, or hold NaN or infinity; every one is named.
      FileExistsError: if `path` exists and is not an empty folder.
      OSError: if nothing can be written there.

    Examples:
      >>> import tempfile
      >>> import ouromamba_jax as om
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     om.save(f"{folder}/copy", om.load("vim_micro"))
      ...     om.load(f"{folder}/copy").family
      'vim'
    """
    path = local_path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists; choose another path or remove it first.")
    check_writable(path)
    leaves = _leaves(nnx.state(model))
    arrays = {name: _stored(leaf) for name, leaf in sorted(leaves.items())}
    index: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, value in arrays.items():
        index.setdefault(value.dtype.name, {})[name] = value.shape
    flat = {dtype: np.concatenate([arrays[name].ravel() for name in names]) for dtype, names in index.items()}
    configs, sites = _quantization_to_json(model)
    description = {
        "format": _FORMAT,
        "family": model.family,
        "config": dataclasses.asdict(_config_of(model)),
        "dtype": jnp.dtype(model.dtype).name,
        "quantization_configs": configs,
        "quantization": sites,
        "arrays": index,
    }
    _check_loadable(model, json.loads(json.dumps(description)))
    if broken := _not_finite(arrays):
        raise CheckpointError(f"{broken} of the model holds NaN or infinity, so it is not saved: load whole weights.")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(staging / "arrays", flat)
        (staging / "arrays" / "commit_success.txt").unlink(missing_ok=True)  # names the staging folder
        description["files"] = _digests(staging / "arrays")
        lines = [f"{json.dumps(field)}: {json.dumps(value)}" for field, value in description.items()]
        (staging / "config.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        staging.chmod(0o755)
        staging.replace(path)  # one rename: `path` appears whole
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@without_mesh
def load(path: str | Path, **overrides: Any) -> VisionModel:
    """The model that `save` wrote to `path`; a name such as "vim_micro" loads the checkpoint shipped with the package.

    Args:
      path: the folder, or the name of a shipped checkpoint.
      **overrides: config fields of a float model to change, e.g. `img_size=384`. Learned positions are resized as
        `from_torch(..., interpolate_positions=True)` does, and weights summed as it does for `in_channels=1`.

    Raises:
      CheckpointError: if the folder is missing, damaged, holds NaN or infinity or does not fit the config it holds, or
        if its parameters do not fit the changed config; every mismatch is named.
      ValueError: for an unknown field, or an input size that leaves another field open.

    Examples:
      >>> import ouromamba_jax as om
      >>> om.load("vim_micro").config.num_classes
      10
    """
    path = resolve(path)
    description = read_description(path)
    try:
        model = _build(description)
        stored = _stored_index(description)
        files = dict(description["files"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / 'config.json'} does not describe a model of this version: {error}.") from error
    if overrides and description["quantization"]:
        raise CheckpointError(
            f"{path} is quantised for its own config, so {', '.join(overrides)} cannot change; load the float model "
            "with it and quantise that."
        )
    graphdef, state = nnx.split(model)
    leaves = _leaves(state)
    if problems := _mismatches(stored, leaves):
        raise CheckpointError(f"{path} does not fit its config: {problems}.")
    _check_files(path / "arrays", files)
    arrays = _restore(path, stored)
    if broken := _not_finite(arrays):
        raise CheckpointError(f"{broken} of {path} holds NaN or infinity: save a model of whole weights again.")
    flat = [(key, leaf.replace(_value(arrays[_name(key)], leaf))) for key, leaf in nnx.to_flat_state(state)]
    restored: VisionModel = nnx.merge(graphdef, nnx.from_flat_state(flat))  # type: ignore[assignment]
    if overrides:
        return _with_config(restored, override_config(restored.config, overrides), path)
    prepare_weights(restored)
    return restored


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like one that `save` wrote."""
    return (path / "config.json").is_file() and (path / "arrays").is_dir()


def is_shipped(path: str | Path) -> bool:
    """Whether `path` is the name of an embedded checkpoint, and no file or folder."""
    return not local_path(path).exists() and Path(path).name == str(path) and (_embedded() / str(path)).is_dir()


def _embedded() -> Path:
    return Path(str(importlib.resources.files("ouromamba_jax") / "checkpoints"))


def resolve(path: str | Path) -> Path:
    """`path` itself, or the folder of the embedded checkpoint of that name.

    Raises:
      CheckpointError: if neither exists.
    """
    folder = local_path(path).absolute()
    if folder.exists():
        return folder
    embedded = _embedded()
    if is_shipped(path):
        return embedded / str(path)
    if str(path) in list_models():
        raise CheckpointError(
            f"there is no checkpoint at {path}: {path} is a model's name; convert its checkpoint first, and give the "
            f"folder."
        )
    shipped = sorted(p.name for p in embedded.iterdir()) if embedded.is_dir() else []
    names = did_you_mean(str(path), {*shipped, *list_models()}) or f"shipped ones are {', '.join(shipped) or 'none'}."
    raise CheckpointError(f"there is no checkpoint at {path}: give the folder of one, or a name; {names}")


def read_description(path: Path) -> dict[str, Any]:
    """`config.json` of the checkpoint at `path`: family, config, dtype, and the quantised sites.

    Raises:
      CheckpointError: if it is missing, damaged or of another format.
    """
    try:
        description = json.loads((path / "config.json").read_text())
    except OSError as error:
        if path.suffix in (".pth", ".pt", ".tar", ".safetensors"):
            raise CheckpointError(
                f"{path} is not a folder that save wrote: convert it first (ouromamba convert or from_torch)."
            ) from error
        raise CheckpointError(f"{path} is not a checkpoint: it has no readable config.json.") from error
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'} is damaged: {error}.") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        if found is None:
            raise CheckpointError(
                f"{path} is not a folder that save wrote: if it is a hub folder, convert it first (ouromamba convert "
                "or from_torch)."
            )
        raise CheckpointError(
            f"{path} has checkpoint format {found}, and this version reads format {_FORMAT}: convert or quantise the "
            "model again."
        )
    return description


def _build(description: dict[str, Any]) -> Any:
    """The model that a description is of, without values."""
    config_type = config_class(description["family"])
    fields = dict(description["config"])
    fields["preprocessing"] = Preprocessing(**fields["preprocessing"])
    config = config_type(**fields)  # which makes JSON's lists the tuples that they were
    configs = description["quantization_configs"]
    specs = {
        site: SiteSpec.from_json({**spec, "config": configs[spec["config"]]})
        for site, spec in description["quantization"].items()
    }
    dtype = jnp.dtype(description["dtype"])
    return nnx.eval_shape(lambda: apply_specs(build_model(config, dtype=dtype), specs))


def _stored_index(description: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        for dtype, names in description["arrays"].items()
        for name, shape in names.items()
    }


def _config_of(model: VisionModel) -> Any:
    """The model's config with the number of classes that its head has."""
    proj = model.head.proj
    weight = getattr(proj, "kernel", getattr(proj, "levels", None))
    if proj is not None and weight is None:
        return model.config
    return dataclasses.replace(model.config, num_classes=0 if weight is None else weight.shape[-1])


def _check_loadable(model: VisionModel, description: dict[str, Any]) -> None:
    """Holds a model to what `load` will build and expect."""
    expected = _build(description)
    have, want = (dict(nnx.iter_modules(m)) for m in (model, expected))
    both = sorted(have.keys() & want.keys(), key=_name)
    strange = [path for path in both if type(have[path]) is not type(want[path])]
    problems = [
        f"{_name(path) or 'it'} is a {type(have[path]).__name__}, not a {type(want[path]).__name__}" for path in strange
    ]
    leaves = _leaves(nnx.state(model))
    way_out = "set model.config to the config it was built from, or undo the change"
    if not problems and (problems := _casts(leaves)):
        way_out = "quantise or load it again, and cast only its nnx.Param leaves"
    if not problems and (found := _mismatches(_stored_index(description), _leaves(nnx.state(expected)))):
        problems = [found]
    if not problems:
        problems = list(dict.fromkeys(line for path in both for line in _other_settings(have[path], want[path], path)))
    if not problems:  # packing would cut such levels off
        levels = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Levels)}
        problems = [f"{name} has levels beyond {leaf.bits} bits" for name, leaf in levels.items() if _overflows(leaf)]
    if problems:
        raise CheckpointError(
            f"the model is not what its config describes, so it could not be loaded: {_listed(problems)}; {way_out}."
        )


def _casts(leaves: dict[str, nnx.Variable]) -> list[str]:
    """Levels and scales that are not of the type that they were made in."""
    typed = {name: leaf for name, leaf in sorted(leaves.items()) if isinstance(leaf, Typed)}
    return [f"{name} is {x.dtype}, not {x.stored}" for name, x in typed.items() if x.dtype.name != x.stored]


def _other_settings(have: nnx.Module, want: nnx.Module, path: tuple) -> list[str]:
    """What a module computes with besides modules and arrays, where it differs from what its config makes of it."""
    found = []
    for name in sorted(vars(have).keys() & vars(want).keys() - {*_MAY_DIFFER}):
        ours, theirs = getattr(have, name), getattr(want, name)
        if name == "dtype":  # a new head's None follows its input
            ours, theirs = jnp.dtype(ours or theirs).name, jnp.dtype(theirs).name
        if name.startswith("_") or isinstance(ours, nnx.Module | nnx.Variable):
            continue
        if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
            fields = {field.name for field in dataclasses.fields(ours)} - {"num_classes", "preprocessing"}
            pairs = [(f, getattr(ours, f), getattr(theirs, f)) for f in sorted(fields)]
            found += [f"a layer has {f}={a!r}, not {b!r}" for f, a, b in pairs if a != b]
        elif ours != theirs:
            found.append(f"{_name((*path, name))} is {ours!r}, not {theirs!r}")
    return found


def _not_finite(arrays: dict[str, np.ndarray]) -> str | None:
    """The first of the arrays that holds a NaN or an infinity."""
    floats = (name for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating))
    return next((name for name in floats if not np.isfinite(arrays[name]).all()), None)


def _with_config(model: VisionModel, config: Any, path: Path) -> VisionModel:
    """The parameters of a float model in one of another config."""
    arrays = {name: leaf[...] for name, leaf in _leaves(nnx.state(model)).items()}
    before = model.config
    positions = arrays.get("stem.positions")
    if positions is not None and config.grid != before.grid and config.class_token == before.class_token:
        resized = config.resize_positions(np.asarray(positions, np.float64), before.grid)
        arrays["stem.positions"] = jnp.asarray(resized.astype(positions.dtype))
    for name in {"stem.proj.kernel", "stem.first.proj.kernel"} & arrays.keys():
        if (config.in_channels, before.in_channels) == (1, 3):
            patches = arrays[name].astype(jnp.float32).reshape(-1, 3, arrays[name].shape[-1])
            arrays[name] = patches.sum(axis=1).astype(arrays[name].dtype)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build_model(config, dtype=model.dtype)))
    stored = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    if problems := _mismatches(stored, _leaves(state)):
        raise CheckpointError(f"the parameters of {path} do not fit the changed config: {problems}.")
    flat = [(key, leaf.replace(arrays[_name(key)])) for key, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))  # type: ignore[return-value]


def _quantization_to_json(model: VisionModel) -> tuple[list[dict[str, Any]], dict[str, dict[str, int]]]:
    """(the distinct settings, for every site the number of its settings and its tokens and channels)."""
    configs: list[dict[str, Any]] = []
    sites = {}
    for site, spec in quantized_specs(model).items():
        data = spec.to_json()
        config = data.pop("config")
        if config not in configs:
            configs.append(config)
        sites[site] = {"config": configs.index(config), **data}
    return configs, sites


def _mismatches(stored: dict[str, jax.ShapeDtypeStruct], leaves: dict[str, nnx.Variable]) -> str:
    """How an index differs from a model's leaves, compared both ways, in shape and in type; "" if it does not."""
    problems = [f"{name} is missing" for name in sorted(leaves.keys() - stored.keys())]
    problems += [f"{name} is not part of the model" for name in sorted(stored.keys() - leaves.keys())]
    for name in sorted(stored.keys() & leaves.keys()):
        have, want = stored[name], _stored_shape(leaves[name])
        # Parameters come back in the floating type they were saved in: a quantised model keeps them in 16 bits.
        if isinstance(leaves[name], nnx.Param) and jnp.issubdtype(have.dtype, jnp.floating):
            want = jax.ShapeDtypeStruct(want.shape, have.dtype)
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            problems.append(f"{name} is {have.dtype}{list(have.shape)}, not {want.dtype}{list(want.shape)}")
    return _listed(problems)


def _listed(problems: list[str]) -> str:
    """The first ten, and how many more there are."""
    more = f", and {len(problems) - 10} more" if len(problems) > 10 else ""
    return "; ".join(problems[:10]) + more


def _checkpointer() -> Any:
    """Orbax's, whose import takes an eighth of ours: a program that neither saves nor loads does without."""
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer()


def _check_files(folder: Path, files: dict[str, str]) -> None:
    """Compares every file below `folder` with its digest, so that no changed bit is ever read as a weight."""
    found = _digests(folder)
    problems = [f"{name} is missing" for name in sorted(files.keys() - found.keys())]
    problems += [f"{name} is not part of it" for name in sorted(found.keys() - files.keys())]
    problems += [f"{name} is damaged" for name in sorted(files.keys() & found.keys()) if files[name] != found[name]]
    if problems:
        raise CheckpointError(f"{folder} is not as it was saved, so get another copy: {_listed(problems)}.")


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 by path of every file below `folder`, without hidden ones, which file managers leave behind."""
    digests = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            with file.open("rb") as opened:
                digests[file.relative_to(folder).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def _restore(path: Path, stored: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Arrays by name, as they are stored: views of the flat array of their type."""
    sizes: dict[np.dtype, int] = {}
    for leaf in stored.values():
        sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + math.prod(leaf.shape)
    try:
        with _checkpointer() as checkpointer:
            metadata = checkpointer.metadata(path / "arrays").item_metadata
            have = {name: tuple(array.shape) for name, array in metadata.tree.items()}
            want = {dtype.name: (size,) for dtype, size in sizes.items()}
            if have != want:
                raise ValueError(f"they have shapes {have}, but the index in config.json adds up to {want}.")
            target = {dtype.name: np.empty(size, dtype) for dtype, size in sizes.items()}
            flat = checkpointer.restore(path / "arrays", target)
    except Exception as error:  # Orbax and TensorStore raise many types
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the arrays of {path} cannot be read: {first_line}") from error
    arrays, start = {}, dict.fromkeys(sizes, 0)
    for name, leaf in sorted(stored.items()):
        stop = start[leaf.dtype] + math.prod(leaf.shape)
        arrays[name] = flat[leaf.dtype.name][start[leaf.dtype] : stop].reshape(leaf.shape)
        start[leaf.dtype] = stop
    return arrays


def _stored(leaf: nnx.Variable) -> np.ndarray:
    """A leaf as it is written."""
    value = np.asarray(leaf.get_value())
    return pack_levels(value, leaf.bits) if _is_packed(leaf) else value


def _value(stored: np.ndarray, leaf: nnx.Variable) -> jax.Array:
    """A leaf as the model holds it; a copy, so that no leaf keeps the whole flat array alive."""
    return jnp.array(unpack_levels(stored, leaf.bits, leaf.shape[0]) if _is_packed(leaf) else stored)


def _leaves(state: nnx.State) -> dict[str, nnx.Variable]:
    return {_name(key): leaf for key, leaf in nnx.to_flat_state(state) if not isinstance(leaf, KernelLayout)}


def _name(key: tuple) -> str:
    return ".".join(map(str, key))


def _overflows(leaf: Levels) -> bool:
    return int(np.abs(np.asarray(leaf[...], np.int32)).max(initial=0)) > max_level(leaf.bits)


def _is_packed(leaf: nnx.Variable) -> bool:
    return isinstance(leaf, Levels) and leaf.dtype == jnp.int8 and leaf.bits < 8


def _stored_shape(leaf: nnx.Variable) -> jax.ShapeDtypeStruct:
    if _is_packed(leaf):
        return jax.ShapeDtypeStruct((packed_rows(leaf.shape[0], leaf.bits), leaf.shape[1]), jnp.uint8)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
