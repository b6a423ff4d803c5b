"""A model as one StableHLO program that runs with JAX alone, its weights inside or in a safetensors file beside it."""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from numbers import Integral
from os import PathLike
from typing import Any, Literal, get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from ouromamba_jax.data.preprocessing import image_shape
from ouromamba_jax.files import check_writable, local_path, whole_file
from ouromamba_jax.models import pure
from ouromamba_jax.models.base import VisionModel
from ouromamba_jax.pallas.device import device_reason
from ouromamba_jax.quantize.activation import ActQuantizer, Levels
from ouromamba_jax.quantize.kinds import prepare_weights
from ouromamba_jax.quantize.sites import named_modules

PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".stablehlo"
Weights = Literal["inside", "beside"]


class ExportNote(UserWarning):
    """What an exported program lacks."""


def export(
    path: str | PathLike[str], model: VisionModel, batch: str | int = "b", *, weights: Weights = "inside"
) -> None:
    """Writes `model`, float or quantised, as a program for CPUs, NVIDIA GPUs and TPUs that JAX alone can run.

    `jax.export.deserialize(file.read()).call(images)` gives the logits; images are normalised, float32 (batch, H, W,
    in_channels). What is quantised is computed in integers, through XLA; kernels of one GPU are left out, which an
    `ExportNote` says where the model would take them. With weights="beside" the call is `.call(arrays, images)`, with
    the arrays of the .safetensors by name: what `safetensors.numpy.load_file` returns. docs/guides/export.md has their
    layout.

    Args:
      path: a new file whose name ends in .stablehlo.
      batch: the number of images of every call, or a name: then it is free.
      weights: "inside" the program, or "beside" it, in a .safetensors of the same name.

    Raises:
      FileExistsError: if one of the files exists.
      OSError: if nothing can be written there.
      ValueError: for a path, batch or weights that mean nothing, and in a process without JAX's CPU backend.

    Examples:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import jax
      >>> import ouromamba_jax as om
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     om.export(f"{folder}/vim_micro.stablehlo", om.load("vim_micro"))
      ...     program = jax.export.deserialize(bytearray(Path(folder, "vim_micro.stablehlo").read_bytes()))
      >>> program.in_avals[0].shape
      (b, 32, 32, 3)
    """
    target = local_path(path)
    beside = target.with_suffix(".safetensors")
    _check(str(path), batch, weights)
    for taken in (target, beside) if weights == "beside" else (target,):
        if taken.exists():
            raise FileExistsError(f"{taken} already exists; choose another path or remove it first.")
    check_writable(target)
    if device_reason() is None:
        note = "the exported program leaves the kernels for this GPU out and computes the same through XLA."
        warnings.warn(note, ExportNote, stacklevel=2)
    with jax.default_device(_cpu()):  # where no operation chooses a kernel
        model = nnx.merge(*nnx.split(model))
        prepare_weights(model)
        program, arrays = _program(model, batch, weights)
    with whole_file(target) as file:
        file.write(program.serialize())
        if weights == "beside":
            with whole_file(beside) as other:
                other.write(safetensors.numpy.save(arrays, _metadata(model)))


def _check(path: str, batch: Any, weights: Any) -> None:
    if not path.endswith(SUFFIX):
        raise ValueError(f"{path} must end in {SUFFIX}.")
    fixed = isinstance(batch, Integral) and not isinstance(batch, bool) and int(batch) >= 1
    if not fixed and not (isinstance(batch, str) and batch.isidentifier()):
        raise ValueError(f"batch is {batch!r}; give a number of images, or a name such as 'b' for any number.")
    if weights not in get_args(Weights):
        raise ValueError(f"weights is {weights!r}; choose {' or '.join(map(repr, get_args(Weights)))}.")


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            f"programs are exported on JAX's CPU backend, which this process lacks ({error}); add cpu to JAX_PLATFORMS."
        ) from error


def _program(
    model: VisionModel, batch: str | int, weights: Weights
) -> tuple[jax.export.Exported, dict[str, np.ndarray]]:
    """(the program, its arrays by name)."""
    fn, state = pure(model)
    variables = nnx.to_flat_state(state)
    arrays = {".".join(map(str, key)): np.asarray(leaf[...]) for key, leaf in variables}
    stored = {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in arrays.items()}

    def call(given: Mapping[str, jax.Array | np.ndarray], images: jax.Array) -> jax.Array:
        values = (jnp.asarray(given[name], arrays[name].dtype) for name in arrays)
        flat = [(key, leaf.replace(value)) for (key, leaf), value in zip(variables, values, strict=True)]
        return fn(nnx.from_flat_state(flat), images)

    count = jax.export.symbolic_shape(batch)[0] if isinstance(batch, str) else int(batch)
    images = jax.ShapeDtypeStruct((count, *image_shape(model.config)), jnp.float32)
    if weights == "inside":
        program = jax.export.export(jax.jit(lambda images: call(arrays, images)), platforms=PLATFORMS)(images)
    else:
        program = jax.export.export(jax.jit(call), platforms=PLATFORMS)(stored, images)
    return program, stored


def _metadata(model: VisionModel) -> dict[str, str]:
    """What the arrays do not say: the model, and by path the bits of every weight and the rule of every activation."""
    quantization: dict[str, Any] = {}
    for path, module in named_modules(model):
        if isinstance(module, ActQuantizer):
            rule = dataclasses.asdict(module.config)
            quantization[path] = {name: rule[name] for name in ("act_bits", "outlier_bits", "n_refresh", "detection")}
    for key, leaf in nnx.to_flat_state(nnx.state(model, Levels)):
        quantization[".".join(map(str, key))] = {"weight_bits": leaf.bits}
    config = dataclasses.asdict(model.config)
    return {"family": model.family, "config": json.dumps(config), "quantization": json.dumps(quantization)}
