"""PyTorch checkpoints into Flax models, without PyTorch."""

import dataclasses
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, Literal

from flax import nnx

from ouromamba_jax.convert.facts import check_facts
from ouromamba_jax.convert.keymap import ConversionError
from ouromamba_jax.convert.mambavision import fill_mambavision
from ouromamba_jax.convert.recognise import (
    HEAD,
    check_family,
    check_release,
    main_difference,
    matching_models,
    without_prefix,
)
from ouromamba_jax.convert.source import CheckpointNote, load_tensors, read_source, tell
from ouromamba_jax.convert.torch_file import TorchFileError, read_torch
from ouromamba_jax.convert.vim import fill_vim
from ouromamba_jax.convert.vit import fill_vit
from ouromamba_jax.convert.vmamba import fill_vmamba
from ouromamba_jax.models import VisionModel, create_model
from ouromamba_jax.models.layers import classifier

__all__ = [
    "CheckpointNote",
    "ConversionError",
    "TorchFileError",
    "from_torch",
    "load_tensors",
    "matching_models",
    "read_torch",
]

_FILL: dict[str, Callable[..., VisionModel]] = {
    "vim": fill_vim,
    "vmamba": fill_vmamba,
    "mambavision": fill_mambavision,
    "vit": fill_vit,
}


def from_torch(
    name: str,
    source: str | PathLike[str] | Mapping[str, Any],
    *,
    entry: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    prefix: str | None = None,
    head: Literal["checkpoint", "fresh"] = "checkpoint",
    interpolate_positions: bool = False,
    **overrides: Any,
) -> VisionModel:
    """The named model with the weights of a PyTorch checkpoint.

    Nothing in the file is executed. Every tensor of the checkpoint and every parameter of the model is accounted for,
    and what the checkpoint says of its own architecture must agree with the config. Warns with a `CheckpointNote` about
    an entry that was chosen among several, and a prefix that was taken off.

    Args:
      name: one of `list_models()`.
      source: path of a `.pth`, `.pth.tar` or `.safetensors` file or of a hub folder (config.json, model.safetensors),
        "owner/name" or "owner/name/file" on the Hugging Face hub (which takes the extra `hub`), or {key: array} with
        the original names.
      entry: entry of a training file that holds the model, e.g. "model_ema"; by default "model", then "state_dict".
      revision: branch, tag or commit of what is fetched from the hub.
      token: for a repository that asks for one; by default that of `HF_TOKEN` or of a login.
      prefix: what stands before the model's names in the checkpoint, e.g. "teacher.backbone."; the tensors that lack
        it are left out. By default what wrappers such as `module.` or `backbone.` put before all of them.
      head: "fresh" for a new last layer of `num_classes`, whatever the checkpoint's; with `num_classes=0` there is
        none, and the model returns its features.
      interpolate_positions: resize the positional embeddings of a checkpoint of another input size, bicubically as
        torch does; for Vim without antialiasing, for ViT with it, as their published code does. Their grid is taken as
        square where their number allows it, else as shaped like the model's. Other families have none.
      **overrides: config fields, `dtype` and `param_dtype`, as `create_model` takes them. With `in_channels=1` the
        first weights of a checkpoint of three channels are summed over them, as timm does: one channel gets the logits
        that three times the same one would get. `mean` and `std`, unless they are given, are the averages of the three,
        as in timm's loader.

    Raises:
      TorchFileError: the file cannot be read; the message says why.
      ConversionError: the tensors do not fit the model, or the checkpoint says that it is another; the message names
        each of them, first the difference that explains most.
      ValueError: for an unknown name or config field.

    Examples:
      >>> import numpy as np
      >>> import ouromamba_jax as om
      >>> model = om.from_torch("vim_tiny", "vim_t_midclstok_76p1acc.pth")  # doctest: +SKIP
      >>> om.from_torch("vmamba_tiny_s1l8", {"cls_token": np.zeros((1, 1, 192))})
      Traceback (most recent call last):
        ...
      ouromamba_jax.convert.keymap.ConversionError: ...
    """
    model: Any = nnx.eval_shape(lambda: create_model(name, **overrides))
    config, family = model.config, model.family
    if head not in ("checkpoint", "fresh") or (head == "fresh" and not config.num_classes):
        raise ValueError(f'head is {head!r}, but it must be "checkpoint", or "fresh" with num_classes from 1.')
    read = read_source(source, entry=entry, revision=revision, token=token)
    tensors, notes = without_prefix(read.tensors, prefix)
    check_family(name, family, tensors)
    check_release(family, tensors)
    other_head = head == "fresh" or not config.num_classes
    check_facts(name, family, config, read.says, given=overrides, other_head=other_head)
    last = {name: layer for name in ("proj", "proj_dist") if (layer := getattr(model.head, name, None)) is not None}
    if other_head:
        tensors = {key: value for key, value in tensors.items() if not HEAD.fullmatch(key)}
        for layer in last:
            setattr(model.head, layer, None)
        config = dataclasses.replace(config, num_classes=0)
    try:
        filled: Any = _FILL[family](model, tensors, interpolate_positions=interpolate_positions)
    except ConversionError as error:
        reason = main_difference(name, config, family, tensors)
        raise (error if reason is None else ConversionError(f"{reason}; {error}")) from error.__cause__
    if head == "fresh":
        rngs, init = nnx.Rngs(0), nnx.initializers.normal(0.02)
        for layer, old in last.items():
            types = dict(dtype=old.dtype, param_dtype=old.param_dtype)
            setattr(filled.head, layer, classifier(*old.kernel.shape, kernel_init=init, rngs=rngs, **types))
    tell(read.name, [*read.notes, *notes])
    return filled
