"""Files appear whole or not at all."""

import json

import pytest

from ouromamba_jax.files import whole_file, write_json, write_text


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


def test_json_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "a.json", {"a": [1, None, "\u00d7"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None, "\u00d7"]}
