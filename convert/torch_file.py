"""Reads `.pth` files, without torch and without executing anything that a file says.

A `.pth` is a zip archive: `<root>/data.pkl` is a pickle that describes containers and tensors (see `unpickle.py`),
`<root>/data/<n>` holds the raw bytes of storage n. A storage is read when a tensor in it is asked for, so the
optimizer state of a training file costs nothing.
"""

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from ouromamba_jax.convert.unpickle import RESAVE, TorchTensor, shown, unpickle

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


def not_the_file(head: bytes) -> str | None:
    """What its first bytes say a failed download left, and the way out; None if it may be a checkpoint."""
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file; fetch the file with `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "it is a web page, not the file; download the file that the page links to"
    return None


def _check_is_zip(head: bytes) -> None:
    if not head:
        raise ValueError("the file is empty; download it again")
    if head[257:262] == b"ustar" or _LEGACY_MAGIC in head[:16]:
        raise ValueError(f"it has the legacy format from before PyTorch 1.6; {RESAVE}")
    if reason := not_the_file(head):
        raise ValueError(reason)
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
