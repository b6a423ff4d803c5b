"""Reads checkpoint files into named arrays, without torch and without executing anything that a file says.

A `.pth` is a zip archive: `<root>/data.pkl` is a pickle that describes containers and tensors (see `unpickle.py`),
`<root>/data/<n>` holds the raw bytes of storage n. A storage is read when a tensor in it is asked for, so the
optimizer state of a training file costs nothing.
"""

import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jaxtyping import Shaped

from ouromamba_jax.convert.unpickle import RESAVE, Inert, TorchTensor, shown, unpickle

# A checkpoint with optimizer state describes itself in about 1 MB; the limit bounds what a hostile one can build.
_MAX_PICKLE_BYTES = 16 * 2**20
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
# zipfile raises RuntimeError for encrypted entries and NotImplementedError, its subclass, for exotic compression.
_PARSE_ERRORS = (ValueError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, struct.error)


class TorchFileError(ValueError):
    """A checkpoint file that cannot be read; the message names the file, the problem and the way out."""


def read_torch(path: str | PathLike[str]) -> Any:
    """The contents of a zip-format `.pth` or `.pth.tar`, with nothing in it executed.

    Returns:
      dicts, lists, tuples and plain values as written; each tensor a `TorchTensor`, read when its `read()` is called;
      every other known object (argparse.Namespace, torch.Size, numpy scalars, ...) an `Inert` record.

    Raises:
      TorchFileError: not such a file, truncated, corrupt, or naming anything that is not plain checkpoint data.
      OSError: if the file cannot be opened.
    """
    archive = _Archive(Path(path))
    with _named_errors(archive.path):
        return unpickle(archive.pickle(), archive.read_tensor)


def load_tensors(
    source: str | PathLike[str] | Mapping[str, Any], *, entry: str | None = None
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The tensors of a checkpoint by their names, without the `module.` that data-parallel training puts in front.

    Args:
      source: path of a `.pth`, `.pth.tar` or `.safetensors` file, or {name: array}.
      entry: which entry of a training file holds the model, e.g. "model_ema"; by default "model", else "state_dict",
        else the file itself.

    Raises:
      TorchFileError: the file cannot be read, has no such entry, or its entry holds anything else than named tensors.
      OSError: if the file cannot be opened.
    """
    if isinstance(source, Mapping):
        if entry is not None:
            raise TorchFileError(f"entry={entry!r} picks a part of a file; pass source[{entry!r}] instead.")
        return _strip_module({str(key): np.asarray(value) for key, value in source.items()}, "the given mapping")
    path = Path(source)
    if path.suffix == ".safetensors":
        if entry is not None:
            raise TorchFileError(f"{path} holds tensors only, no entry {entry!r}; leave `entry` out.")
        return _strip_module(_read_safetensors(path), str(path))
    tensors = _select_entry(read_torch(path), entry, path)
    return _strip_module({key: tensor.read() for key, tensor in tensors.items()}, str(path))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb"):  # a missing file is an OSError here, as for every other format
        pass
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TorchFileError(
            f"{path} is not a readable safetensors file ({shown(error)}); download or export it again."
        ) from error


def _select_entry(tree: Any, entry: str | None, path: Path) -> dict[str, TorchTensor]:
    """The dict of tensors inside a training file."""
    if not isinstance(tree, dict):
        raise TorchFileError(f"{path} holds no dictionary of tensors; {RESAVE}.")
    if entry is None:
        entry = next((name for name in ("model", "state_dict") if isinstance(tree.get(name), dict)), None)
    elif not isinstance(tree.get(entry), dict):
        names = [shown(key) for key, value in tree.items() if isinstance(value, dict)]
        raise TorchFileError(
            f"{path} has no entry {entry!r} that holds tensors; pick one of: {', '.join(names[:20]) or 'none'}."
        )
    tensors = tree if entry is None else tree[entry]
    where = str(path) if entry is None else f"entry {entry!r} of {path}"
    if not tensors:
        raise TorchFileError(f"{where} is empty; pick another `entry` or another file.")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, TorchTensor):
            what = value.type.name if isinstance(value, Inert) else type(value).__name__
            name = shown(key) if isinstance(key, str) else f"a {type(key).__name__} as a name"
            raise TorchFileError(
                f"{where} holds {name} ({what}), which is not a named tensor; pick the `entry` that holds the model."
            )
    return tensors


def _strip_module(tensors: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    stripped = {key.removeprefix("module."): value for key, value in tensors.items()}
    if len(stripped) != len(tensors):
        twice = next(key for key in tensors if f"module.{key}" in tensors)
        raise TorchFileError(
            f"{where} holds {shown(twice)} both with and without the prefix 'module.'; remove one of the two."
        )
    return stripped


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turns what parsers raise on damaged input into one sentence that names the file."""
    try:
        yield
    except TorchFileError:
        raise
    except _PARSE_ERRORS as error:
        reason = shown(error, length=400).rstrip(".") or type(error).__name__
        if isinstance(error, (zipfile.BadZipFile, RuntimeError, EOFError, struct.error, UnicodeDecodeError)):
            reason = f"it is cut short or damaged ({reason}); download it again"
        raise TorchFileError(f"{path} cannot be read as a PyTorch checkpoint: {reason}.") from error


class _Archive:
    """The zip archive of a `.pth`: its entries checked, each storage read once."""

    def __init__(self, path: Path):
        self.path = path
        self._storages: dict[str, bytes] = {}
        with path.open("rb") as file:
            head = file.read(512)
            size = file.seek(0, 2)
        with _named_errors(path):
            _check_is_zip(head)
            self._zip = zipfile.ZipFile(path)
            self._entries = _checked_entries(self._zip.infolist(), size)
            self._root = _find_root(self._entries)
            if f"{self._root}/byteorder" in self._entries and self._part("byteorder") != b"little":
                raise ValueError(f"it is not in little-endian byte order; {RESAVE} on a little-endian machine")

    def pickle(self) -> bytes:
        """The pickle that describes the contents."""
        if self._entries[f"{self._root}/data.pkl"].file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl is larger than {_MAX_PICKLE_BYTES // 2**20} MB; {RESAVE}")
        return self._part("data.pkl")

    def read_tensor(self, tensor: TorchTensor) -> Shaped[np.ndarray, "..."]:
        """The values of one tensor, its storage checked against the archive's CRC."""
        with _named_errors(self.path):
            if tensor.storage not in self._storages:
                self._storages[tensor.storage] = self._part(f"data/{tensor.storage}")
            return tensor.view(self._storages[tensor.storage])

    def _part(self, name: str) -> bytes:
        entry = self._entries.get(f"{self._root}/{name}")
        if entry is None:
            raise ValueError(f"its part {shown(name)} is missing; download it again")
        return self._zip.read(entry)


def _check_is_zip(head: bytes) -> None:
    if not head:
        raise ValueError("the file is empty; download it again")
    if head[257:262] == b"ustar" or _LEGACY_MAGIC in head[:16]:
        raise ValueError(f"it has the legacy format from before PyTorch 1.6; {RESAVE}")
    if not head.startswith(b"PK\x03\x04"):
        raise ValueError("it is not a zip archive, which is what torch.save writes; download it again")


def _checked_entries(infos: list[zipfile.ZipInfo], file_size: int) -> dict[str, zipfile.ZipInfo]:
    """Entries by name. torch.save stores them uncompressed, so together they cannot be larger than the file."""
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise ValueError(f"two parts of the archive have the same name; {RESAVE}")
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
        raise ValueError(f"its parts are compressed or encrypted, which torch.save never does; {RESAVE}")
    if sum(max(info.file_size, info.compress_size) for info in infos) > file_size:
        raise ValueError("its parts claim to be larger than the file; download it again")
    return entries


def _find_root(entries: dict[str, zipfile.ZipInfo]) -> str:
    roots = [root for root, _, name in (entry.partition("/") for entry in entries) if root and name == "data.pkl"]
    if len(roots) != 1:
        raise ValueError(f"the archive has {len(roots)} parts named <root>/data.pkl instead of one; {RESAVE}")
    if f"{roots[0]}/constants.pkl" in entries:
        raise ValueError(f"it is a TorchScript archive; {RESAVE}")
    return roots[0]
