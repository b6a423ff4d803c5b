"""Files appear whole or not at all."""

import json
import re

import numpy as np
import pytest

from ouromamba_jax.files import check_writable, read_npz, whole_file, write_json, write_text


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with whole_file(path) as file:
        file.write(b"half")
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_what_was_there(error, tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")

    def fail():
        with whole_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    wanted = tmp_path / "file" / "new" / "a.txt"
    for attempt in (check_writable, lambda path: write_text(path, "")):
        with pytest.raises(
            OSError, match=rf"^{re.escape(str(wanted))} cannot be written in .*/file \(it is not a folder"
        ):
            attempt(wanted)
    check_writable(tmp_path / "new" / "a.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_json_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "a.json", {"a": [1, None, "\u00d7"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None, "\u00d7"]}


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_npz_is_refused_in_one_sentence(seed, tmp_path):
    rng = np.random.default_rng(seed)
    path = tmp_path / "a.npz"
    arrays = {"images": rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8), "labels": rng.integers(0, 10, 3)}
    np.savez_compressed(path, **arrays)
    for name, value in read_npz(path).items():
        np.testing.assert_array_equal(value, arrays[name])
    whole = path.read_bytes()
    sentences = []
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 4):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged[: rng.integers(1, len(whole)) if rng.random() < 0.3 else None])
        try:
            read_npz(path)
        except ValueError as error:
            sentences.append(str(error))
    start = re.escape(f"{path} cannot be read as an .npz of plain arrays (")
    assert len(sentences) > 10
    assert all(re.fullmatch(rf"{start}.*\); replace or delete it\.", sentence) for sentence in sentences)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"not an archive at all"])
def test_what_is_no_npz_is_refused(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz of plain arrays"):
        read_npz(tmp_path / "a.npz")
