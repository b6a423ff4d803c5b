"""Checkpoints on the Hugging Face hub: fetched, or taken from its cache, as local files."""

import re
from pathlib import Path
from typing import Any

from ouromamba_jax.convert.torch_file import TorchFileError

_PICKLED = ("*.pth", "*.pth.tar", "*.bin", "*.pt", "*.ckpt")  # as `source` reads them
_TENSORS = ("*.safetensors", "model.safetensors.index.json")


def is_repository(source: str) -> bool:
    """Whether a string can name a repository, "owner/name", or a file in one, "owner/name/file"."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(?:/[\w./-]+)?", source) is not None and not source.startswith(".")


def fetch(source: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local copy of a repository (its config and weights, safetensors if it has any) or of a file in one.

    What the hub's cache holds is not fetched again, and serves without a network.

    Args:
      revision: a branch, tag or commit; by default the main branch.
      token: as `huggingface_hub` takes it; by default that of `HF_TOKEN` or of a login.

    Raises:
      ImportError: if huggingface_hub is not installed.
      TorchFileError: if the hub and its cache have no such repository, file or revision.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HTTPError
    except ImportError as error:
        raise ImportError(
            f"{source} is no file or folder here; to fetch it from the Hugging Face hub, "
            "pip install 'ouromamba_jax[hub]'."
        ) from error
    owner, name, *file = source.split("/")
    where: dict[str, Any] = dict(repo_id=f"{owner}/{name}", revision=revision, token=token)
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(filename="/".join(file), **where))
        for kinds in (_TENSORS, _PICKLED):
            folder = Path(huggingface_hub.snapshot_download(allow_patterns=["config.json", *kinds], **where))
            if any(path for kind in kinds for path in folder.glob(kind)):
                break
        return folder
    except (OSError, ValueError, HTTPError) as error:
        said = str(error).strip().split("\n")[0].rstrip(".")
        raise TorchFileError(
            f"{source} is no file or folder here and cannot be fetched from the Hugging Face hub ({said}); check its "
            "name and revision, set HF_TOKEN if it asks for one, or give the path of a file."
        ) from error
