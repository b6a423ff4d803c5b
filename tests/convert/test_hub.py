"""Checkpoints by their names on the Hugging Face hub, from a cache that the tests make: there is no network."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ouromamba_jax import from_torch
from ouromamba_jax.convert import TorchFileError, load_tensors

constants = pytest.importorskip("huggingface_hub.constants")

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "vim_a"
VIM_A = dict(img_size=32, patch_size=8, stride=8, embed_dim=48, depth=3, num_classes=10)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the hub's layout with two repositories, one of them in two revisions."""
    for owner, name, revision, commit, file in (
        ("lab", "Vim-A", "main", "a" * 40, "model.safetensors"),
        ("lab", "Vim-A", "v2", "b" * 40, "config.json"),
        ("lab", "pickled", "main", "c" * 40, "checkpoint.pth"),
    ):
        repository = tmp_path / f"models--{owner}--{name}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        if file == "config.json":
            (repository / "snapshots" / commit / file).write_text("{}")
        else:
            shutil.copy(GOLDEN / file, repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("source", ["lab/Vim-A", "lab/pickled", "lab/pickled/checkpoint.pth"])
def test_a_repository_and_a_file_in_one(source):
    model = from_torch("vim_tiny", source, **VIM_A)
    expected = load_tensors(GOLDEN / "model.safetensors")
    np.testing.assert_array_equal(model.head.proj.bias[...], expected["head.bias"])


@pytest.mark.parametrize(
    ("source", "revision", "says"),
    [
        ("lab/absent", None, "lab/absent is no file or folder here and cannot be fetched from the Hugging Face hub"),
        ("lab/Vim-A", "v3", "check its name and revision"),
        ("lab/Vim-A", "v2", "has no model.safetensors"),
        ("lab/Vim-A/other.pth", None, "or give the path of a file"),
    ],
)
def test_what_the_hub_does_not_have(source, revision, says):
    with pytest.raises(TorchFileError, match=says):
        from_torch("vim_tiny", source, revision=revision)


def test_what_is_here_is_not_fetched(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "lab" / "Vim-A")
    (tmp_path / "lab" / "Vim-A" / "model.safetensors").unlink()
    (tmp_path / "lab" / "Vim-A" / "config.json").unlink()
    with pytest.raises(TorchFileError, match="is here already, so it has no revision='main'"):
        from_torch("vim_tiny", "lab/Vim-A", revision="main")
    assert load_tensors("lab/Vim-A").keys() == load_tensors(GOLDEN / "checkpoint.pth").keys()
    shutil.copy(GOLDEN / "checkpoint.pth", tmp_path / "lab" / "Vim-A" / "second.pth")
    with pytest.raises(TorchFileError, match=r"several of these: checkpoint\.pth, second\.pth; give the file itself"):
        load_tensors("lab/Vim-A")


def test_without_the_extra():
    script = """
import sys
sys.modules["huggingface_hub"] = None
from ouromamba_jax import from_torch
try:
    from_torch("vim_tiny", "lab/absent")
except ImportError as error:
    print(error)
"""
    text = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "pip install 'ouromamba_jax[hub]'" in text
