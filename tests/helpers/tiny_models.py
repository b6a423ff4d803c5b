"""Tiny quantised models without calibration: every site replaced, levels and scales drawn at random."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ouromamba_jax.data.preprocessing import image_shape
from ouromamba_jax.models import VisionModel, create_model
from ouromamba_jax.quantize import QuantConfig
from ouromamba_jax.quantize.activation import Calibrated, Levels, SiteSpec
from ouromamba_jax.quantize.capture import capture
from ouromamba_jax.quantize.kinds import apply_specs
from ouromamba_jax.quantize.sites import resolve_sites

TINY = dict(img_size=(12, 16), patch_size=4, stride=4, embed_dim=20, depth=1, d_state=3, num_classes=7)
TOKENS = 13
"""Two windows of ten tokens; a class token in the middle of a 3 x 4 grid."""
FAMILIES = {
    "vim": TINY,
    # Maps of 3 x 4 tokens, which is more than one window of the outlier list.
    "vmamba": dict(img_size=(12, 16), dims=(20,), depths=(1,), num_classes=7),
    # A convolution, then a scan and attention on 5 x 7 tokens, padded to 2 x 2 windows of 16.
    "mambavision": dict(
        img_size=(40, 52), dim=12, in_dim=8, depths=(1, 2), window_size=(4, 4), num_heads=(1, 2), layer_scale=1e-5,
        num_classes=7,
    ),
    # A class token before 3 x 4 patches.
    "vit": dict(img_size=(12, 16), patch_size=4, embed_dim=20, depth=1, num_heads=2, num_classes=7),
}  # fmt: skip


def random_model(name: str, **fields: Any) -> VisionModel:
    """`create_model` with values of NumPy's, which need no compiling."""
    return filled(nnx.eval_shape(lambda: create_model(name, **fields)))


def natural_model(name: str, seed: int = 5, **fields: Any) -> VisionModel:
    """`create_model` with values like a trained model's, none as it is initialised (A = -1 .. -N, D = 1, bias 0)."""
    rng = np.random.default_rng(seed)
    model = nnx.eval_shape(lambda: create_model(name, **fields))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        shape = leaf.get_value().shape
        value = rng.standard_normal(shape)
        if path[-1] == "kernel":
            value = value / np.sqrt(np.prod(shape[:-1]))
        else:
            middle = {"A_log": np.log(np.arange(1, shape[-1] + 1)), "D": 1, "scale": 1, "dt_bias": -2}
            value = middle.get(path[-1], 0) + 0.2 * value
        leaf.set_value(jnp.asarray(value, leaf.get_value().dtype))
    return model


def filled(model: Any, seed: int = 0) -> Any:
    """Random values of the right kind in every leaf."""
    rng = np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        shape, dtype = leaf.get_value().shape, leaf.get_value().dtype
        is_bool = dtype == jnp.dtype(bool)
        if isinstance(leaf, Levels):
            limit = 2 ** (leaf.bits - 1) - 1
            value = rng.integers(-limit, limit + 1, shape)
            value = -np.abs(value) if path[-1] == "A" else value  # states decay
        elif dtype == jnp.int8:
            value = rng.integers(0, 9, shape)  # of a shift
        elif isinstance(leaf, Calibrated) and not is_bool:
            value = rng.uniform(0.01, 0.1, shape)
        else:
            value = rng.standard_normal(shape) > 1 if is_bool else rng.standard_normal(shape)
        leaf.set_value(jnp.asarray(value, dtype))
    return model


def quantised(
    config: QuantConfig,
    family: str = "vim",
    *,
    skipped: tuple[str, ...] = (),
    two_bytes: dict[str, tuple[str, ...]] | None = None,
) -> nnx.Module:
    """What `quantize` makes of a tiny model; the sites in `skipped` stay float; `two_bytes` is by site."""
    model = random_model(f"{family}_micro", **FAMILIES[family])
    specs = {path: spec for path, spec in specs_of(model, config).items() if path not in skipped}
    specs |= {path: replace(specs[path], two_bytes=names) for path, names in (two_bytes or {}).items()}
    model = apply_specs(model, specs)
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        if isinstance(leaf, nnx.Param):
            leaf.set_value(leaf[...].astype(config.float_dtype))
    return filled(model)


def specs_of(model: VisionModel, config: QuantConfig) -> dict[str, SiteSpec]:
    """Every site that `config` quantises, with the shape of what enters it; nothing is computed."""
    configs, specs = resolve_sites(model, config), {}
    x = jax.ShapeDtypeStruct((1, *image_shape(model.config)), jnp.float32)
    for name, stage in model.stages:
        prefix = f"{name}."
        local = {path.removeprefix(prefix): c for path, c in configs.items() if path.startswith(prefix)}
        x, seen = jax.eval_shape(partial(capture, stage, configs=local, batch_size=1), x)
        for path, entered in seen.items():
            first = entered["u"] if "u" in entered else entered["input"]
            specs[prefix + path] = SiteSpec(local[path], tokens=first.shape[1], channels=first.shape[-1])
    return specs
