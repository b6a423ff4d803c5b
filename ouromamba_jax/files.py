"""Files that are written whole or not at all, and read whole or refused; checksums of arrays."""

import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np


def local_path(path: str | os.PathLike[str]) -> Path:
    """`path` with "~" as the home folder.

    Raises:
      ValueError: for an URL such as gs://bucket/x, and for the home of a user who does not exist.
    """
    text = os.fspath(path)
    if re.match(r"[a-z][a-z0-9+.-]+:/", text, re.IGNORECASE):  # of a Path, one of the two slashes is left
        raise ValueError(f"{text} is a URL, and only local files are read and written; copy it and give its path here.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text} has no home folder ({error}); give the whole path.") from error


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` once the block ends; if it fails, what was there before stays.

    Folders on the way are made.

    Raises:
      OSError: if nothing can be written there.
    """
    path = local_path(path)
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Finds out whether a file or folder can be made at `path`, its parents included; nothing is left behind.

    Raises:
      OSError: one sentence that names `path`, not a temporary file.
    """
    place = next(parent for parent in local_path(path).absolute().parents if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=place):  # permissions alone do not tell, e.g. of /proc
            pass
    except OSError as error:
        reason = "it is not a folder" if not place.is_dir() else (error.strerror or str(error)).lower()
        raise OSError(f"{path} cannot be written in {place} ({reason}); choose another place.") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`text` in UTF-8, whole."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`value` as indented JSON, whole."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz. Nothing in it is executed.

    Raises:
      ValueError: if it is damaged, or no .npz of plain arrays.
    """
    path = local_path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # NumPy, zipfile and zlib raise a dozen types for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as an .npz of plain arrays ({reason}); replace or delete it."
        ) from error


def checksum(arrays: Iterable[Any]) -> int:
    """CRC-32 of the bytes of arrays, one after the other."""
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, found)
    return found
