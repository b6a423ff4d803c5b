"""Where the tensors of VMamba (MzeroMiko, VSSM) go, by their present names and the older ones its loader renames."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from ouromamba_jax.convert.keymap import Rule, StageRule, fill, linear, patches, pixel_patches, same
from ouromamba_jax.models.vmamba import DIRECTIONS, VMambaConfig


def linear2d(w: Shaped[np.ndarray, "O I"] | Shaped[np.ndarray, "O I 1 1"]) -> Shaped[np.ndarray, "I O"]:
    """A linear layer over the channels of a map, stored as a matrix or as a 1x1 convolution, as a Flax kernel."""
    return linear(w[:, :, 0, 0] if w.shape[2:] == (1, 1) else w)


def depthwise2d(w: Shaped[np.ndarray, "C 1 kh kw"]) -> Shaped[np.ndarray, "kh kw C"]:
    """A depthwise 2-D convolution, taps first."""
    if w.ndim != 4:
        raise ValueError("4 axes expected")
    return np.squeeze(w, 1).transpose(1, 2, 0)


def direction(k: int) -> Callable[[np.ndarray], np.ndarray]:
    """The k-th of the weights (K, O, I) that are stacked over the scan directions, as a Flax kernel."""

    def transform(w: Shaped[np.ndarray, "K O I"]) -> Shaped[np.ndarray, "I O"]:
        if w.ndim != 3 or len(w) != len(DIRECTIONS):
            raise ValueError(f"3 axes expected, the first of {len(DIRECTIONS)}")
        return linear(w[k])

    return transform


def flat(w: Shaped[np.ndarray, "K E"]) -> Shaped[np.ndarray, " KE"]:
    """Biases (K, E) of all directions in one row."""
    if w.ndim != 2 or len(w) != len(DIRECTIONS):
        raise ValueError(f"2 axes expected, the first of {len(DIRECTIONS)}")
    return w.reshape(-1)


def vmamba_rules(config: VMambaConfig) -> tuple[Rule, ...]:
    """The table for a model of this config."""
    depths = config.depths
    mixer = [
        ("in_proj.weight", "in_proj.kernel", linear2d),
        ("conv2d.weight", "conv.kernel", depthwise2d),
        ("dt_projs_bias", "scan.dt_bias", flat),
        ("A_logs", "scan.A_log", same),
        ("Ds", "scan.D", same),
        *_norm("out_norm", "norm"),
        ("out_proj.weight", "out_proj.kernel", linear2d),
    ]
    for k in range(len(DIRECTIONS)):
        mixer.append(("x_proj_weight", f"directions.{k}.x_proj.kernel", direction(k)))
        mixer.append(("dt_projs_weight", f"directions.{k}.dt_proj.kernel", direction(k)))
    block = [
        *_norm("norm", "norm"),
        *_norm("ln_1", "norm"),
        *((f"{old}.{key}", f"mixer.{path}", to) for old in ("op", "self_attention") for key, path, to in mixer),
        *_norm("norm2", "norm2"),
    ]
    for fc in ("fc1", "fc2"):
        block += [(f"mlp.{fc}.weight", f"mlp.{fc}.kernel", linear2d), (f"mlp.{fc}.bias", f"mlp.{fc}.bias", same)]
    downsample = [*_conv("downsample.1", "proj"), *_norm("downsample.3", "norm")]
    of_pixels = pixel_patches(config.in_channels)
    ends = [
        *_conv("patch_embed.0", "stem.first.proj", of_pixels),
        *_conv("patch_embed.proj", "stem.first.proj", of_pixels),
        *_norm("patch_embed.2", "stem.first.norm"),
        *_norm("patch_embed.norm", "stem.first.norm"),
        *_conv("patch_embed.5", "stem.second.proj"),
        *_norm("patch_embed.7", "stem.second.norm"),
    ]
    for old in ("classifier.", ""):
        ends += [
            *_norm(f"{old}norm", "head.norm"),
            (f"{old}head.weight", "head.proj.kernel", linear),
            (f"{old}head.bias", "head.proj.bias", same),
        ]
    return (
        *(Rule(key, path, to) for key, path, to in ends),
        *(
            StageRule(f"layers.{{stage}}.blocks.{{block}}.{key}", f"blocks.{{i}}.{path}", to, depths=depths)
            for key, path, to in block
        ),
        *(
            StageRule(f"layers.{{stage}}.{key}", f"blocks.{{i}}.downsample.{path}", to, depths=depths, downsample=True)
            for key, path, to in downsample
        ),
    )


def fill_vmamba(model: Any, tensors: Mapping[str, np.ndarray], *, interpolate_positions: bool = False) -> Any:
    """A copy of `model`, which may be abstract, with every leaf taken from `tensors`; see `keymap.fill`.

    `interpolate_positions` changes nothing: these models have no positions.
    """
    del interpolate_positions
    return fill(model, tensors, vmamba_rules(model.config))


Entry = tuple[str, str, Callable[[np.ndarray], np.ndarray]]


def _norm(key: str, path: str) -> list[Entry]:
    return [(f"{key}.weight", f"{path}.scale", same), (f"{key}.bias", f"{path}.bias", same)]


def _conv(key: str, path: str, to: Callable[[np.ndarray], np.ndarray] = patches) -> list[Entry]:
    return [(f"{key}.weight", f"{path}.kernel", to), (f"{key}.bias", f"{path}.bias", same)]
