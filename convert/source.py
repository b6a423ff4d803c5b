"""A checkpoint as it was given: its tensors, what it says of itself, and what its reader should know.

Sources are files (`.pth`, `.pth.tar`, `.ckpt`, `.pt`, `.safetensors`), folders as model hubs have them (`config.json`
beside `model.safetensors`, whole or in shards) and mappings of arrays.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jaxtyping import Shaped

from ouromamba_jax.convert import hub
from ouromamba_jax.convert.torch_file import TorchFileError, not_the_file, read_torch
from ouromamba_jax.convert.unpickle import RESAVE, Global, Inert, TorchTensor, shown, unwrapped
from ouromamba_jax.files import local_path

Tensors = dict[str, Shaped[np.ndarray, "..."]]

_ENTRIES = ("model", "state_dict")
_OTHER_ENTRIES = (
    "model_ema",
    "state_dict_ema",
    "ema_model",
    "ema_state_dict",
    "ema",
    "model_state_dict",
    "network",
    "net",
    "params",
)
_SETTINGS = ("args", "config", "cfg", "hyper_parameters", "model_args", "model_kwargs")
_CROPS = ("crop_pct", "eval_crop_ratio", "crop_mode")
_NAMES = ("arch", "model_name")
_PICKLED = (".pth", ".pth.tar", ".bin", ".pt", ".ckpt")
_INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 16 * 2**20


class CheckpointNote(UserWarning):
    """What was taken of a checkpoint, where there was a choice."""


@dataclass(frozen=True)
class Source:
    """A checkpoint, read.

    Args:
      name: what messages call it.
      tensors: by their names in it, without `module.` in front.
      says: (where, settings) for everything in it that describes its model, untrusted and inert.
      notes: what was chosen, as parts of a sentence.
    """

    name: str
    tensors: Tensors
    says: tuple[tuple[str, dict[str, Any]], ...] = ()
    notes: tuple[str, ...] = ()


def load_tensors(
    source: str | PathLike[str] | Mapping[str, Any],
    *,
    entry: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Tensors:
    """The tensors of a checkpoint by their names, without the `module.` that data-parallel training puts in front.

    Warns with a `CheckpointNote` if a training file has several entries that hold weights.

    Args:
      source: path of a `.pth`, `.pth.tar` or `.safetensors` file or of a hub folder, "owner/name" on the Hugging Face
        hub, or {name: array}.
      entry: which entry of a training file holds the model, e.g. "model_ema"; by default "model", else "state_dict",
        else the only one there is, else the file itself. One inside another has both names: "checkpoint.model".
      revision, token: of what is fetched from the hub; see `hub.fetch`.

    Raises:
      TorchFileError: the file cannot be read, has no such entry, or its entry holds anything else than named tensors.
      OSError: if the file cannot be opened.

    Examples:
      >>> import tempfile
      >>> import numpy as np
      >>> from safetensors.numpy import save_file
      >>> from ouromamba_jax.convert import load_tensors
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_file({"head.bias": np.zeros(10, np.float32)}, f"{folder}/model.safetensors")
      ...     {key: tensor.shape for key, tensor in load_tensors(f"{folder}/model.safetensors").items()}
      {'head.bias': (10,)}
    """
    read = read_source(source, entry=entry, revision=revision, token=token)
    tell(read.name, read.notes)
    return read.tensors


def tell(name: str, notes: tuple[str, ...] | list[str]) -> None:
    """Warns with all notes in one sentence."""
    if notes:
        warnings.warn(f"{name}: {'; '.join(notes)}.", CheckpointNote, stacklevel=3)


def read_source(
    source: str | PathLike[str] | Mapping[str, Any],
    *,
    entry: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Source:
    """Reads a checkpoint; arguments and errors as of `load_tensors`."""
    if isinstance(source, Mapping):
        if entry is not None:
            raise TorchFileError(f"entry={entry!r} picks a part of a file; pass source[{entry!r}] instead.")
        name = "the given mapping"
        return Source(name, _strip_module({str(key): np.asarray(value) for key, value in source.items()}, name))
    path = local_path(source)
    if isinstance(source, str) and not path.exists() and hub.is_repository(source):
        path = hub.fetch(source, revision=revision, token=token)
    elif revision is not None:
        raise TorchFileError(f"{path} is here already, so it has no revision={revision!r}; leave that out.")
    if path.is_dir():
        return _read_folder(path, entry)
    if path.suffix == ".safetensors":
        if entry is not None:
            raise TorchFileError(f"{path} holds tensors only, no entry {entry!r}; leave `entry` out.")
        return Source(str(path), _strip_module(_read_safetensors(path), str(path)))
    tree = read_torch(path)
    tensors, notes = _select_entry(tree, entry, path)
    arrays = _strip_module({key: tensor.read() for key, tensor in tensors.items()}, str(path))
    return Source(str(path), arrays, _statements(tree, path), notes)


def _read_folder(folder: Path, entry: str | None) -> Source:
    """A hub folder."""
    says: tuple[tuple[str, dict[str, Any]], ...] = ()
    if (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        if {"format", "family", "arrays"} <= config.keys():
            raise TorchFileError(f"{folder} is a folder that save wrote, not a PyTorch checkpoint; use load({folder}).")
        says = ((str(folder / "config.json"), config),)
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif (folder / _INDEX).is_file():
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        named: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else []
        beside = [isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name for name in named]
        if not named or not all(beside):
            raise TorchFileError(f"{folder / _INDEX} names no files beside it; download the folder again.")
        files = [folder / name for name in sorted(set(named))]
    else:
        pickled = sorted(path for path in folder.iterdir() if path.name.endswith(_PICKLED) and path.is_file())
        if len(pickled) != 1:
            names = (
                f"several of these: {', '.join(shown(path.name) for path in pickled[:20])}" if pickled else "no .pth"
            )
            raise TorchFileError(f"{folder} has no model.safetensors, no {_INDEX}, and {names}; give the file itself.")
        read = read_source(pickled[0], entry=entry)
        return Source(str(folder), read.tensors, says + read.says, read.notes)
    if entry is not None:
        raise TorchFileError(f"{folder} holds tensors only, no entry {entry!r}; leave `entry` out.")
    tensors: Tensors = {}
    for file in files:
        part = _read_safetensors(file)
        if twice := sorted(tensors.keys() & part.keys()):
            raise TorchFileError(f"{file} repeats {shown(twice[0])} of another shard; download the folder again.")
        tensors |= part
    return Source(str(folder), _strip_module(tensors, str(folder)), says)


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise TorchFileError(f"{path} is larger than {_MAX_JSON_BYTES // 2**20} MB; download it again.")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TorchFileError(f"{path} is damaged ({shown(error)}); download it again.") from error
    if not isinstance(data, dict):
        raise TorchFileError(f"{path} holds no settings; download it again.")
    return data


def _read_safetensors(path: Path) -> Tensors:
    with path.open("rb") as opened:  # a missing file is an OSError here, as for every other format
        head = opened.read(64)
    if reason := not_the_file(head):
        raise TorchFileError(f"{path} cannot be read as a safetensors file: {reason}.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TorchFileError(
            f"{path} is not a readable safetensors file ({shown(error)}); download or export it again."
        ) from error


def _select_entry(tree: Any, entry: str | None, path: Path) -> tuple[dict[str, TorchTensor], tuple[str, ...]]:
    """The dict of tensors inside a training file, and a note if there are several."""
    if not isinstance(tree, dict):
        raise _no_tensors(path, tree)
    chosen, entries = entry is not None, dict(_entries(tree))
    holding = [name for name, value in entries.items() if _holds_weights(value)]
    if entry is None:
        whole = [tree[name] for name in (*_ENTRIES, *_OTHER_ENTRIES) if isinstance(tree.get(name), Inert)]
        if whole and not holding:
            raise _no_tensors(path, whole[0])
        known = [name for name in (*_ENTRIES, *_OTHER_ENTRIES) if name in holding]
        known += holding if len(holding) == 1 and not _holds_weights(tree) else []
        entry = next(iter([*known, *(name for name in _ENTRIES if name in entries)]), None)
    elif entry not in entries:
        names = [shown(name) for name in holding or entries]
        raise TorchFileError(
            f"{path} has no entry {entry!r} that holds tensors; pick one of: {', '.join(names[:20]) or 'none'}."
        )
    tensors = tree if entry is None else entries[entry]
    where = str(path) if entry is None else f"entry {entry!r} of {path}"
    if not tensors:
        raise TorchFileError(f"{where} is empty; pick another `entry` or another file.")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, TorchTensor):
            named = value.type if isinstance(value, Inert) else value
            what = named if isinstance(named, Global) else type(value).__name__
            name = shown(key) if isinstance(key, str) else f"a {type(key).__name__} as a name"
            raise TorchFileError(
                f"{where} holds {name} ({what}), which is not a named tensor; pick the `entry` that holds the model."
            )
    others = [shown(key) for key, value in tree.items() if key != entry and _holds_weights(value)]
    if chosen or entry is None or not others:
        return tensors, ()
    return tensors, (f"entry {entry!r} was taken, and {', '.join(others[:20])} (entry=, --entry) can be taken instead",)


def _no_tensors(path: Path, value: Any) -> TorchFileError:
    """The refusal of a value in the place of named tensors, e.g. of a model that was saved whole."""
    what = f"an object of {value.type} and " if isinstance(value, Inert) else ""
    return TorchFileError(
        f"{path} holds {what}no dictionary of tensors; nothing was executed; if you trust the file, {RESAVE}."
    )


def _entries(tree: dict[Any, Any], depth: int = 3) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Every dict inside, by its name; inside another one, by both names with a dot between."""
    inside = {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, dict)}
    yield from inside.items()
    for name, value in inside.items() if depth > 1 else ():
        yield from ((f"{name}.{rest}", found) for rest, found in _entries(value, depth - 1))


def _holds_weights(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(tensor, TorchTensor) for tensor in value.values())


def _statements(tree: Any, path: Path) -> tuple[tuple[str, dict[str, Any]], ...]:
    """What a training file says of its model: settings as plain dicts, and names of architectures."""
    found = []
    for name in _SETTINGS:
        settings = unwrapped(tree.get(name))
        if isinstance(settings, dict):
            if name == "args":  # published training scripts crop otherwise than their models are evaluated
                settings = {key: value for key, value in settings.items() if key not in _CROPS}
            found.append((f"{name!r} of {path}", settings))
    names = {name: tree[name] for name in _NAMES if isinstance(tree.get(name), str)}
    return (*found, (str(path), names)) if names else tuple(found)


def _strip_module(tensors: Tensors, where: str) -> Tensors:
    stripped = {key.removeprefix("module."): value for key, value in tensors.items()}
    if len(stripped) != len(tensors):
        twice = next(key for key in tensors if f"module.{key}" in tensors)
        raise TorchFileError(
            f"{where} holds {shown(twice)} both with and without the prefix 'module.'; remove one of the two."
        )
    return stripped
