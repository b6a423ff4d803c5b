"""Paths with "~" are those of the home folder, URLs are one sentence."""

from pathlib import Path

import jax
import numpy as np
import pytest
from linear_model import LinearModel

from ouromamba_jax import GenConfig, generate_images
from ouromamba_jax.cli.main import main
from ouromamba_jax.data import load_images
from ouromamba_jax.data.classes import read_class_names
from ouromamba_jax.data.preprocessing import Preprocessing
from ouromamba_jax.files import check_writable, local_path, read_npz, whole_file, write_text

URLS = ("gs://bucket/a.npz", "s3://bucket/a.npz", "https://host/a.npz", Path("gs://bucket/a.npz"))
DOORS = {
    "write": lambda path: write_text(path, "a"),
    "check": check_writable,
    "read": read_npz,
    "images": lambda path: load_images(path, "test", 8, Preprocessing()),
    "names": read_class_names,
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    return tmp_path


def test_the_tilde_is_the_home_folder(home):
    assert local_path("~/a/b") == home / "a" / "b"
    assert local_path(Path("~")) == home
    assert local_path("a/~b") == Path("a/~b")
    with whole_file("~/new/a.npz") as file:
        np.savez(file, images=np.zeros((1, 8, 8, 3), np.uint8))
    assert (home / "new" / "a.npz").exists()
    assert read_npz("~/new/a.npz")["images"].shape == (1, 8, 8, 3)
    assert len(load_images("~/new/a.npz", "test", 8, Preprocessing()).images) == 1
    write_text("~/names.txt", "cat\ndog\n")
    assert read_class_names("~/names.txt") == ("cat", "dog")
    check_writable("~/a")
    assert not (home.parent / "~").exists()


@pytest.mark.parametrize("url", URLS, ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_a_url_is_one_sentence(door, url, home):
    with pytest.raises(ValueError, match=r"is a URL, and only local files are .*; copy it and give its path here\.$"):
        DOORS[door](url)
    assert list(home.iterdir()) == []


def test_a_home_that_does_not_exist():
    with pytest.raises(ValueError, match=r"^~nobody_of_that_name/a has no home folder .* give the whole path"):
        local_path("~nobody_of_that_name/a")


def test_windows_drives_are_no_urls():
    assert local_path("C:/a").name == "a"


def test_a_generation_is_kept_in_the_home_folder(home):
    model = LinearModel()
    config = GenConfig(num_images=1, iterations=1, contrastive=0.0)
    generate_images(model, config, jax.random.key(0), checkpoint_dir="~/run")
    assert (home / "run" / "generation.npz").exists()
    with pytest.raises(ValueError, match="is a URL"):
        generate_images(model, config, jax.random.key(0), checkpoint_dir="gs://bucket/run")


@pytest.mark.parametrize("verb", [("generate", "vim_micro"), ("quantize", "vim_micro", "--images=a", "--bits=w4a4")])
def test_outputs_of_the_command(verb, home, capsys):
    (home / "old.npz").touch()
    assert main([*verb, "~/old.npz"]) == 1
    assert "~/old.npz already exists" in capsys.readouterr().err
    assert main([*verb, "gs://bucket/out.npz"]) == 1
    error = capsys.readouterr().err
    assert "gs://bucket/out.npz is a URL" in error
    assert len(error.splitlines()) == 1
