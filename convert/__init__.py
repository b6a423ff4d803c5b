"""PyTorch checkpoints into Flax models, without PyTorch."""

import re
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from flax import nnx

from ouromamba_jax.convert.keymap import ConversionError
from ouromamba_jax.convert.mambavision import fill_mambavision
from ouromamba_jax.convert.torch_file import TorchFileError, load_tensors, read_torch
from ouromamba_jax.convert.unpickle import shown
from ouromamba_jax.convert.vim import fill_vim
from ouromamba_jax.convert.vmamba import fill_vmamba
from ouromamba_jax.models import VisionModel, create_model

__all__ = ["ConversionError", "TorchFileError", "from_torch", "load_tensors", "read_torch"]

_FILL: dict[str, Callable[..., VisionModel]] = {
    "vim": fill_vim,
    "vmamba": fill_vmamba,
    "mambavision": fill_mambavision,
}
# A key that only this family's checkpoints have.
_SIGNATURES = {
    "vim": r"layers\.\d+\.mixer\..+",
    "vmamba": r"layers\.\d+\.blocks\.\d+\..+",
    "mambavision": r"(?:encoder\.)?levels\.\d+\..+",
}


def from_torch(
    name: str,
    source: str | PathLike[str] | Mapping[str, Any],
    *,
    entry: str | None = None,
    interpolate_positions: bool = False,
    **overrides: Any,
) -> VisionModel:
    """The named model with the weights of a PyTorch checkpoint.

    Nothing in the file is executed. Every tensor of the checkpoint and every parameter of the model is accounted for.

    Args:
      name: one of `list_models()`.
      source: path of a `.pth`, `.pth.tar` or `.safetensors` file, or {key: array} with the original names.
      entry: entry of a training file that holds the model, e.g. "model_ema"; by default "model", then "state_dict".
      interpolate_positions: resize the positional embeddings of a checkpoint of another input size, bicubically. Their
        grid is taken as square where their number allows it, else as shaped like the model's. Only Vim has any.
      **overrides: config fields, `dtype` and `param_dtype`, as `create_model` takes them.

    Raises:
      TorchFileError: the file cannot be read; the message says why.
      ConversionError: the tensors do not fit the model; the message names each of them.
      ValueError: for an unknown name or config field.
    """
    model: Any = nnx.eval_shape(lambda: create_model(name, **overrides))
    tensors = load_tensors(source, entry=entry)
    _check_family(name, model.family, tensors)
    return _FILL[model.family](model, tensors, interpolate_positions=interpolate_positions)


def _check_family(name: str, family: str, tensors: Mapping[str, Any]) -> None:
    found = {other: key for other, sign in _SIGNATURES.items() for key in tensors if re.fullmatch(sign, key)}
    if found and family not in found:
        other, key = next(iter(found.items()))
        raise ConversionError(
            f"the checkpoint is of the {other} family (it has {shown(key)}), but {name} is a {family} model; "
            f"pass the name of a {other} model."
        )
