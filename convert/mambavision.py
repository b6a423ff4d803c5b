"""Where the tensors of MambaVision (NVlabs) go, and its BatchNorms, folded into the convolutions before them.

The checkpoint is first poured into the model with its BatchNorms still in place, so that every tensor is checked under
its own name; then, in float64, each BatchNorm with its running statistics becomes part of the weights:

    scale = weight / sqrt(running_var + eps)
    kernel <- kernel * scale,  bias <- (bias - running_mean) * scale + bias of the norm
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from ouromamba_jax.convert.keymap import (
    ConversionError,
    Rule,
    StageRule,
    depthwise1d,
    fill,
    linear,
    patches,
    pixel_patches,
)
from ouromamba_jax.convert.unpickle import shown
from ouromamba_jax.models.convolution import Conv3x3
from ouromamba_jax.models.mambavision import ConvBlock, MambaVisionConfig

_STEM_EPS, _EPS = 1e-4, 1e-5


def twice(w: Shaped[np.ndarray, " E"]) -> Shaped[np.ndarray, " E"]:
    """The bias of dt_proj, which the published code adds in the projection and once more in the scan."""
    return w * w.dtype.type(2)


def mambavision_rules(config: MambaVisionConfig) -> tuple[Rule, ...]:
    """The table for a model of this config that still has its BatchNorms."""
    ends = [
        Rule("patch_embed.conv_down.0.weight", "stem.first.proj.kernel", pixel_patches(config.in_channels)),
        *_batch_norm("patch_embed.conv_down.1", "stem.first.norm"),
        Rule("patch_embed.conv_down.3.weight", "stem.second.proj.kernel", patches),
        *_batch_norm("patch_embed.conv_down.4", "stem.second.norm"),
        *_batch_norm("norm", "head.norm"),
        Rule("head.weight", "head.proj.kernel", linear),
        Rule("head.bias", "head.proj.bias"),
    ]
    block = [
        Rule("gamma_1", "gamma1"),
        Rule("gamma_2", "gamma2"),
        Rule("mixer.in_proj.weight", "mixer.in_proj.kernel", linear),
        Rule("mixer.conv1d_x.weight", "mixer.conv_x.kernel", depthwise1d),
        Rule("mixer.conv1d_z.weight", "mixer.conv_z.kernel", depthwise1d),
        Rule("mixer.x_proj.weight", "mixer.x_proj.kernel", linear),
        Rule("mixer.dt_proj.weight", "mixer.dt_proj.kernel", linear),
        Rule("mixer.dt_proj.bias", "mixer.scan.dt_bias", twice),
        Rule("mixer.A_log", "mixer.scan.A_log"),
        Rule("mixer.D", "mixer.scan.D"),
        Rule("mixer.out_proj.weight", "mixer.out_proj.kernel", linear),
    ]
    for i in (1, 2):
        block += [
            Rule(f"conv{i}.weight", f"conv{i}.proj.kernel", patches),
            Rule(f"conv{i}.bias", f"conv{i}.proj.bias"),
            *_batch_norm(f"norm{i}", f"conv{i}.norm"),
            Rule(f"norm{i}.weight", f"norm{i}.scale"),
            Rule(f"norm{i}.bias", f"norm{i}.bias"),
        ]
    for name in ("mixer.qkv", "mixer.proj", "mlp.fc1", "mlp.fc2"):
        block += [Rule(f"{name}.weight", f"{name}.kernel", linear), Rule(f"{name}.bias", f"{name}.bias")]
    return (
        *ends,
        *(
            StageRule(f"levels.{{stage}}.blocks.{{block}}.{rule.key}", f"blocks.{{i}}.{rule.path}", rule.transform,
                      depths=config.depths)
            for rule in block
        ),
        StageRule("levels.{stage}.downsample.reduction.0.weight", "blocks.{i}.downsample.proj.kernel", patches,
                  depths=config.depths, downsample=True),
    )  # fmt: skip


def fill_mambavision(model: Any, tensors: Mapping[str, np.ndarray], *, interpolate_positions: bool = False) -> Any:
    """A copy of `model`, which may be abstract, with every leaf taken from `tensors`; see `keymap.fill`.

    The `encoder.` in front of the names of some files is taken off. BatchNorms' counters of training steps may be
    missing, as in files of older PyTorch versions. `interpolate_positions` changes nothing: these models have no
    positions.

    Raises:
      ConversionError: names every tensor and leaf that does not fit.
    """
    del interpolate_positions
    rules = mambavision_rules(model.config)
    published = nnx.clone(model)
    for path, place in _normed(published):
        _unfold(place, conv_bias=not path.startswith("stem."))
    counters = {
        _key(rules, f"{path}.norm.var").replace("running_var", "num_batches_tracked") for path, _ in _normed(model)
    }
    filled: Any = fill(published, _without_counters(_without_prefix(tensors), counters), rules)
    for (path, place), (_, target) in zip(_normed(filled), _normed(nnx.clone(model)), strict=True):
        try:
            _fold(place, target, _STEM_EPS if path.startswith("stem.") else _EPS)
        except FloatingPointError as error:
            key = _key(rules, f"{path}.norm.var")
            raise ConversionError(
                f"{shown(key)} and the weights it belongs to give values that are not finite; get another copy."
            ) from error
    return filled


class _BatchNorm(nnx.Module):
    """The float32 leaves of a BatchNorm, without values."""

    def __init__(self, channels: int):
        leaf = jax.ShapeDtypeStruct((channels,), jnp.float32)
        self.scale, self.bias, self.mean, self.var = (nnx.Param(leaf) for _ in range(4))


def _normed(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, module) of everything whose `norm` is a BatchNorm in the published model: convolutions and the head."""
    yield "stem.first", model.stem.first
    yield "stem.second", model.stem.second
    for i, block in enumerate(model.blocks):
        if isinstance(block, ConvBlock):
            yield f"blocks.{i}.conv1", block.conv1
            yield f"blocks.{i}.conv2", block.conv2
    yield "head", model.head


def _unfold(place: Any, *, conv_bias: bool) -> None:
    """Gives `place` the leaves that the published model has there, in float32."""
    linear = place.proj
    place.norm = _BatchNorm(linear.kernel.shape[1] if _is_conv(place) else place.norm.scale.shape[0])
    if _is_conv(place):
        linear.kernel = nnx.Param(jax.ShapeDtypeStruct(linear.kernel.shape, jnp.float32))
        linear.bias = nnx.Param(jax.ShapeDtypeStruct(linear.bias.shape, jnp.float32)) if conv_bias else None


def _is_conv(place: Any) -> bool:
    return isinstance(place, Conv3x3)


def _fold(place: Any, target: Any, eps: float) -> None:
    """Puts `target`'s modules into `place`, with the weights of the convolution and the BatchNorm together."""
    scale, bias, mean, var = (
        _exact(leaf) for leaf in (place.norm.scale, place.norm.bias, place.norm.mean, place.norm.var)
    )
    with np.errstate(invalid="ignore"):
        scale = scale / np.sqrt(var + eps)
    if _is_conv(place):
        conv_bias = 0.0 if place.proj.bias is None else _exact(place.proj.bias)
        _set(target.proj.kernel, _exact(place.proj.kernel) * scale[None])
        _set(target.proj.bias, (conv_bias - mean) * scale + bias)
        place.proj = target.proj
        del place.norm
    else:
        _set(target.norm.scale, scale)
        _set(target.norm.bias, bias - mean * scale)
        place.norm = target.norm


def _exact(leaf: Any) -> np.ndarray:
    return np.asarray(leaf[...], np.float64)


def _set(leaf: Any, value: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        value = value.astype(leaf.dtype)
    if not np.isfinite(value).all():
        raise FloatingPointError
    leaf.set_value(jnp.asarray(value))


def _key(rules: tuple[Rule, ...], path: str) -> str:
    return next(key for rule in rules if (key := rule.key_for(path)) is not None)


def _without_prefix(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names without `encoder.`, unless the same tensor is there without it as well."""
    return {
        key if (bare := key.removeprefix("encoder.")) != key and bare in tensors else bare: value
        for key, value in tensors.items()
    }


def _without_counters(tensors: Mapping[str, np.ndarray], counters: set[str]) -> dict[str, np.ndarray]:
    """The tensors without the integer scalars of the known names; anything else is left for `fill` to refuse."""
    return {
        key: value
        for key, value in tensors.items()
        if not (key in counters and value.shape == () and np.issubdtype(value.dtype, np.integer))
    }


def _batch_norm(key: str, path: str) -> tuple[Rule, ...]:
    leaves = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return tuple(Rule(f"{key}.{name}", f"{path}.{leaf}") for name, leaf in leaves.items())
